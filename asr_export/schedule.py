"""Several exports at a time, as many as cores and memory allow, the longest first.

What an export will take is known from the manifest of an earlier one: of the same checkpoint, or of a smaller or larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from asr_core import artifact
from asr_core.artifact import Manifest
from asr_core.capacity import Cost, parameters
from asr_core.dims import Dims
from asr_core.errors import ArtifactError

# Of an export that nobody measured: its libraries, and the float32 weights as often as the greediest converter holds them.
UNKNOWN = Cost(memory_mb=1500, memory=20, disk=8)
# PyTorch's answers for the check: float32 weights.
ANSWERS = Cost(memory_mb=1200, memory=4.5, disk=0)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Need:
    """What a job takes: seconds (infinite where nobody knows) and peak memory in MB (10⁶ bytes)."""

    seconds: float
    memory_mb: float


@dataclass(frozen=True)
class Task(Generic[Result]):
    """A job and what it needs."""

    need: Need
    do: Callable[[], Result]


def run(tasks: Sequence[Task[Result]], jobs: int, memory_mb: float) -> list[Result]:
    """Do the tasks, at most ``jobs`` at a time, whose memory together stays below ``memory_mb``; results in the tasks' order.

    The longest of those that fit begins first. What needs more than there is runs alone. The first exception is raised when
    all that had begun has ended; nothing new begins after it.
    """
    waiting = sorted(range(len(tasks)), key=lambda index: -tasks[index].need.seconds)
    running: dict[Future[Result], int] = {}
    results: dict[int, Result] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            while len(running) < jobs and (fit := _next(tasks, waiting, running.values(), memory_mb)) is not None:
                waiting.remove(fit)
                running[pool.submit(tasks[fit].do)] = fit
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                results[running.pop(done)] = done.result()
    return [results[index] for index in range(len(tasks))]


def _next(tasks: Sequence[Task[Result]], waiting: Sequence[int], running: Iterable[int], memory_mb: float) -> int | None:
    """The task to begin now; None where none fits beside those that run."""
    used = [tasks[index].need.memory_mb for index in running]
    fitting = (index for index in waiting if not used or sum(used) + tasks[index].need.memory_mb <= memory_mb)
    return next(fitting, None)


def need(name: str, cost: Cost | None, dims: Dims, out: Path) -> Need:
    """What the export ``<target>-<precision>`` of a model of this shape takes, by the earlier ones below ``out``.

    Of models of other shapes, the nearest in size is taken, its memory with what the difference of the weights may take. Where
    there is none, ``cost`` tells, which the exporter knows of itself.
    """
    size, cost = parameters(dims), cost or UNKNOWN
    known = sorted(_manifests(name, out), key=lambda manifest: abs(parameters(manifest.dims) - size))
    if not known:
        return Need(math.inf, cost.memory_of(dims))
    nearest = known[0]
    larger = max(0, size - parameters(nearest.dims)) * cost.memory / 1e6
    return Need(nearest.export_seconds * (size / parameters(nearest.dims)), nearest.export_peak_rss_mb + larger)


def _manifests(name: str, out: Path) -> list[Manifest]:
    found = []
    for folder in sorted(out.glob(f"*/{name}")):
        try:
            found.append(artifact.read_manifest(folder))
        except ArtifactError:
            continue  # nothing is known from it
    return found
