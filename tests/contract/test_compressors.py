"""Compression of the carried checkpoint: the order of methods by KL, what is written, and what plain transformers makes of it."""

import json
import wave
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

import reference
from asr_core import compressed
from asr_core.checkpoint import Checkpoint
from asr_core.dims import EMBEDDING
from asr_core.errors import AudioError, CheckpointError, UsageError
from asr_export.compress import main
from compressors import base, calibration, divergence, folder
from compressors.calibration import Calibration, Window
from compressors.divergence import mean_kl
from compressors.model import Model
from parity import data
from reference import make_clips

CALIBRATING, JUDGING, FEW = 54, 22, 6


@pytest.fixture(scope="module")
def calibrating(trained, tmp_path_factory) -> list[Window]:
    """Clips of the training's speakers and sentences."""
    folder = tmp_path_factory.mktemp("calibrating")
    make_clips.write(folder, held_out=False)
    return calibration.windows(trained, calibration.halves(data.read(folder / "manifest.jsonl"), CALIBRATING)[0])


@pytest.fixture(scope="module")
def model(trained) -> Model:
    return Model.open(trained)


@pytest.fixture(scope="module")
def heard(calibrating) -> Calibration:
    return Calibration(lambda: calibrating)


@pytest.fixture(scope="module")
def few(calibrating) -> Calibration:
    """Enough where it does not matter how well a method does."""
    return Calibration(lambda: calibrating[:FEW])


@pytest.fixture(scope="module")
def held_out(trained) -> list[Window]:
    return calibration.windows(trained, calibration.halves(data.read(reference.manifest_path()), JUDGING)[0])


@pytest.fixture(scope="module")
def applied(model, few) -> Callable[..., base.Applied]:
    def apply(method: str, onto: Model | None = None, **given: object) -> base.Applied:
        return base.method(method).apply(onto or model, base.parameters(method, given), few, lambda stage: None)

    return apply


@pytest.fixture(scope="module")
def kl(model, heard, held_out) -> Callable[..., float]:
    """The mean divergence of a method's model; the original is heard once."""
    wanted = divergence.predictions(model, held_out)

    def measure(method: str, **given: object) -> float:
        made = base.method(method).apply(model, base.parameters(method, given), heard, lambda stage: None)
        return divergence.mean(wanted, divergence.predictions(made.model, held_out))

    return measure


# --- the order of methods


@pytest.mark.parametrize(
    ("method", "common", "better", "worse"),
    [
        ("quantise", {"bits": 4}, {"rounding": "gptq"}, {"rounding": "nearest"}),
        ("quantise", {"bits": 3}, {"rounding": "gptq"}, {"rounding": "nearest"}),
        ("lowrank", {"share": 0.5}, {"criterion": "whitened"}, {"criterion": "svd"}),
        ("lowrank", {"share": 0.25}, {"criterion": "whitened"}, {"criterion": "svd"}),
        ("lowrank", {"share": 0.25}, {"criterion": "pca"}, {"criterion": "svd"}),
        ("prune", {"sparsity": 0.5}, {"criterion": "sparsegpt"}, {"criterion": "magnitude"}),
        ("prune", {"sparsity": 0.7}, {"criterion": "sparsegpt"}, {"criterion": "magnitude"}),
        ("ffn", {"share": 0.5}, {"refit": True}, {"refit": False}),
    ],
)
def test_the_aware_method_is_twice_as_near(kl, method, common, better, worse):
    assert kl(method, **common, **better) <= kl(method, **common, **worse) / 2


def test_smoothing_changes_nothing_to_hear(kl):
    assert kl("smooth") < 1e-8


def test_clips_of_the_calibration_do_not_judge(model, few, held_out):
    with pytest.raises(UsageError, match=f"{FEW} of the {FEW + 1} clips were used to calibrate"):
        mean_kl(model, model, [*few.windows, held_out[0]], few.seen)


# --- what is written


STEPS = {
    "quantise": {"bits": 4, "group": 32, "embedding": True},
    "prune": {"sparsity": 0.5},
    "lowrank": {"share": 0.25, "criterion": "pca"},
    "cluster": {"centroids": 16, "embedding": True},
    "ffn": {"share": 0.5},
    "heads": {"remove": 2},
    "layers": {"encoder": [1], "decoder": [0]},
    "smooth": {},
    "static": {"observer": "entropy"},
}


TRAINED = {"distil", "finetune", "gradual", "qat"}  # in test_training.py


def test_every_method_is_tried():
    assert STEPS.keys() | TRAINED == set(base.names())


@pytest.mark.parametrize("method", STEPS)
def test_plain_transformers_reads_it(method, trained, applied, few, held_out, tmp_path):
    """No key is missing or unexpected, and the numbers are those of the method's own model."""
    made = applied(method, **STEPS[method])
    checkpoint, record = folder.write(tmp_path / "out", trained, made.model, [], few.seen, None)
    plain, info = WhisperForConditionalGeneration.from_pretrained(checkpoint.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    dense = replace(made.model, forms={})  # ranges of inputs are for runtimes: transformers has nothing for them
    theirs, ours = (calibration.logits(module, held_out[0]) for module in (plain.eval(), dense.module()))
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert compressed.read(checkpoint.path) == record


def rebuilt(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense weight that the parts of a form stand for, by their descriptions alone."""

    def integers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (codes.view(len(scales), scales.shape[1], -1) * scales[..., None]).view_as(codes)

    if "left_codes" in parts:
        left, right = (integers(parts[f"{side}_codes"], parts[f"{side}_scales"]) for side in ("left", "right"))
        return left @ right
    if "left" in parts:
        return parts["left"] @ parts["right"]
    if "codes" in parts:
        return integers(parts["codes"], parts["scales"])
    centroids = parts["centroids"].expand(len(parts["indices"]), -1)
    return centroids.gather(1, parts["indices"].long())


@pytest.mark.parametrize(
    "chain",
    [
        [("quantise", {"bits": 4, "group": 32, "embedding": True})],
        [("cluster", {"centroids": 16, "scope": "channel"})],
        [("lowrank", {"share": 0.25}), ("quantise", {"bits": 8, "group": 16})],
        [("heads", {"remove": 1}), ("prune", {"sparsity": 0.5}), ("quantise", {"bits": 4})],
        [("prune", {"sparsity": 0.5}), ("cluster", {"centroids": 16})],
        [("lowrank", {"share": 0.25, "only": ["*.fc?.weight"]}), ("static", {})],
    ],
)
def test_the_side_file_stands_for_the_weights(chain, trained, model, applied, tmp_path):
    last = model
    for method, given in chain:
        last = applied(method, onto=last, **given).model
    checkpoint, record = folder.write(tmp_path / "out", trained, last, [], [], None)
    stored = load_file(checkpoint.path / "model.safetensors")
    assert record.forms
    for name in record.forms:
        parts = checkpoint.forms.read(name)
        assert parts.keys() <= compressed.PARTS.keys()
        assert torch.allclose(rebuilt(parts), stored[name], atol=1e-6)
        if "mask" in parts:
            assert not stored[name][~parts["mask"]].any()
    assert Model.open(checkpoint).size == last.size == record.after


def test_layers_take_their_alignment_heads_along(applied, model):
    old = model.generation["alignment_heads"]
    assert {layer for layer, _ in old} <= {0, 1}
    made = applied("layers", encoder=[0], decoder=[0]).model
    upper = [[0, head] for layer, head in old if layer == 1]
    assert made.generation["alignment_heads"] == (upper or [[0, 0], [0, 1]])
    assert [made.config[key] for key in ("encoder_layers", "num_hidden_layers", "decoder_layers")] == [2, 2, 1]
    kept = "model.decoder.layers.1.fc1.weight"
    assert torch.equal(made.tensors["model.decoder.layers.0.fc1.weight"], model.tensors[kept])


def test_silenced_heads_leave_the_alignment(applied):
    made = applied("heads", remove=3)
    silenced = {name for name, form in made.model.forms.items() if "kept_columns" in form.parts}
    assert len(silenced) == 3  # two heads each: one of them can go
    assert made.model.generation["alignment_heads"]
    for name in silenced:
        assert (made.model.tensors[name].abs().amax(0) == 0).sum() == 64


# --- the command


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_recipe_from_start_to_end(tmp_path, trained):
    before = {file.name: file.read_bytes() for file in trained.path.iterdir()}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n  - prune: {sparsity: 0.3}\n  - quantise:\n      bits: 8\n      embedding: true\n")
    manifest, judging = tmp_path / "clips.jsonl", tmp_path / "judging.jsonl"
    entries = [json.loads(line) for line in reference.manifest_path().read_text().splitlines()[30:48]]
    clips = reference.manifest_path().parent
    lines = [json.dumps(entry | {"audio_filepath": str(clips / entry["audio_filepath"])}) + "\n" for entry in entries]
    manifest.write_text("".join(lines[:-2]))
    judging.write_text("".join(lines[-2:]))
    result = run("--recipe", recipe, "--data", manifest, "--out", tmp_path / "small", "--threads", 1)
    assert result.exit_code == 0, result.output
    record = compressed.read(tmp_path / "small")
    assert [step.method for step in record.chain] == ["prune", "quantise"]
    assert record.parent_fingerprint == trained.fingerprint
    assert len(record.calibration) == 8
    assert record.before.embedding_bytes / record.after.embedding_bytes > 3.5
    assert 0 < record.kl < 0.1
    assert {effect.tensor for effect in record.chain[1].effects} > {EMBEDDING}
    assert f"{record.kl:.2g} nats a token" in result.stdout
    again = run(
        *("--model", tmp_path / "small", "--method", "smooth"),
        *("--data", manifest, "--judge", judging, "--out", tmp_path / "x"),
    )
    assert again.exit_code == 0, again.output
    both = compressed.read(tmp_path / "x")
    assert len(both.calibration) == 16
    assert 0 < both.kl < 0.1
    chain = both.chain
    assert [step.method for step in chain] == ["prune", "quantise", "smooth"]
    assert chain[2].parent == Checkpoint.open(tmp_path / "small").fingerprint
    assert {file.name: file.read_bytes() for file in trained.path.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clips.jsonl", "judging.jsonl", "recipe.yaml", "small", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "unknown method 'magic'; the known ones: cluster, distil, ffn,"),
        (["--method", "prune", "-p", "sparsity=1"], "prune: sparsity: input should be less than 1."),
        (["--method", "prune", "-p", "sparsity=-0.1"], "sparsity: input should be greater than or equal to 0."),
        (["--method", "prune"], "prune: sparsity: field required."),
        (
            ["--method", "prune", "-p", "sparsity=.5", "-p", "criterion=wanda", "-p", "scope=global"],
            "global is for magnitude only",
        ),
        (["--method", "quantise", "-p", "bit=4"], "bit: extra inputs are not permitted. Its parameters: only, bits, scale,"),
        (["--method", "quantise", "-p", "bits"], "'bits' is not KEY=VALUE"),
        (["--method", "quantise", "-p", "bits=[4"], "the value of 'bits=[4' cannot be read"),
        (["--method", "quantise", "-p", "group=48", "-p", "rounding=nearest"], "group 48 does not divide the rows of 128"),
        (["--method", "quantise", "-p", "group=24", "-p", "rounding=nearest"], "group: input should be a multiple of 16"),
        (["--method", "lowrank", "-p", "rank=129", "-p", "criterion=svd"], "rank 129 is above that of model.encoder.layers.0."),
        (["--method", "lowrank"], "give exactly one of rank, share, energy, budget"),
        (["--method", "layers", "-p", "decoder=[7]"], "the decoder has no layer 7"),
        (["--method", "layers", "-p", "decoder=[0, 1]"], "nothing would be left of the decoder's 2 layers"),
        (["--method", "cluster", "-p", "scope=channel"], "256 centroids for rows of 128 weights save nothing"),
        (["--method", "cluster", "-p", "only=['*.fc3.weight']"], "no linear layer's weight matches '*.fc3.weight'"),
        ([], "give either --method with its -p KEY=VALUE, or --recipe."),
    ],
)
def test_what_cannot_be_done_is_said(arguments, message, tmp_path):
    result = run(*arguments, "--out", tmp_path / "out")
    assert (result.exit_code, result.exception.__class__) == (2, SystemExit)
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps:\n  - quantise: {bits: 8}\n  - shrink: {}\n", "line 3: unknown method 'shrink'"),
        ("steps:\n  - prune:\n      sparsity: 2\n", "line 2: prune: sparsity: input should be less than 1."),
        ("steps:\n  - prune: 0.5\n", "line 2: the parameters of prune are 0.5"),
        ("steps:\n  - {prune: {}, quantise: {}}\n", "line 2: a step is one METHOD"),
        ("steps: [\n", "is not YAML"),
        ("steps: []\n", "has no steps"),
        ("", "has no steps"),
    ],
)
def test_a_faulty_recipe_tells_its_line(text, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    result = run("--recipe", recipe, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr


def test_nothing_is_overwritten(tmp_path):
    result = run("--method", "smooth", "--out", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path} exists already" in result.stderr


@pytest.mark.parametrize(("seconds", "loudness", "sound"), [(3, 0.3, "3.0"), (20, 0.0, "0.0")])
def test_too_little_sound_to_calibrate_on(seconds, loudness, sound, tmp_path):
    samples = np.random.default_rng(0).uniform(-loudness, loudness, seconds * 16000)
    with wave.open(str(tmp_path / "clip.wav"), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(16000)
        stream.writeframes((samples * 32767).astype("<i2").tobytes())
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text(json.dumps({"audio_filepath": "clip.wav", "text": ""}) + "\n")
    result = run("--method", "static", "--data", manifest, "--judge", reference.manifest_path(), "--out", tmp_path / "out")
    assert (result.exit_code, result.exception.__class__) == (AudioError.exit_code, SystemExit)
    assert f"the 1 calibration clips hold {sound} s of sound above -60 dB; at least 10 s are needed" in result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.wav", "clips.jsonl"]


def test_a_missing_side_file_is_named(trained, applied, tmp_path):
    checkpoint, _ = folder.write(tmp_path / "out", trained, applied("quantise", rounding="nearest").model, [], [], None)
    (checkpoint.path / compressed.SIDE).unlink()
    with pytest.raises(CheckpointError, match=r"compression\.safetensors is not a complete safetensors file"):
        Model.open(checkpoint)


def test_a_failed_write_leaves_nothing(trained, model, tmp_path):
    broken = model.changed({EMBEDDING: model.tensors[EMBEDDING] * float("nan")}, {})
    with pytest.raises(CheckpointError, match="holds NaN"):
        folder.write(tmp_path / "out", trained, broken, [], [], None)
    assert not list(tmp_path.iterdir())
