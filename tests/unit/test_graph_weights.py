"""Compact forms: read lazily, refused where they don't fit, and in the graph in place of the dense weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import WhisperForConditionalGeneration

from asr_core import build, graph
from asr_core.checkpoint import Checkpoint
from asr_core.compressed import RECORD, SIDE
from asr_core.errors import CheckpointError
from asr_export.export import announce
from compressors import base, folder
from compressors.model import Form, Model

FACTORED = "model.decoder.layers.1.fc1.weight"
CODED = "model.encoder.layers.0.self_attn.out_proj.weight"
NARROW = "model.encoder.layers.1.self_attn"
SILENT = "model.decoder.layers.0.self_attn"
WIDTH = 64  # of a head of the carried checkpoint


@pytest.fixture(scope="module")
def compressed(trained, tmp_path_factory) -> Checkpoint:
    """The carried checkpoint with factors (some of them integers), integers, and attentions that lost their first head."""
    model = Model.open(trained)
    for method, given in (
        ("lowrank", {"criterion": "svd", "rank": 32, "only": ["*.decoder.*.fc?.weight"]}),
        ("quantise", {"bits": 4, "group": 32, "rounding": "nearest", "only": ["*.encoder.*", "*.decoder.layers.0.fc1.weight"]}),
    ):
        model = base.method(method).apply(model, base.parameters(method, given), None, lambda stage: None).model
    for attention in (NARROW, SILENT):
        model = without_first_head(model, attention)
    return folder.write(tmp_path_factory.mktemp("compressed") / "small", trained, model, [], [], None)[0]


def without_first_head(model: Model, attention: str) -> Model:
    kept = torch.arange(WIDTH, 2 * WIDTH)
    tensors, forms = {}, {}
    for name in [name for name in model.tensors if name.startswith(f"{attention}.") and not name.endswith("out_proj.bias")]:
        columns = name.endswith("out_proj.weight")
        tensors[name] = model.tensors[name].clone()
        (tensors[name].T if columns else tensors[name])[:WIDTH] = 0
        if name.endswith("weight"):
            parts = dict(model.form(name).parts)
            if "codes" in parts:
                parts["codes"] = (parts["codes"] * (tensors[name] != 0)).char()
            forms[name] = Form(parts | {"kept_columns" if columns else "kept_rows": kept}, model.form(name).bits)
    return model.changed(tensors, forms)


@pytest.fixture
def damaged(compressed, tmp_path) -> Path:
    return shutil.copytree(compressed.path, tmp_path / "damaged")


def test_an_ordinary_checkpoint_has_its_own_tensors_and_no_forms(trained):
    assert trained.forms.names == []
    assert trained.graph_weights.names == trained.weights.names
    assert build.notices(trained, "ctranslate2", "fp32") == []
    assert trained.graph_weights.integers(CODED) is None


def test_the_graph_is_smaller_and_says_the_same(compressed):
    weights = compressed.graph_weights
    encoder, decoder = graph.encoder(compressed), graph.decoder(compressed)
    state = {name: weights.read(name) for name in weights.names}
    graph.load_weights(encoder, graph.ENCODER, state)
    graph.load_weights(decoder, graph.DECODER, state)
    assert decoder.blocks[1].fc1.right.weight.shape == (32, 128)
    assert encoder.layers[1].self_attn.q_proj.weight.shape == (WIDTH, 128)
    assert encoder.layers[1].self_attn.out_proj.weight.shape == (128, WIDTH)
    mel, tokens = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0)), torch.tensor([[1096, 5, 7]])
    theirs = WhisperForConditionalGeneration.from_pretrained(compressed.path).eval()
    with torch.inference_mode():
        found = theirs(mel, decoder_input_ids=tokens)
        states, *cross = graph.EncodeWithCross(encoder.eval(), decoder.eval())(mel)
        past = [torch.zeros(0, 1, 2, WIDTH)] * 4
        logits = graph.DynamicStep(decoder, [(1, 0)])(tokens, torch.arange(tokens.shape[1]), past, cross)[0]
    torch.testing.assert_close(states, found.encoder_last_hidden_state, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, found.logits, atol=2e-4, rtol=0)


def test_the_graph_is_made_without_memory(compressed):
    fresh = Checkpoint.open(compressed.path)
    with torch.device("meta"):
        encoder = graph.encoder(fresh)
    assert encoder.layers[1].self_attn.q_proj.weight.shape == (WIDTH, 128)
    fresh = Checkpoint.open(compressed.path)
    with FakeTensorMode():
        decoder = graph.decoder(fresh)
    assert decoder.blocks[1].fc1.left.weight.shape == (512, 32)


def test_every_tensor_of_the_graph_has_its_own_integers(compressed):
    weights = compressed.graph_weights
    found = {name: weights.integers(name) for name in weights.names}
    coded = {name: integers for name, integers in found.items() if integers}
    assert {f"{NARROW}.out_proj.weight", f"{NARROW}.q_proj.weight", CODED} < coded.keys()
    assert {f"model.decoder.layers.0.fc1.{side}.weight" for side in ("left", "right")} < coded.keys()
    for name, integers in coded.items():
        group = integers.codes.shape[1] // integers.scales.shape[1]
        meant = integers.codes.numpy() * np.repeat(integers.scales.numpy(), group, 1)
        assert meant.shape == weights.shape(name)
        np.testing.assert_array_equal(meant, weights.read(name).numpy())


def test_who_does_not_carry_a_form_says_so(compressed):
    said = build.notices(compressed, "ctranslate2", "int8")
    assert [notice.split(" (")[0] for notice in said] == [
        "low-rank weights",
        "heads that were removed from attentions",
        "heads that were removed from the decoder's attentions",
        "weights of 4-bit or smaller codes",
    ]
    assert [notice.split(" (")[0] for notice in build.notices(compressed, "onnx", "int4")] == [said[2].split(" (")[0]]


def test_notices_are_said_once_for_all_who_have_them(compressed, capsys):
    announce(compressed, [("onnx", "fp32"), ("onnx", "int4"), ("ctranslate2", "fp32"), ("ctranslate2", "fp16")])
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Note: heads that were removed from the decoder's attentions (1) are stored and computed as zeros")
    merged = [line for line in said if line.startswith("Note: low-rank weights (4) are stored multiplied out")]
    assert [line.rpartition(" in ")[2] for line in merged] == ["ctranslate2-fp32, ctranslate2-fp16."]


def test_the_fingerprint_covers_the_forms(compressed, damaged):
    side = load_file(damaged / SIDE)
    side[f"{FACTORED}/left"] *= 2
    side[f"{FACTORED}/right"] /= 2
    resave(damaged, side)
    other = Checkpoint.open(damaged)
    assert other.fingerprint != compressed.fingerprint
    assert build.build_key(other, "onnx", "fp32") != build.build_key(compressed, "onnx", "fp32")
    assert other.forms.read(FACTORED).keys() == {"left", "right"}


def resave(path: Path, side: dict[str, torch.Tensor]) -> None:
    """Another side file, and its checksum in the record."""
    import hashlib

    save_file(side, path / SIDE)
    record = json.loads((path / RECORD).read_text())
    record["side_sha256"] = hashlib.sha256((path / SIDE).read_bytes()).hexdigest()
    (path / RECORD).write_text(json.dumps(record))


def lose(side: dict[str, torch.Tensor]) -> None:
    del side[f"{FACTORED}/left"]


def add(side: dict[str, torch.Tensor]) -> None:
    side["model.encoder.conv1.weight/codes"] = torch.zeros(1, dtype=torch.int8)


def cut(side: dict[str, torch.Tensor]) -> None:
    side[f"{CODED}/scales"] = side[f"{CODED}/scales"][:, :3].contiguous()


def widen(side: dict[str, torch.Tensor]) -> None:
    side[f"{CODED}/codes"] = side[f"{CODED}/codes"].float()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose, f"lacks {FACTORED}/left"),
        (add, r"holds model.encoder.conv1.weight/codes, which compression\.json does not know"),
        (cut, rf"{CODED}/scales is F32 \[128, 3\], not float32 \[1, 1\]"),
        (widen, rf"{CODED}/codes is F32 \[128, 128\], not int8 \[N, K\]"),
    ],
)
def test_forms_that_do_not_fit_are_refused(damaged, damage: Callable[[dict[str, torch.Tensor]], None], said):
    side = load_file(damaged / SIDE)
    damage(side)
    resave(damaged, side)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(damaged)


def test_an_altered_side_file_is_refused(damaged):
    content = bytearray((damaged / SIDE).read_bytes())
    content[-1] ^= 1
    (damaged / SIDE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"compression\.safetensors was altered since it was written"):
        Checkpoint.open(damaged)


def test_a_side_file_without_its_record_is_refused(damaged):
    (damaged / RECORD).unlink()
    with pytest.raises(CheckpointError, match=r"has no compression\.json that says what it is"):
        Checkpoint.open(damaged)


def test_forms_do_not_outlive_their_weights(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights[FACTORED] += 0.01
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"the form of {FACTORED} \(left, right\) does not stand for its weights"):
        Checkpoint.open(damaged).graph_weights.read(f"{FACTORED.removesuffix('.weight')}.left.weight")
