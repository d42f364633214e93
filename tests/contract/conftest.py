"""Fixtures of the contract suite: every target and precision of the carried checkpoint, exported once by the real command."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import reference
from asr_core.checkpoint import Checkpoint
from tests.support import run_command


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist's workers have folders of their own side by side: whoever comes first exports for all.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root = shared / "all-artifacts"
    with FileLock(shared / "all-artifacts.lock"):
        if not root.exists():
            done = run_command("asr-export", "--target", "all", "--jobs", 2, "--out", root)
            assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope="session")
def copies(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A root of its own with copies of some artifacts, which a test may judge and damage as if it had exported them."""

    def root_of(*names: str) -> Path:
        root = tmp_path_factory.mktemp("copies")
        for name in names:
            shutil.copytree(artifacts / "reference" / name, root / "reference" / name)
        return root

    return root_of


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("reference")


@pytest.fixture(scope="session")
def few_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NeMo manifest of eight carried clips, spread over the set."""
    lines = reference.manifest_path().read_text().splitlines()
    chosen = lines[:: len(lines) // 8][:8]
    folder = reference.manifest_path().parent
    manifest = tmp_path_factory.mktemp("clips") / "manifest.jsonl"
    manifest.write_text("\n".join(line.replace('"audio_filepath": "', f'"audio_filepath": "{folder}/') for line in chosen))
    return manifest
