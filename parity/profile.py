"""Where time goes: what runtimes told about their operations, as shares of a call and as a Chrome trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OUTSIDE = "outside its operations"  # Python, bindings, what the profiler itself costs
MICROSECONDS = 1e6
Calls = list[dict[str, Any]]


@dataclass(frozen=True)
class Share:
    """One kind of operation in one part of a runner's work.

    ``count`` is how many a call has and ``seconds`` what they take, both means over the calls (one of the runtimes tells nothing
    else), ``share`` that part of the calls' time.
    """

    part: str
    kind: str
    count: float
    seconds: float
    share: float


def measure(target: str, path: str, threads: int, windows: int, steps: int) -> dict[str, Any]:
    """Profile one artifact in a process of its own; returns its ``calls`` (:class:`runners._profile.Call`) or None."""
    from runners._profile import open_profiled, profile

    profiled = open_profiled(target, Path(path), threads)
    return {"calls": None if profiled is None else [asdict(call) for call in profile(profiled, windows, steps)]}


def shares(calls: Calls) -> list[Share]:
    """The kinds of operations of each part, the longest first, and what no operation accounts for."""
    found = []
    for part in dict.fromkeys(call["part"] for call in calls):
        own = [call for call in calls if call["part"] == part]
        whole = sum(call["seconds"] for call in own)
        events = [event for call in own for event in call["events"]]
        spent: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for event in events:
            spent[event["kind"]] += event["own"]
            counts[event["kind"]] += 1
        spent[OUTSIDE], counts[OUTSIDE] = whole - sum(spent.values()), len(own)
        found += [Share(part, kind, counts[kind] / len(own), time / len(own), time / whole) for kind, time in spent.items()]
    return sorted(found, key=lambda share: (share.part, -share.seconds))


def chrome_trace(profiles: Iterable[tuple[str, Calls]]) -> dict[str, Any]:
    """Every runner as a process of the trace-event format, which chrome://tracing and Perfetto open; times are in µs."""
    entries: list[dict[str, Any]] = []
    for number, (name, calls) in enumerate(profiles, 1):
        entries.append({"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}})
        first = min((call["start"] for call in calls), default=0.0)
        for call in calls:
            begun = call["start"] - first
            entries.append(_entry(number, call["part"], call["part"], begun, call["seconds"]))
            entries += [_entry(number, e["kind"], e["name"], begun + e["start"], e["seconds"]) for e in call["events"]]
    return {"displayTimeUnit": "ms", "traceEvents": entries}


def _entry(process: int, kind: str, name: str, start: float, seconds: float) -> dict[str, Any]:
    times = {"ts": round(start * MICROSECONDS, 3), "dur": round(seconds * MICROSECONDS, 3)}
    return {"ph": "X", "pid": process, "tid": 1, "name": kind, **times, "args": {"node": name}}


def leading(found: Sequence[Share], least: float) -> list[Share]:
    """The shares of at least ``least``."""
    return [share for share in found if share.share >= least]
