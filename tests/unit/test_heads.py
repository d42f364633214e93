"""Alignment heads that are found, given, or the checkpoint's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reference
from asr_core import build, heads, isolate
from asr_core.align import AlignRequest
from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.errors import CheckpointError, UsageError
from asr_export import heads as command
from reference import shapes
from runners import pytorch

STEP, FIRST = 8, 20  # audio positions between tokens, and before the first
LATE, PLANTED = (0, 0), (1, 0)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 2 × 2 heads that hears token t at audio position FIRST + STEP · t through one head.

    Another head looks at the same positions, one token late, and nothing comes of it; the other two are random.
    """
    folder = shapes.write(shapes.Shape(128, 2, 1, 2), tmp_path_factory.mktemp("planted"))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        # All that is left of a block is its residual, of the encoder its positions.
        if name.endswith(("out_proj.weight", "fc2.weight")) or ".conv" in name:
            tensor.zero_()
    sound = weights["model.encoder.embed_positions.weight"]
    positions = weights["model.decoder.embed_positions.weight"]
    positions.zero_()
    positions[:150] = sound[FIRST + STEP * torch.arange(150)]
    speeds = torch.exp(-np.log(10000) / 63 * torch.arange(64))
    for (layer, _), shift in ((PLANTED, 0), (LATE, -STEP)):
        attention = f"model.decoder.layers.{layer}.encoder_attn"
        query, key = weights[f"{attention}.q_proj.weight"], weights[f"{attention}.k_proj.weight"]
        query[:64], key[:64] = 0, 0
        for row, pair in enumerate(range(8, 40)):
            turn = speeds[pair] * shift
            key[row, pair], key[row + 32, pair + 64] = 1, 1  # sine and cosine
            query[row, pair], query[row, pair + 64] = 4 * turn.cos(), 4 * turn.sin()
            query[row + 32, pair], query[row + 32, pair + 64] = -4 * turn.sin(), 4 * turn.cos()
    generator = torch.Generator().manual_seed(0)
    for projection in ("v_proj", "out_proj"):
        tensor = weights[f"model.decoder.layers.{PLANTED[0]}.encoder_attn.{projection}.weight"]
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.1 if projection == "v_proj" else 0.02))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_head_through_which_the_model_hears_is_found(planted):
    runner = pytorch.open(planted, 1)
    request = AlignRequest(0, tuple(range(300, 315)), 400)
    agreements = command.judge(runner, np.zeros((1, 80, 3000), np.float32), request)
    every = command.every_head(runner)
    assert heads.choose(every, agreements) == [PLANTED]
    # It is no matter of order: the late head runs through the sound just as well, in both kinds of attention.
    forced = np.array([[*runner.tokens.prompt(), *request.tokens, runner.tokens.end]])
    scores, _ = runner.cross_attention(forced, runner.encode(np.zeros((1, 80, 3000), np.float32)))
    looked = {head: scores[every.index(head)].argmax(-1) for head in (PLANTED, LATE)}
    count = forced.shape[1]
    np.testing.assert_allclose(looked[PLANTED], FIRST + STEP * np.arange(count), atol=2)
    np.testing.assert_allclose(looked[LATE], FIRST + STEP * (np.arange(count) - 1), atol=2)


def test_heads_are_found_once_and_the_checkpoint_stays_as_it_is(trained, tmp_path, monkeypatch):
    """The carried checkpoint says which heads follow the sound; found are none but those."""
    lines = reference.manifest_path().read_text().splitlines()
    clips = reference.manifest_path().parent
    manifest = tmp_path / "few.jsonl"
    manifest.write_text("\n".join(line.replace('path": "', f'path": "{clips}/') for line in lines[30:90:20]))
    calls = []

    def here(function, arguments, **_):
        calls.append(function)
        return isolate.Outcome("ok", command.listen(**arguments, progress=lambda stage: None), "", 0.0)

    monkeypatch.setattr(isolate, "run", here)
    before = {file.name: file.read_bytes() for file in trained.path.iterdir()}
    found = [command.choose(trained, "discover", manifest, tmp_path).alignment_heads for _ in range(2)]
    assert calls == ["asr_export.heads:listen"]
    assert found[0] == found[1]
    assert set(found[0]) <= set(trained.alignment_heads)
    assert before == {file.name: file.read_bytes() for file in trained.path.iterdir()}


def test_chosen_heads_are_part_of_the_artifact_and_of_its_key(mini, tmp_path):
    checkpoint = Checkpoint.open(mini)
    given = command.choose(checkpoint, "0:0,1:0", None, tmp_path)
    assert build.build_key(given, "ctranslate2", "fp32") != build.build_key(checkpoint, "ctranslate2", "fp32")
    out = tmp_path / "ctranslate2-fp32"
    out.mkdir()
    build.export_in_process(
        str(mini), "mini", "ctranslate2", "fp32", str(out), lambda stage: None, alignment_heads=given.alignment_heads
    )
    manifest = Artifact.open(out).manifest
    assert manifest.alignment_heads == [(0, 0), (1, 0)]
    assert manifest.build_key == build.build_key(given, "ctranslate2", "fp32")
    for name in ("generation_config.json", "config.json"):
        assert json.loads((out / name).read_text())["alignment_heads"] == [[0, 0], [1, 0]]


def test_without_a_list_it_is_the_upper_half_of_the_layers(shape_folder, tmp_path):
    folder = shutil.copytree(shape_folder("mini-large-v3"), tmp_path / "m")
    generation = json.loads((folder / "generation_config.json").read_text())
    del generation["alignment_heads"]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert Checkpoint.open(folder).alignment_heads == [(2, 0), (2, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize("wrong", ["2:0", "0:1", "-1:0"])
def test_heads_that_the_model_does_not_have(mini, wrong, tmp_path):
    with pytest.raises(CheckpointError, match=f"no alignment heads {wrong}: its decoder has 2 layers of 1 heads"):
        command.choose(Checkpoint.open(mini), wrong, None, tmp_path)


@pytest.mark.parametrize("wrong", ["", "1", "1:2:3", "a:b", "1:0;1:1"])
def test_what_is_no_list_of_heads(wrong):
    with pytest.raises(UsageError, match="is no list of alignment heads"):
        heads.parse(wrong)


def test_clips_in_which_nothing_is_said(trained):
    silence = reference.manifest_path().parent / "silence.flac"
    with pytest.raises(UsageError, match="says nothing in 1 clips"):
        command.listen(str(trained.path), [[str(silence), "en"]], lambda stage: None)
