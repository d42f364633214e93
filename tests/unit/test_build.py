import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asr_core import build
from asr_core.artifact import MANIFEST, Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.errors import CheckpointError, StorageError, UsageError

DEAD = 2**22 + 1  # beyond Linux's largest process id


@pytest.fixture(scope="module")
def checkpoint(talkative) -> Checkpoint:
    return Checkpoint.open(talkative)


@pytest.fixture
def final(talkative_artifact, tmp_path) -> Path:
    """A good artifact under its final name."""
    return shutil.copytree(talkative_artifact.path, tmp_path / "ctranslate2-fp32")


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def test_the_manifest_says_what_was_made(talkative_artifact, checkpoint):
    manifest = talkative_artifact.manifest
    assert (manifest.target, manifest.precision, manifest.checkpoint) == ("ctranslate2", "fp32", "mini")
    assert (manifest.fingerprint, manifest.dims) == (checkpoint.fingerprint, checkpoint.dims)
    assert manifest.build_key == build.build_key(checkpoint, "ctranslate2", "fp32")
    assert {"asr-export", "ctranslate2", "torch"} <= manifest.tools.keys()
    assert manifest.export_seconds > 0
    assert manifest.export_peak_rss_mb > 50
    bundle = {"tokenizer.json", "generation_config.json", "preprocessor_config.json", "mel_filters.npy"}
    assert bundle <= {entry.path for entry in manifest.files}


def test_up_to_date(checkpoint, final, shape_folder):
    assert build.up_to_date(checkpoint, "ctranslate2", "fp32", final)
    assert not build.up_to_date(checkpoint, "ctranslate2", "int8", final)
    assert not build.up_to_date(Checkpoint.open(shape_folder("mini")), "ctranslate2", "fp32", final)
    assert not build.up_to_date(checkpoint, "ctranslate2", "fp32", final.parent / "absent")
    (final / "model.bin").write_bytes(b"")
    assert not build.up_to_date(checkpoint, "ctranslate2", "fp32", final)


def test_new_tools_are_another_build(checkpoint, final, monkeypatch):
    monkeypatch.setattr(build, "tool_versions", lambda target: {target: "999"})
    assert not build.up_to_date(checkpoint, "ctranslate2", "fp32", final)


def test_unknown_precision(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="ctranslate2 has no precision 'int2'; it has: fp32, fp16, int8"):
        build.stage(checkpoint, "ctranslate2", "int2", tmp_path / "x")


@pytest.mark.parametrize("place", ["file/ctranslate2-fp32", "file/deeper/ctranslate2-fp32"])
def test_a_place_that_cannot_be_written(checkpoint, tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=rf"cannot write to {(tmp_path / place).parent}"):
        build.stage(checkpoint, "ctranslate2", "fp32", tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(checkpoint, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        build.stage(checkpoint, "ctranslate2", "fp32", tmp_path / "ctranslate2-fp32")


def test_converters_get_absolute_paths(checkpoint, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build.isolate, "run", lambda function, arguments, **rest: asked.update(arguments))
    monkeypatch.setattr(build.isolate, "result_or_raise", lambda outcome, what: None)
    build.stage(checkpoint, "ctranslate2", "fp32", Path("out") / "artifact")
    assert Path(asked["folder"]).parent == tmp_path / "out"


def test_a_failed_export_leaves_nothing(talkative, final, tmp_path):
    """The checkpoint is damaged after it was opened; the older artifact stays good."""
    damaged = shutil.copytree(talkative, tmp_path / "damaged")
    checkpoint = Checkpoint.open(damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        build.stage(checkpoint, "ctranslate2", "fp32", final)
    assert hidden(tmp_path) == []
    Artifact.open(final)


STAGE = """
import sys
from pathlib import Path
from asr_core import build
from asr_core.checkpoint import Checkpoint
checkpoint = Checkpoint.open(sys.argv[1])
build.stage(checkpoint, "ctranslate2", "fp32", Path(sys.argv[2]), lambda stage: print(stage, flush=True)).publish()
"""


def test_a_killed_export_leaves_no_artifact_and_the_next_one_cleans_up(talkative, tmp_path):
    final = tmp_path / "out" / "ctranslate2-fp32"
    command = [sys.executable, "-c", STAGE, str(talkative), str(final)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "convert\n":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not final.exists()
    assert len(hidden(final.parent)) == 1
    subprocess.run(command, check=True, capture_output=True)
    Artifact.open(final)
    assert [path.name for path in final.parent.iterdir()] == [final.name]
    assert build.up_to_date(Checkpoint.open(talkative), "ctranslate2", "fp32", final)


def test_publish_replaces_an_older_artifact_and_an_older_failure(final, tmp_path):
    staged = tmp_path / ".ctranslate2-fp32.partial-1"
    shutil.copytree(final, staged)
    (final / "old").write_text("")
    failed = tmp_path / "ctranslate2-fp32.failed"
    failed.mkdir()
    artifact = build.Staged(staged, final).publish()
    assert artifact.path == final
    Artifact.open(final)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ctranslate2-fp32"]


def test_quarantine_keeps_the_older_artifact(final, tmp_path):
    staged = tmp_path / ".ctranslate2-fp32.partial-1"
    shutil.copytree(final, staged)
    failed = build.Staged(staged, final).quarantine("tokens differ")
    assert failed == tmp_path / "ctranslate2-fp32.failed"
    assert (failed / "FAILED.txt").read_text() == "tokens differ\n"
    assert (failed / MANIFEST).exists()
    Artifact.open(final)


def test_clean_removes_only_what_the_dead_left(final, tmp_path):
    mine = tmp_path / f".{final.name}.partial-{DEAD}"
    living = tmp_path / f".{final.name}.partial-{os.getppid()}"
    other = tmp_path / f".onnx-fp32.partial-{DEAD}"
    for folder in (mine, living, other):
        folder.mkdir()
    build.clean(final)
    assert hidden(tmp_path) == sorted([living.name, other.name])


def test_clean_brings_back_what_was_being_replaced(final, tmp_path):
    final.rename(tmp_path / f".{final.name}.replaced-{DEAD}")
    build.clean(final)
    Artifact.open(final)
    assert hidden(tmp_path) == []


def test_clean_forgets_what_was_replaced(final, tmp_path):
    shutil.copytree(final, tmp_path / f".{final.name}.replaced-{DEAD}")
    build.clean(final)
    Artifact.open(final)
    assert hidden(tmp_path) == []
