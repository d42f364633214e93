"""A backend that dies, hangs or babbles costs its own row, never the run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asr_core import artifact
from asr_core.artifact import MANIFEST

# What each planted runner does when it is asked for the encoder states; the rest of it is a healthy one.
DEEDS = {
    "segfault": "import ctypes; print('about to read nothing', file=sys.stderr, flush=True); ctypes.string_at(0)",
    "hang": "import time; print('waiting', file=sys.stderr, flush=True); time.sleep(1000)",
    "outofmemory": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",  # what the kernel does to it
    "garbage": "print('\\x1b[31m\\x00{not json', file=sys.stderr); sys.stdout.buffer.write(bytes(range(256)) * 1000)",
}
RUNNER = """
import sys
from runners import onnx

class Planted(onnx.OnnxRunner):
    def encode(self, mel):
        {deed}
        return super().encode(mel)

def open(path, threads):
    return Planted(onnx.Artifact.open(path), threads)
"""
# A hang is found out after these seconds instead of minutes.
IMPATIENCE = {"PATIENCE = 30": "PATIENCE = 1", "LEAST_TIMEOUT_S = 300.0": "LEAST_TIMEOUT_S = 20.0"}


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project with the planted runners."""
    source, copy = Path(__file__).parents[2], tmp_path / "project"
    for package in ("asr_core", "asr_export", "exporters", "parity", "reference", "runners"):
        shutil.copytree(source / package, copy / package)
    for name, deed in DEEDS.items():
        (copy / f"runners/{name}.py").write_text(RUNNER.format(deed=deed))
    session = copy / "parity/session.py"
    text = session.read_text()
    for patient, impatient in IMPATIENCE.items():
        assert patient in text
        text = text.replace(patient, impatient)
    session.write_text(text)
    return copy


@pytest.fixture
def planted(artifacts, tmp_path) -> Path:
    """One healthy artifact, and the same one under the name of each planted target."""
    healthy = artifacts / "reference" / "onnx-fp32"
    shutil.copytree(healthy, tmp_path / "planted/onnx-fp32")
    for name in DEEDS:
        folder = shutil.copytree(healthy, tmp_path / f"planted/{name}-fp32")
        manifest = artifact.read_manifest(folder).model_copy(update={"target": name})
        (folder / MANIFEST).write_text(manifest.model_dump_json())
    return tmp_path / "planted"


def test_each_costs_its_own_row(project, planted, few_clips, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-P", "-c", "from asr_export.parity import main; main()", "--artifacts", str(planted)]
    done = subprocess.run(
        [*command, "--data", str(few_clips), "--json", str(report)],
        capture_output=True,
        check=False,
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project), "COLUMNS": "250"},
    )
    assert done.returncode == 1, done.stderr
    rows = {row["target"]: row for row in json.loads(report.read_text())["rows"]}
    assert {name: rows[name]["status"] for name in ("pytorch", "onnx", *DEEDS)} == {
        "pytorch": "pass",
        "onnx": "pass",
        "segfault": "crashed",
        "hang": "timeout",
        "outofmemory": "crashed",
        "garbage": "pass",  # what it printed is not what it answered
    }
    assert "SIGSEGV" in rows["segfault"]["reason"]
    assert "about to read nothing" in rows["segfault"]["reason"]
    assert "waiting" in rows["hang"]["reason"]
    assert "SIGKILL" in rows["outofmemory"]["reason"]
    assert b"Traceback" not in done.stderr
