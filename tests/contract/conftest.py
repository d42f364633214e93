"""Fixtures of the contract suite: every target and precision of the carried checkpoint, exported once by the real command."""

from pathlib import Path

import pytest

import reference
from asr_core.checkpoint import Checkpoint
from tests.support import run_command


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    done = run_command("asr-export", "--target", "all", "--jobs", 2, "--out", root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


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
