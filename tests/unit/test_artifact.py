import json
import shutil

import pytest

from asr_core.artifact import MANIFEST, Artifact, read_manifest, seal
from asr_core.errors import ArtifactError


@pytest.fixture
def folder(talkative_artifact, tmp_path):
    """A copy of a good artifact that a test may damage."""
    return shutil.copytree(talkative_artifact.path, tmp_path / "artifact")


def refusal(folder) -> str:
    with pytest.raises(ArtifactError) as raised:
        Artifact.open(folder)
    return str(raised.value)


def test_a_copy_is_as_good(folder, talkative_artifact):
    artifact = Artifact.open(folder)
    assert artifact.manifest == talkative_artifact.manifest
    assert artifact.name == "ctranslate2-fp32"
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    assert artifact.size_mb == pytest.approx(sum(file.stat().st_size for file in files) / 1e6)


def test_seal_is_sha256sum(folder):
    import subprocess

    sealed = {entry.path: entry.sha256 for entry in seal(folder)}
    done = subprocess.run(["sha256sum", *sealed], cwd=folder, capture_output=True, text=True, check=True)
    assert {name: digest for digest, name in map(str.split, done.stdout.splitlines())} == sealed


@pytest.mark.parametrize("name", ["model.bin", "tokenizer.json", "mel_filters.npy"])
def test_a_flipped_bit(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert refusal(folder) == f"{folder / name} was altered since the export (checksum differs). Export again."


def test_a_truncated_file(folder):
    (folder / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:-1])
    assert f"{folder / 'model.bin'} was altered" in refusal(folder)


def test_a_missing_file(folder):
    (folder / "vocabulary.json").unlink()
    assert f"{folder / 'vocabulary.json'} is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["notes.txt", "sub/model.onnx"])
def test_an_added_file(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("new")
    assert f"{folder / name} was not part of the export" in refusal(folder)


def test_no_artifact(tmp_path):
    assert "is not an artifact folder: it holds no asr-export.json" in refusal(tmp_path)
    assert "is not an artifact folder" in refusal(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "is not an artifact folder" in refusal(tmp_path / "file")


def damaged_manifests(text: str) -> dict[str, str]:
    manifest = json.loads(text)
    without_tokens = {key: value for key, value in manifest.items() if key != "tokens"}
    return {
        "cut": text[: len(text) // 2],
        "empty": "",
        "another schema": json.dumps(manifest | {"schema_version": 2}),
        "unknown field": json.dumps(manifest | {"signature": "x"}),
        "missing field": json.dumps(without_tokens),
        "wrong type": json.dumps(manifest | {"files": "all"}),
    }


@pytest.mark.parametrize("kind", ["cut", "empty", "another schema", "unknown field", "missing field", "wrong type"])
def test_a_damaged_manifest(folder, kind):
    (folder / MANIFEST).write_text(damaged_manifests((folder / MANIFEST).read_text())[kind])
    assert f"{folder / MANIFEST} is damaged" in refusal(folder)
    with pytest.raises(ArtifactError):
        read_manifest(folder)


def test_a_manifest_that_is_not_text(folder):
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert "is damaged" in refusal(folder)
