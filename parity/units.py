"""The units of work that a fleet shares out: one artifact and one shard of the utterances, or the cases beside them.

A worker process keeps one model open at a time, in a process of its own (as on one machine: one runtime a process, and what
kills it does not kill the worker), for as long as its units ask for the same one. A unit's results are one file in the share.
"""

from __future__ import annotations

import json
import platform
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from asr_core import errors, isolate
from asr_core.errors import UsageError
from asr_core.isolate import Outcome
from parity import resume
from parity.share import Share
from parity.suite import Level

ANSWER = "outcome.json"
MEASURE = "parity.measure:measure_part"
PREPARE = "parity.data:prepare_collected"
# A window takes about this long for every parameter on one thread of a server, encoder and a sentence of decoding.
PARAMETER_S = 1e-8
UNIT_S = 30.0


@dataclass(frozen=True)
class Unit:
    """One share of an artifact's measurement: what :func:`parity.measure.measure_part` needs.

    ``result`` is the file that it makes in the share, ``model`` and ``inputs`` (features) are folders published there;
    ``recordings`` is the one that the inputs are made from, with ``n_mels`` bins, where no unit did it before; None where they
    are there. ``timeout`` is in seconds. ``code`` is the version of the sources that all of a run's figures come from.
    """

    name: str
    result: str
    target: str
    model: str
    inputs: str
    recordings: str | None
    n_mels: int
    probes: tuple[int, ...]
    forced: tuple[tuple[int, ...], ...] | None
    threads: int
    max_new_tokens: int | None
    level: Level | None
    timeout: float | None
    code: str


class _Kept:
    """The process in which a worker's present model is open; its units take turns."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.unit = ""
        self._key: tuple[str, int] | None = None
        self._process: isolate.Process | None = None

    def process(self, model: str, threads: int) -> isolate.Process:
        if self._process is None or self._process.ended or self._key != (model, threads):
            self.close()
            self._process, self._key = isolate.Process(threads), (model, threads)
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None

    def end(self) -> None:
        """Kill the process, whoever is waiting for it."""
        if self._process is not None:
            self._process.end()


_kept = _Kept()


def run(unit: Unit, address: str, begun: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Do a unit's work where its result isn't there yet; returns its outcome as a dictionary.

    An outcome that is not ``ok`` leaves no result: the next attempt begins anew, with a new process. ``begun`` is called when
    it is this unit's turn.
    """
    if unit.code != _code():
        what = f"worker {platform.node()} has other sources of asr-export than this run. Install the same version there."
        return _answer(Outcome("error", {}, what, 0.0, UsageError(what)))
    with _kept.lock, tempfile.TemporaryDirectory(prefix="asr-export-unit-") as scratch:
        _kept.unit = unit.name
        begun()
        share = Share(address, _cache(address))
        if (known := finished(share, unit.result)) is not None:
            return known
        outcome = _measure(unit, share, scratch)
        answer = _answer(outcome)
        if outcome.status == "ok":
            _store(share, unit.result, Path(scratch), answer)
        else:
            _kept.close()
        _kept.unit = ""
        return answer


def _measure(unit: Unit, share: Share, folder: str) -> Outcome:
    model = str(share.fetch(unit.model))
    process = _kept.process(model, unit.threads)
    made = _make_inputs(unit, share, process)
    if made.status != "ok":
        return made
    with share.borrow(unit.inputs) as inputs:
        arguments = {
            "target": unit.target,
            "path": model,
            "work": str(inputs),
            "folder": folder,
            "probes": unit.probes,
            "forced": unit.forced,
            "threads": unit.threads,
            "max_new_tokens": unit.max_new_tokens,
            "level": unit.level,
        }
        outcome = process.call(MEASURE, arguments, timeout=unit.timeout)
    return replace(outcome, seconds=made.seconds + outcome.seconds, own_s=made.own_s + outcome.own_s)


def _make_inputs(unit: Unit, share: Share, process: isolate.Process) -> Outcome:
    """Make a shard's features once for all: other machines round otherwise, and every artifact must hear what PyTorch heard."""
    if unit.recordings is None or share.published(unit.inputs):
        return Outcome("ok", {}, "", 0.0)
    with share.borrow(unit.recordings) as recordings, tempfile.TemporaryDirectory(prefix="asr-export-features-") as folder:
        arguments = {"collected": str(recordings), "n_mels": unit.n_mels, "folder": folder}
        outcome = process.call(PREPARE, arguments, timeout=unit.timeout)
        if outcome.status == "ok":
            share.publish(Path(folder), unit.inputs)
    return outcome


def abandon(name: str | None = None) -> None:
    """End this worker's open model if it works on the unit of that name; without one, whatever it is doing."""
    if name in {None, _kept.unit}:
        _kept.end()


def outcome_of(answer: dict[str, Any]) -> Outcome:
    """The outcome that :func:`run` returned as a dictionary."""
    kind, message = answer["error"] or ("", "")
    return Outcome(**answer | {"error": getattr(errors, kind)(message) if kind else None})


def _answer(outcome: Outcome) -> dict[str, Any]:
    error = outcome.error and [type(outcome.error).__name__, str(outcome.error)]
    return vars(outcome) | {"error": error}


@cache
def _code() -> str:
    return resume.code_version()


def _cache(address: str) -> Path:
    """What this worker process fetched from a share; it goes with the machine's temporary files."""
    if address not in _caches:
        _caches[address] = tempfile.TemporaryDirectory(prefix="asr-export-share-")
    return Path(_caches[address].name)


_caches: dict[str, tempfile.TemporaryDirectory[str]] = {}


def _store(share: Share, result: str, scratch: Path, answer: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="asr-export-unit-") as folder:
        packed = Path(folder) / "result.zip"
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(scratch.iterdir()):
                archive.write(file, file.name)
            archive.writestr(ANSWER, json.dumps(answer))
        share.put(packed, result)


def finished(share: Share, result: str) -> dict[str, Any] | None:
    """The outcome of a unit whose result is in the share; None where it is not, or not readable."""
    if not share.exists(result):
        return None
    with tempfile.TemporaryDirectory(prefix="asr-export-unit-") as folder:
        try:
            return unpack(share, result, Path(folder))
        except (OSError, zipfile.BadZipFile):
            return None


def unpack(share: Share, result: str, folder: Path) -> dict[str, Any]:
    """Put a result's files into a folder; returns its outcome."""
    packed = folder / "result.zip"
    share.get(result, packed)
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(folder)
    packed.unlink()
    answer: dict[str, Any] = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    (folder / ANSWER).unlink()
    return answer


def size(parameters: int) -> int:
    """Utterances that make about half a minute of work with a model of so many parameters."""
    return max(1, round(UNIT_S / (PARAMETER_S * parameters)))


def shards(count: int, size: int) -> list[range]:
    """``count`` utterances in pieces of at most ``size``, in their order."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def joined(outcomes: Sequence[dict[str, Any]]) -> Outcome:
    """The outcome of a whole measurement from those of its units, shards in order: costs that say what all of them took.

    The seconds add up; the load is the median one, the memory the largest.
    """
    costs = [outcome["result"] for outcome in outcomes]
    loads = sorted(one["load_s"] for one in costs if "load_s" in one)
    result = {key: value for one in reversed(costs) for key, value in one.items()}
    result["load_s"] = loads[len(loads) // 2]
    result["peak_rss_mb"] = max(one["peak_rss_mb"] for one in costs if "peak_rss_mb" in one)
    return Outcome("ok", result, "", sum(one["seconds"] for one in outcomes), own_s=sum(one["own_s"] for one in outcomes))
