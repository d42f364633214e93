"""PyTorch's own profiler."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asr_core.checkpoint import Checkpoint
from asr_core.decode import Logits, Mel
from runners._profile import ENCODE, STEP, Event
from runners.pytorch import PyTorchRunner, State

MICROSECOND = 1e-6


MARK = "asr:"  # how the names begin that tell our calls apart from what torch does in them


class Runner(PyTorchRunner):
    """The reference, whose calls are marked in the profile."""

    def encode(self, mel: Mel) -> State:
        """As the reference's."""
        with torch.profiler.record_function(f"{MARK}{ENCODE}"):
            return super().encode(mel)

    def step(self, tokens: NDArray[np.int64], state: State) -> Logits:
        """As the reference's."""
        with torch.profiler.record_function(f"{MARK}{STEP}"):
            return super().step(tokens, state)


class Watched:
    """The runner, and one profile from now on."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._profiler: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profiler.start()

    def told(self) -> dict[str, list[list[Event]]]:
        """Of every call."""
        self._profiler.stop()
        told = sorted(self._profiler.events(), key=lambda event: event.time_range.start)
        marks = [event for event in told if event.name.startswith(MARK)]
        starts = [event.time_range.start for event in told]
        calls: dict[str, list[list[Event]]] = {ENCODE: [], STEP: []}
        for mark in marks:
            within = told[bisect_left(starts, mark.time_range.start) : bisect_right(starts, mark.time_range.end)]
            ops = [_event(event, mark.time_range.start) for event in within if event is not mark]
            calls[mark.name.removeprefix(MARK)].append(ops)
        return calls


def _event(event: Any, first: float) -> Event:
    span = event.time_range
    return Event(
        kind=event.name,
        name=event.name,
        start=(span.start - first) * MICROSECOND,
        seconds=span.elapsed_us() * MICROSECOND,
        own=event.self_cpu_time_total * MICROSECOND,
    )


def open(path: Path, threads: int) -> Watched:
    """Open a checkpoint folder."""
    return Watched(Runner(Checkpoint.open(path), threads))
