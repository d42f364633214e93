"""The comparison from start to end, and taken up again; PyTorch's variants say what the reference says."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import reference
from asr_core import isolate
from asr_core.errors import UnavailableError
from asr_export.compress import main
from runners import _pytorch_variants as variants
from runners import pytorch


@pytest.fixture
def clips(tmp_path):
    """Manifests to calibrate and to judge on."""
    folder = reference.manifest_path().parent
    entries = [json.loads(line) for line in reference.manifest_path().read_text().splitlines()[30:46]]
    lines = [json.dumps(entry | {"audio_filepath": str(folder / entry["audio_filepath"])}) + "\n" for entry in entries]
    for name, chosen in (("calibrating", lines[:-3]), ("judging", lines[-3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(chosen))
    return ["--data", str(tmp_path / "calibrating.jsonl"), "--judge", str(tmp_path / "judging.jsonl"), "--rounds", "0"]


def test_the_comparison_goes_on_where_it_was(tmp_path, clips, monkeypatch):
    for name, method in (("good", "quantise: {bits: 8, rounding: nearest}"), ("bad", "shrink: {}")):
        (tmp_path / f"{name}.yaml").write_text(f"title: {name}\nsteps:\n  - {method}\n")
    chosen = [part for name in ("good", "bad") for part in ("--recipe", str(tmp_path / f"{name}.yaml"))]
    arguments = ["table", "--out", str(tmp_path / "out"), *clips, *chosen]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    assert "unknown method 'shrink'" in first.stderr
    lines = json.loads((tmp_path / "out" / "table.json").read_text())["lines"]
    assert [line["recipe"] for line in lines] == ["original", "good", "bad"]
    assert lines[1]["identical"] == 1
    assert lines[1]["wer"] == lines[0]["wer"]
    assert 0 < lines[1]["kl"] < 1e-3
    assert abs(lines[0]["kl"]) < 1e-9
    assert lines[1]["size_mb"] == pytest.approx(lines[0]["size_mb"], rel=0.01)
    assert lines[1]["body_mb"] < lines[0]["body_mb"] / 2  # three quarters of it are linear layers, four times smaller now
    assert lines[1]["embedding_mb"] == lines[0]["embedding_mb"]
    table = (tmp_path / "out" / "table.md").read_text()
    monkeypatch.setattr(isolate, "run", lambda *given, **more: pytest.fail("measured again"))
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (tmp_path / "out" / "table.md").read_text() == table


@pytest.fixture(scope="module")
def said():
    """Logits of a clip's first steps, forced."""
    mel = np.random.default_rng(0).standard_normal((1, 80, 3000)).astype(np.float32)

    def logits(runner) -> np.ndarray:
        state = runner.encode(mel)
        prompt = np.array([runner.tokens.prompt()])
        steps = [prompt, np.array([[20]]), np.array([[30]])]
        return np.concatenate([runner.step(tokens, state)[0].copy() for tokens in steps])

    return logits


# Shares of the largest logit. "compiled" is left out: compiling takes minutes of two cores.
ERRORS = {"eager": 1e-5, "bfloat16": 0.03, "dynamic-int8": 0.1, "torchao-int8": 0.03, "torchao-int4": 0.2}


@pytest.mark.parametrize("variant", ERRORS)
def test_variants_say_what_the_reference_says(variant, trained, said):
    expected, got = said(pytorch.open(trained.path, 1)), said(variants.open(trained.path, 1, variant))
    assert np.abs(got - expected).max() <= ERRORS[variant] * np.abs(expected).max()
    assert np.abs(got - expected).max() > 0


def test_half_of_the_pruned_variant_is_zero_but_for_the_head(trained):
    model = variants.open(trained.path, 1, "pruned").model
    layers = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    zeros = {name: float((weight == 0).float().mean()) for name, weight in layers.items()}
    assert zeros.pop("proj_out") < 0.01
    assert set(zeros.values()) == {0.5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_variants_are_unavailable(trained):
    with pytest.raises(UnavailableError, match="no GPU"):
        variants.open(trained.path, 1, "compiled-gpu")
