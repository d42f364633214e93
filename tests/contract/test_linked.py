"""``--link``: graphs of kilobytes over the checkpoint's own weight files, which nothing changes."""

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from asr_core.artifact import Artifact
from asr_core.decode import DecodeOptions
from asr_core.errors import ArtifactError, ExportError, StorageError
from asr_export.export import main
from reference import shapes
from runners.base import open_runner

TARGET = "onnx.linked"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return shapes.write_sharded(shapes.SHAPES["mini"], tmp_path_factory.mktemp("own") / "sharded", "float16", shard_mb=3)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_the_carried_checkpoint_passes_the_check(trained, tmp_path):
    before = digests(trained.path)
    done = CliRunner().invoke(main, ["--target", "onnx", "--link", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    artifact = Artifact.open(tmp_path / trained.name / f"{TARGET}-fp32")
    assert all((artifact.path / f"{name}.onnx").stat().st_size < 100_000 for name in ("encoder", "decoder"))
    assert artifact.manifest.alignment_heads == trained.alignment_heads
    (weights,) = artifact.path.glob("*.safetensors")
    assert weights.samefile(trained.path / weights.name)
    assert digests(trained.path) == before


def test_shards_of_halves_are_linked_and_decoded(sharded, export_here):
    linked, copied = export_here(sharded, TARGET, "fp16"), export_here(sharded, "onnx", "fp16")
    model = onnx.load(linked.path / "decoder.onnx", load_external_data=False)
    files = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert len(files) > 1
    assert files <= {file.name for file in sharded.glob("model-*.safetensors")}
    mel = np.random.default_rng(0).normal(size=(1, 80, 3000)).astype(np.float32)
    ours, theirs = (open_runner(name, folder.path, 1) for name, folder in ((TARGET, linked), ("onnx", copied)))
    options = DecodeOptions(max_new_tokens=12)
    assert [one.tokens for one in ours.generate(mel, options)] == [one.tokens for one in theirs.generate(mel, options)]


def test_a_changed_checkpoint_is_a_changed_artifact(tmp_path, export_here):
    folder = shapes.write_sharded(shapes.SHAPES["mini"], tmp_path / "own")
    linked = export_here(folder, TARGET, "fp32").path
    with next(folder.glob("model-*.safetensors")).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")
    with pytest.raises(ArtifactError, match="was altered"):
        Artifact.open(linked)


def test_what_is_not_stored_so_cannot_be_linked(sharded, export_here):
    with pytest.raises(ExportError, match="are fp16: linked, they can't be fp32"):
        export_here(sharded, TARGET, "fp32")


def test_another_file_system_is_refused_by_name(sharded, export_here, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(StorageError, match=r"cannot link .*safetensors into .*cross-device.*--out"):
        export_here(sharded, TARGET, "fp16")


def test_link_and_layout_exclude_each_other():
    done = CliRunner().invoke(main, ["--target", "onnx", "--link", "--layout", "optimum"])
    assert done.exit_code == 2
    assert "--layout" in done.output
