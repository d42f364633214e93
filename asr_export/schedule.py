"""Several exports at a time, as many as cores and memory allow, the longest first.

What an export will take is known from the manifest of an earlier one: of the same checkpoint, or of a smaller or larger one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from asr_core import artifact
from asr_core.artifact import Manifest
from asr_core.dims import Dims, expected_shapes
from asr_core.errors import ArtifactError

# Of an export that nobody measured: its libraries, and the float32 weights as often as the greediest converter holds them.
LIBRARIES_MB = 1500.0
COPIES = 5
BYTES = 4
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


def need(name: str, dims: Dims, out: Path) -> Need:
    """What the export ``<target>-<precision>`` of a model of this shape takes, by the earlier ones below ``out``.

    Of models of other shapes, the nearest in size is taken, its memory with what the difference of the weights may take.
    """
    size = _parameters(dims)
    known = sorted(_manifests(name, out), key=lambda manifest: abs(_parameters(manifest.dims) - size))
    if not known:
        return Need(math.inf, LIBRARIES_MB + _weights_mb(size))
    nearest = known[0]
    larger = max(0, size - _parameters(nearest.dims))
    return Need(nearest.export_seconds * size / _parameters(nearest.dims), nearest.export_peak_rss_mb + _weights_mb(larger))


def available_mb() -> float:
    """Memory that this machine can give without swapping, in MB (10⁶ bytes); all that it has where it doesn't tell."""
    information = Path("/proc/meminfo")
    if information.exists():
        line = next(line for line in information.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024 / 1e6
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6


def _manifests(name: str, out: Path) -> list[Manifest]:
    found = []
    for folder in sorted(out.glob(f"*/{name}")):
        try:
            found.append(artifact.read_manifest(folder))
        except ArtifactError:
            continue  # nothing is known from it
    return found


def _parameters(dims: Dims) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(dims).values())


def _weights_mb(parameters: int) -> float:
    return COPIES * BYTES * parameters / 1e6
