"""PyTorch's own noise on the carried reference, the bounds made of it, and a set that is too small to tell."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import reference
from asr_core import artifact
from asr_core.artifact import MANIFEST
from parity import data, measure, weights
from parity.session import Session
from tests.support import run_command

CLIPS = 4


def manifest(entries: list[dict], folder: Path) -> Path:
    """A NeMo manifest of some of the carried clips."""
    clips = reference.manifest_path().parent
    lines = [json.dumps(entry | {"audio_filepath": str(clips / entry["audio_filepath"])}) for entry in entries]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


def entries() -> list[dict]:
    return [json.loads(line) for line in reference.manifest_path().read_text().splitlines()]


@pytest.fixture(scope="module")
def exported(copies) -> Path:
    return copies("onnx-fp32") / "reference" / "onnx-fp32"


@pytest.fixture(scope="module")
def session(checkpoint, tmp_path_factory) -> Session:
    every = data.read(reference.manifest_path())
    prepared = Session(checkpoint, every[5 :: len(every) // CLIPS][:CLIPS], tmp_path_factory.mktemp("work"), threads=1)
    assert prepared.prepare().status == "pass"
    return prepared


def test_every_kind_of_noise_is_measured_and_grows_with_coarser_numbers(session):
    noise = {one.kind: one for one in session.calibration.noise}
    assert set(noise) == {"threads", "batch", "order", "fp16-weights", "fp16", "bf16-weights"}
    assert not any(one.reason for one in noise.values())
    for figure in ("encoder_error", "logits_error"):
        size = {kind: getattr(one, figure) for kind, one in noise.items()}
        assert max(size["threads"], size["batch"], size["order"]) < size["fp16-weights"] < size["bf16-weights"]
        assert size["fp16-weights"] < size["fp16"]
        assert 0 < size["order"] < 1e-5  # float32 rounding is 6e-8, and some tens of operators follow each other
        assert size["bf16-weights"] < 0.1  # eight bits of every weight


def test_bounds_follow_the_noise(session):
    single, half, coarse = (session.bounds(precision) for precision in ("fp32", "fp16-stateful", "int8"))
    assert single["encoder_error"]["max"] < 1e-4 < half["encoder_error"]["max"] < 0.1
    assert single["near_tie"]["max"] < half["near_tie"]["max"] < coarse["near_tie"]["max"]
    assert "encoder_error" not in coarse
    document = json.loads(json.dumps(session.context, allow_nan=False))
    assert document["calibration"]["bounds"]["fp32"]["logits_error"]["max"] == single["logits_error"]["max"]
    assert document["policy"]["search"] == "greedy"
    assert document["policy"]["max_new_tokens"] == 224
    assert len(document["policy"]["suppress_tokens"]) > 1


def test_margins_are_those_of_transformers_scores(session, checkpoint):
    import torch
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    mels = np.load(session.work / data.MELS)
    for mel, row, utterance in zip(mels, measure.read_decoded(session.reference), session.utterances, strict=True):
        out = model.generate(
            torch.from_numpy(mel[None]), language=utterance.language, task="transcribe", max_new_tokens=224, num_beams=1,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        best = [torch.topk(scores[0], 2).values for scores in out.scores]
        theirs = [float(first - second) for first, second in best]
        assert len(row["margins"]) == len(row["tokens"]) + 1
        assert row["margins"] == pytest.approx(theirs, abs=1e-4)  # float32 logits in another order


def test_a_healthy_artifact_passes_under_the_derived_bounds(session, exported):
    row = session.judge(exported)
    assert (row.status, row.reason) == ("pass", "")
    assert row.encoder_snr_db > 100  # float32 has 24 bits: 144 dB for one rounding
    assert 0 <= row.logits_kl_mean <= row.logits_kl_max < 1e-8
    positions = weights.load_positions(session.work / "onnx-fp32")
    assert len(positions) == CLIPS
    for index, probe in positions.items():
        assert len(probe.kl) == len(measure.read_decoded(session.reference)[index]["tokens"]) + 1
        assert len(probe.encoder_max_abs) == 1500


def test_one_weight_in_half_precision_is_no_float32(session, exported, tmp_path):
    """A fault far too small for tokens to show."""
    folder = shutil.copytree(exported, tmp_path / "onnx-fp32")
    weights_of_encoder = next(file for file in folder.iterdir() if file.name.startswith("encoder") and file.suffix == ".data")
    values = np.fromfile(weights_of_encoder, np.float32)
    largest = np.abs(values).argmax()
    values[largest : largest + 128 * 128] = values[largest : largest + 128 * 128].astype(np.float16)
    values.tofile(weights_of_encoder)
    sealed = artifact.read_manifest(folder).model_copy(update={"files": artifact.seal(folder)})
    (folder / MANIFEST).write_text(sealed.model_dump_json())
    row = session.judge(folder)
    assert (row.status, row.token_match) == ("fail", 1.0)
    assert "PyTorch's own noise" in row.reason


def test_ten_utterances_with_a_wrong_word_are_undecided(exported, tmp_path):
    """The words of two tokens are swapped in the artifact's tokenizer: right tokens, one wrong word among ten sentences."""
    folder = shutil.copytree(exported, tmp_path / "reference" / "onnx-fp32")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    chosen = [entry for entry in entries() if 4 <= len(entry["text"].split()) <= 8][:10]
    said = [word for entry in chosen for word in set(entry["text"].split()[1:])]
    once = next(word for word in said if said.count(word) == 1 and f"Ġ{word}" in vocab)
    other = next(word for word in vocab if word.startswith("Ġ") and len(word) > 4 and word[1:] not in said)
    vocab[f"Ġ{once}"], vocab[other] = vocab[other], vocab[f"Ġ{once}"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    sealed = artifact.read_manifest(folder).model_copy(update={"files": artifact.seal(folder)})
    (folder / MANIFEST).write_text(sealed.model_dump_json())
    done = run_command(
        "asr-parity", "--artifacts", folder.parent, "--data", manifest(chosen, tmp_path), "--json", tmp_path / "report.json"
    )
    assert done.returncode == 10, done.stdout + done.stderr
    assert "utterances would tell" in done.stdout.replace("\n", " ")
    row = json.loads((tmp_path / "report.json").read_text())["rows"][1]
    assert (row["status"], row["breaks"]) == ("undecided", 0)
    assert row["delta_wer_interval"][0] <= 0 < row["delta_wer"] < row["delta_wer_interval"][1]
    assert row["utterances_needed"] > 10
    assert row["no_worse_share"] == 0.9
