"""Who does the measuring: this machine, one artifact after another, or a fleet (:mod:`parity.fleet`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from asr_core import isolate, registry
from asr_core.isolate import Outcome
from parity import data
from parity.suite import Level

LOCAL = "local"  # the cluster that this machine is by itself


@dataclass(frozen=True)
class Request:
    """One measurement: the arguments of :func:`parity.measure.measure`."""

    target: str
    path: Path
    work: Path
    folder: Path
    reference: Path | None
    probes: tuple[int, ...]
    threads: int
    max_new_tokens: int | None
    level: Level | None


@dataclass(frozen=True)
class UnitTime:
    """When a worker began and ended one unit of work, in seconds, and how much of that the model took.

    ``utterances`` is 0 for the cases beside them.
    """

    name: str
    worker: str
    began_s: float
    ended_s: float
    own_s: float
    utterances: int


class Measurer(Protocol):
    """What a session asks of whoever measures for it; ``times`` are of the units that it was done in, if it was."""

    times: list[UnitTime]

    def prepare(self, utterances: list[data.Utterance], n_mels: int, work: Path) -> None:
        """Learn what will be heard; raises :class:`~asr_core.errors.AudioError` where the features are made here."""

    def require(self, target: str) -> None:
        """Raise :class:`~asr_core.errors.UnavailableError` where nothing here can run a target."""

    def expect(self, requests: Iterable[Request], timeout: float | None) -> None:
        """Learn what will be asked for next, so that it may begin."""

    def measure(self, request: Request, progress: isolate.Progress, timeout: float | None) -> Outcome:
        """Fill the request's folder, which is there and empty; ``timeout`` is in seconds."""
        ...


class Alone:
    """This machine: one process a measurement, one after another."""

    def __init__(self) -> None:
        self.times: list[UnitTime] = []

    def prepare(self, utterances: list[data.Utterance], n_mels: int, work: Path) -> None:
        """Make the features of all utterances, in ``work``."""
        data.prepare(utterances, n_mels, work)

    def require(self, target: str) -> None:
        """Raise :class:`~asr_core.errors.UnavailableError` where the target's packages are missing."""
        registry.require(target)

    def expect(self, requests: Iterable[Request], timeout: float | None) -> None:
        """Nothing to do: a measurement begins when it is asked for."""

    def measure(self, request: Request, progress: isolate.Progress, timeout: float | None) -> Outcome:
        """Measure in a process of its own."""
        paths = {name: value and str(value) for name, value in vars(request).items() if name in PATHS}
        return isolate.run(
            "parity.measure:measure", asdict(request) | paths, progress=progress, threads=request.threads, timeout=timeout
        )


PATHS = ("path", "work", "folder", "reference")
