"""ONNX Runtime's profile of both sessions, which it writes to files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort

from asr_core.artifact import Artifact
from runners._profile import ENCODE, STEP, Event
from runners.onnx import PROVIDERS, OnnxRunner, session_options

MICROSECOND = 1e-6
KERNEL = "_kernel_time"


class Runner(OnnxRunner):
    """The runner over sessions that write profiles."""

    def __init__(self, artifact: Artifact, threads: int, folder: str) -> None:
        self._profiles = folder
        super().__init__(artifact, threads)

    def end(self) -> dict[str, Path]:
        """The sessions' profiles by part."""
        return {part: Path(session.end_profiling()) for part, session in ((ENCODE, self._encoder), (STEP, self._decoder))}

    def _open(self, model: Path, threads: int) -> Any:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = f"{self._profiles}/{model.stem}"
        return ort.InferenceSession(str(model), options, providers=PROVIDERS)


class Watched:
    """The runner and what its sessions' profiles tell."""

    def __init__(self, path: Path, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="asr-profile-")
        self.runner = Runner(Artifact.open(path), threads, self._folder.name)

    def told(self) -> dict[str, list[list[Event]]]:
        """Of every call."""
        calls = {part: _calls(json.loads(file.read_text(encoding="utf-8"))) for part, file in self.runner.end().items()}
        self._folder.cleanup()
        return calls


def _calls(written: list[dict[str, Any]]) -> list[list[Event]]:
    """The operations of each run of a session; its own entries enclose them."""
    runs = sorted((entry["ts"], entry["dur"]) for entry in written if entry["name"] == "model_run")
    nodes = sorted((entry for entry in written if entry["name"].endswith(KERNEL)), key=lambda entry: entry["ts"])
    return [[_event(node, start) for node in nodes if start <= node["ts"] < start + length] for start, length in runs]


def _event(node: dict[str, Any], start: float) -> Event:
    seconds = node["dur"] * MICROSECOND
    begun = (node["ts"] - start) * MICROSECOND
    return Event(node["args"]["op_name"], node["name"].removesuffix(KERNEL), begun, seconds, seconds)


def open(path: Path, threads: int) -> Watched:
    """Open and verify an artifact folder."""
    return Watched(path, threads)
