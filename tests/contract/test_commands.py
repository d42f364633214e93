"""The commands as a user meets them: verdicts, exit codes, one clear sentence, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reference
from asr_core import artifact, registry
from asr_core.artifact import MANIFEST, Artifact
from tests.support import run_command

ROW_KEYS = (
    "target precision decoder status reason encoder_max_abs logits_max_abs top1_agreement token_match first_divergence wer "
    "delta_wer cer rtfx latency_p50_s latency_p95_s ttft_s tokens_per_s load_s peak_rss_mb size_mb speedup"
).split()


def reseal(folder: Path) -> None:
    """Make a changed artifact look untouched, as a careless tool would."""
    manifest = artifact.read_manifest(folder).model_copy(update={"files": artifact.seal(folder)})
    (folder / MANIFEST).write_text(manifest.model_dump_json())


@pytest.fixture
def copied(artifacts, tmp_path) -> Path:
    """A private copy of one artifact that a test may damage."""
    source = artifacts / "reference" / "onnx-fp32"
    shutil.copytree(source, tmp_path / "reference" / source.name)
    return tmp_path / "reference" / source.name


def test_everything_passes_on_the_carried_checkpoint(artifacts, few_clips, tmp_path):
    report = tmp_path / "report.json"
    done = run_command("asr-parity", "--artifacts", artifacts, "--data", few_clips, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(report.read_text())
    assert content["schema"] == 1
    assert content["data"]["utterances"] == 8
    assert all(set(ROW_KEYS) <= row.keys() for row in content["rows"])
    rows = {(row["target"], row["precision"]): row for row in content["rows"]}
    assert {target for target, _ in rows} == {"pytorch", *registry.names("exporters")}
    for (target, precision), row in rows.items():
        assert row["status"] == "pass", (target, row["reason"])
        if precision == "fp32":
            assert row["token_match"] == 1
            assert row["encoder_max_abs"] <= 1e-4
            assert row["logits_max_abs"] is None or row["logits_max_abs"] <= 1e-4
        assert f"{target}-{precision}" in done.stdout


def test_a_zeroed_matrix_is_caught_and_named(copied, few_clips):
    weights = max((file for file in copied.iterdir() if "decoder" in file.name), key=lambda file: file.stat().st_size)
    data = bytearray(weights.read_bytes())
    middle = len(data) // 2 // 4 * 4
    data[middle : middle + 4 * 128 * 128] = bytes(4 * 128 * 128)
    weights.write_bytes(data)
    reseal(copied)
    done = run_command("asr-parity", "--artifacts", copied.parent, "--data", few_clips)
    assert done.returncode == 1
    assert "onnx-fp32 fail" in done.stdout
    assert "logits_error" in done.stdout


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_file_is_named(copied, few_clips, damage):
    victim = next(file for file in sorted(copied.iterdir()) if "encoder" in file.name)
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim.unlink()
    clip = next((Path(__file__).parents[2] / "reference" / "clips").glob("*.flac"))
    for done in (
        run_command("asr-parity", "--artifacts", copied.parent, "--data", few_clips),
        run_command("asr-transcribe", clip, "--artifact", copied),
    ):
        assert done.returncode in {1, 6}
        assert victim.name in (done.stdout + done.stderr).replace("\n", "")
        assert "Traceback" not in done.stderr


def test_nothing_changed_means_nothing_exported(artifacts):
    before = {folder: folder.stat().st_mtime_ns for folder in (artifacts / "reference").iterdir()}
    done = run_command("asr-export", "--target", "all", "--out", artifacts)
    assert done.returncode == 0
    assert done.stdout.count("up to date") == len(before)
    assert before == {folder: folder.stat().st_mtime_ns for folder in (artifacts / "reference").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--target", "nonsense"], 2, "onnx"),
        (["--target", "onnx", "--precision", "int3"], 2, "int8"),
        (["--target", "onnx", "--model", "does/not/exist"], 4, "no such folder"),
        (["--target", "onnx", "--out", "/dev/null/artifacts"], 9, "/dev/null"),
    ],
)
def test_wrong_use_ends_in_a_sentence(arguments, code, says):
    done = run_command("asr-export", *arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_no_artifacts_is_an_error_that_says_how_to_make_them(tmp_path):
    done = run_command("asr-parity", "--artifacts", tmp_path)
    assert done.returncode == 6
    assert "asr-export" in done.stderr


PLANTED_EXPORTER = '''
"""An exporter with a fault: it halves one weight of the decoder."""
from exporters import onnx

PRECISIONS = ("fp32",)
CARRIES = {}

def export(checkpoint, folder, precision, progress):
    state = checkpoint.weights.read
    name = "model.decoder.layers.0.fc2.weight"
    checkpoint.weights.read = lambda wanted: state(wanted) * (0.5 if wanted == name else 1)
    return onnx.export(checkpoint, folder, precision, progress)
'''
PLANTED_RUNNER = "from runners.onnx import open  # noqa: A004\n"


@pytest.fixture
def planted(tmp_path) -> dict[str, str]:
    """A copy of the project with a backend added as its two files; the environment that runs it."""
    project = Path(__file__).parents[2]
    for package in ("asr_core", "asr_export", "exporters", "parity", "reference", "runners"):
        shutil.copytree(project / package, tmp_path / "project" / package)
    (tmp_path / "project/exporters/planted.py").write_text(PLANTED_EXPORTER)
    (tmp_path / "project/runners/planted.py").write_text(PLANTED_RUNNER)
    return os.environ | {"PYTHONPATH": str(tmp_path / "project"), "COLUMNS": "250"}


def test_a_bad_export_is_quarantined(planted, tmp_path):
    command = [
        sys.executable,
        "-P",
        "-c",
        "from asr_export.export import main; main()",
        "--target",
        "planted",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=planted, cwd=tmp_path / "project", check=False)
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "out/reference/planted-fp32").exists()
    reason = (tmp_path / "out/reference/planted-fp32.failed/FAILED.txt").read_text()
    assert "logits_error" in reason
    assert "quarantined" in done.stderr


def test_help_needs_no_runtime():
    for command in ("asr-export", "asr-parity", "asr-transcribe", "asr-bench"):
        modules = subprocess.run(
            [sys.executable, "-X", "importtime", Path(sys.executable).with_name(command), "--help"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        imported = {line.rpartition("|")[2].strip() for line in modules.splitlines()}
        assert not imported & {"torch", "transformers", "numpy", "onnx", "onnxruntime", "openvino", "ctranslate2", "av"}


def test_artifact_opens_where_it_was_moved_to(copied):
    assert Artifact.open(copied).name == "onnx-fp32"
    assert np.load(copied / "mel_filters.npy").shape == (80, 201)


@pytest.mark.parametrize("arguments", [["asr_export.export", "--target", "onnx"], ["asr_export.parity"]])
def test_a_light_install_is_told_what_to_install(arguments):
    """As after `pip install asr-export[onnx]`: no torch, no transformers, no safetensors."""
    hidden = "import importlib.metadata as m; real = m.version\n"
    hidden += "def version(name):\n"
    hidden += "    if name in {'torch', 'transformers', 'safetensors'}: raise m.PackageNotFoundError(name)\n"
    hidden += "    return real(name)\n"
    hidden += f"m.version = version; from {arguments[0]} import main; main({arguments[1:]!r})"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "pip install 'asr-export[" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_is_transcribed_with_words_side_by_side(artifacts, tmp_path):
    """What a user of long recordings asks for, with openai-whisper's defaults: beams, fallback, timestamps, language."""
    manifest = reference.manifest_path()
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    clips = [manifest.with_name(entry["audio_filepath"]) for entry in entries if entry["text"]][:2]
    talks = tmp_path / "talks"
    talks.mkdir()
    for clip in clips:
        shutil.copy(clip, talks)
    (talks / "notes.txt").write_text("not audio")
    options = ("--artifact", artifacts / "reference" / "onnx-fp32", "--threads", 1, "--output-dir", tmp_path / "out")
    done = run_command("asr-transcribe", talks, *options, "--format", "all", "--word-timestamps", "--batch-size", 2)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for clip in clips:
        content = json.loads((tmp_path / "out" / f"{clip.stem}.json").read_text())
        words = [word for segment in content["segments"] for word in segment["words"]]
        assert "".join(word["word"] for word in words) == content["text"] != ""
        assert all(word["start"] <= word["end"] <= content["duration_s"] + 0.02 for word in words)
        assert (tmp_path / "out" / f"{clip.stem}.srt").read_text().startswith("1\n00:00:0")
    again = run_command("asr-transcribe", talks, *options, "--format", "srt", "--word-timestamps", "--batch-size", 2)
    assert (again.returncode, again.stderr.count("up to date")) == (0, 2)
