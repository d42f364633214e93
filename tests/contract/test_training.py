"""Methods that train, on the carried checkpoint: what they write, their control, and a run that was killed."""

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import WhisperForConditionalGeneration

import reference
from asr_core import compressed
from asr_core.checkpoint import Checkpoint
from asr_core.dims import EMBEDDING
from asr_export.compress import main
from compressors import base, calibration, run, training
from compressors.calibration import Calibration
from compressors.divergence import mean_kl
from compressors.model import Model
from compressors.recipe import Planned
from parity import data


@pytest.fixture(scope="module")
def clips() -> list[data.Utterance]:
    """Six short clips, spread over the set."""
    short = sorted(data.read(reference.manifest_path()), key=lambda clip: (len(clip.text), clip.id))[10:40]
    return short[::5]


def _entry(clip: data.Utterance) -> str:
    return json.dumps({"audio_filepath": str(clip.path), "text": clip.text, "lang": clip.language})


@pytest.fixture(scope="module")
def manifest(clips, tmp_path_factory):
    file = tmp_path_factory.mktemp("clips") / "clips.jsonl"
    file.write_text("".join(_entry(clip) + "\n" for clip in clips[:2]))
    return file


def plan(method: str, **given: object) -> list[Planned]:
    return [Planned(method, base.parameters(method, {"steps": 1, "batch": 1} | given))]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("finetune", {}),
        ("gradual", {"sparsity": 0.5, "rounds": 2, "criterion": "magnitude", "scope": "global"}),
        ("qat", {"bits": 2, "embedding": True}),
        ("distil", {"decoder": 1, "keep": "last"}),
    ],
)
def test_plain_transformers_reads_what_was_trained(method, given, trained, clips, manifest, tmp_path):
    made = run.run(trained, plan(method, data=str(manifest), **given), clips[2:4], tmp_path / "out")
    plain, info = WhisperForConditionalGeneration.from_pretrained(made.checkpoint.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(made.record.calibration) == 1  # the clip of each first step
    if method == "qat":
        weight = plain.model.decoder.layers[0].fc1.weight
        assert all(len(row.abs().unique()) <= 2 for row in weight)  # zero, and one magnitude a row
        assert made.record.forms["model.decoder.layers.0.fc1.weight"].bits == 2
    if method == "gradual":
        weights = [plain.state_dict()[name] for name in made.record.forms]
        assert sum(int((weight == 0).sum()) for weight in weights) == sum(weight.numel() for weight in weights) // 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing of the training is left


def test_ternary_weights_are_trained_nearer_than_they_are_rounded(trained, tmp_path):
    """The decoder with its embedding, ternary: half the KL of rounding to the nearest, and of GPTQ, on clips unseen by all."""
    english = [clip for clip in data.read(reference.manifest_path()) if clip.language == "en" and clip.text]
    short = sorted(english, key=lambda clip: (len(clip.text), clip.id))[10:58]
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(_entry(clip) + "\n" for clip in short[::2]))
    heard, held_out = (calibration.windows(trained, clips) for clips in (short[:20:2], short[1:25:4]))
    model = Model.open(trained)

    def divergence(method: str, **given: object) -> float:
        seen = Calibration(lambda: heard, trained)
        seen.work = tmp_path / method
        wanted = base.parameters(method, {"bits": 2, "only": ["model.decoder.*"], "embedding": True} | given)
        made = base.method(method).apply(model, wanted, seen, lambda stage: None).model
        assert not torch.equal(made.tensors[EMBEDDING], model.tensors[EMBEDDING])
        return mean_kl(model, made, held_out, seen.seen)

    # At twice the rate, differences of 1e-6 in the features decide where it ends.
    learned = divergence("qat", data=str(manifest), steps=120, rate=1e-3)
    assert 2 * learned < divergence("quantise", rounding="nearest")
    assert 2 * learned < divergence("quantise", rounding="gptq")


def test_the_control_trains_without_compressing(trained):
    given = {"steps": 5, "bits": 2, "rate": 1e-3}
    (control,) = run.controls(trained, [Planned("prune", base.parameters("prune", {"sparsity": 0.5})), *plan("qat", **given)])
    assert control.method == "finetune"
    assert (control.parameters.steps, control.parameters.rate) == (5, 1e-3)
    (control,) = run.controls(trained, plan("distil", decoder=1))
    assert control.parameters.decoder == trained.dims.decoder_layers


def test_a_recipe_without_training_has_no_control(tmp_path):
    done = CliRunner().invoke(main, ["--method", "smooth", "--out", str(tmp_path / "a"), "--control", str(tmp_path / "b")])
    assert done.exit_code == 2
    assert "a control is for steps that train" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on(trained, clips, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)
    steps = plan("finetune", data=str(manifest), steps=3)

    def killed(stage: str) -> None:
        if "step 2 of 3" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(trained, steps, clips[2:4], tmp_path / "out", killed)
    assert [path.name for path in tmp_path.iterdir()] == ["out.training"]
    told: list[str] = []
    made = run.run(trained, steps, clips[2:4], tmp_path / "out", told.append)
    assert "finetune: goes on from step 1 of 3" in told
    assert len(made.record.calibration) == 2  # both clips, though one was heard before the kill


def test_broken_gradients_leave_a_good_checkpoint(shape_folder, manifest, tmp_path, monkeypatch):
    """The last good model is an ordinary checkpoint."""
    learn = training._learn

    def broken(state: training.Run, trained: object, loss: object, schedule: object) -> bool:
        return learn(state, trained, loss * (float("nan") if state.step else 1.0), schedule)

    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(training, "_learn", broken)
    out = tmp_path / "out"
    given = ["-p", f"data={manifest}", "-p", "steps=3", "-p", "batch=1"]
    model = str(shape_folder("mini"))
    done = CliRunner().invoke(main, ["--model", model, "--method", "finetune", *given, "--out", str(out)])
    assert done.exit_code == 7
    assert "finetune: the gradients of step 2 are not finite" in done.stderr
    assert "as it was after step 1" in done.stderr
    assert not out.exists()
    (good,) = tmp_path.rglob("last-good")
    assert [step.method for step in compressed.read(good).chain] == ["finetune"]
    assert Checkpoint.open(good).dims == Checkpoint.open(model).dims
