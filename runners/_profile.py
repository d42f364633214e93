"""Where a runtime's time goes, operation by operation, in its own words; a runtime without a profiler has no module here."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from asr_core import registry
from asr_core.audio import WINDOW_FRAMES
from asr_core.decode import Mel
from asr_core.dims import Dims
from asr_core.tokens import TokenIds

ENCODE, STEP = "encode", "step"
WARM_UP = 2  # calls of each kind that are not counted: allocations and lazy compilation


@dataclass(frozen=True)
class Event:
    """One operation of a call: its kind, its name in the graph, and seconds.

    ``start`` is from the beginning of the call; ``own`` leaves out the operations within it.
    """

    kind: str
    name: str
    start: float
    seconds: float
    own: float


@dataclass(frozen=True)
class Call:
    """One encoding of a window or one decode step of one token: seconds as the caller sees them, and what the runtime told."""

    part: str
    start: float
    seconds: float
    events: Sequence[Event]


class Stepping(Protocol):
    """What is profiled: a step runner, or what does its work."""

    dims: Dims
    tokens: TokenIds

    def encode(self, mel: Mel) -> Any:
        """Float32 [1, n_mels, 3000] → a state."""

    def step(self, tokens: NDArray[np.int64], state: Any) -> Any:
        """One token, int64 [1, 1]."""


class Profiled(Protocol):
    """A runner whose runtime is profiled."""

    @property
    def runner(self) -> Stepping:
        """What to run."""
        ...

    def told(self) -> dict[str, list[list[Event]]]:
        """The events of every call so far, in order, by part; ends the profiling."""


def row(kinds: Sequence[tuple[str, str, float]]) -> list[Event]:
    """Events of (kind, name, seconds) one after the other, for a runtime that does not tell when they began."""
    events, start = [], 0.0
    for kind, name, seconds in kinds:
        events.append(Event(kind, name, start, seconds, seconds))
        start += seconds
    return events


def open_profiled(target: str, path: Path, threads: int) -> Profiled | None:
    """Open an artifact (or, for ``pytorch``, a checkpoint) with its runtime's profiler; None where there is none."""
    registry.require(target)
    module = f"runners._profile_{target.replace(registry.LAYOUT, '_')}"
    if importlib.util.find_spec(module) is None:
        return None
    return cast("Profiled", importlib.import_module(module).open(path, threads))


def profile(profiled: Profiled, windows: int, steps: int) -> list[Call]:
    """Encode noise and decode forced tokens one by one, so often after a warm-up."""
    generator = np.random.default_rng(0)
    runner = profiled.runner
    mel = generator.standard_normal((1, runner.dims.n_mels, WINDOW_FRAMES)).astype(np.float32)
    spent: dict[str, list[tuple[float, float]]] = {ENCODE: [], STEP: []}
    for _ in range(WARM_UP + windows):
        begun = time.perf_counter()
        state = runner.encode(mel)
        spent[ENCODE].append((begun, time.perf_counter() - begun))
    for token in generator.integers(0, runner.tokens.end, WARM_UP + steps):
        begun = time.perf_counter()
        runner.step(np.array([[token]], np.int64), state)
        spent[STEP].append((begun, time.perf_counter() - begun))
    told = profiled.told()
    return [
        Call(part, begun, seconds, events)
        for part, times in spent.items()
        for (begun, seconds), events in list(zip(times, told[part], strict=True))[WARM_UP:]
    ]
