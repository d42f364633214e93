"""OpenVINO's performance counters after every inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asr_core.artifact import Artifact
from runners import openvino
from runners._profile import ENCODE, STEP, WARM_UP, Event, row
from runners.openvino import ENCODER, OpenVINORunner


class Counted:
    """A request that counts its inferences: the counters are means over all of them, in whole microseconds."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._calls = 0
        self._warm: dict[str, float] = {}

    def infer(self) -> None:
        """As the request's."""
        self._request.infer()
        self._calls += 1
        if self._calls == WARM_UP:
            self._warm = {node.node_name: node.real_time.total_seconds() for node in self._request.profiling_info}

    def told(self) -> list[list[Event]]:
        """The mean call after the warm-up, so often."""
        after = self._calls - WARM_UP
        mean = []
        for node in self._request.profiling_info:
            total = node.real_time.total_seconds() * self._calls - self._warm[node.node_name] * WARM_UP
            if total > 0:
                mean.append((node.node_type, node.node_name, total / after))
        return [*([] for _ in range(WARM_UP)), *[row(mean)] * after]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class Runner(OpenVINORunner):
    """The runner over counting requests."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.counted: dict[str, Counted] = {}
        super().__init__(artifact, threads)

    def _open(self, file: Path, threads: int) -> Counted:
        part = ENCODE if file.name == ENCODER else STEP
        self.counted[part] = Counted(openvino.request(file, threads, counters=True))
        return self.counted[part]


class Watched:
    """The runner and what its counters tell."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def told(self) -> dict[str, list[list[Event]]]:
        """Of every call."""
        return {part: counted.told() for part, counted in self.runner.counted.items()}


def open(path: Path, threads: int) -> Watched:
    """Open and verify an artifact folder."""
    return Watched(Runner(Artifact.open(path), threads))
