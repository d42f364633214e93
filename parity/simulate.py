"""Where a fleet stops scaling: a simulation of its workers, scheduler and share from the times of units that were measured.

``python -m parity.simulate REPORT``, where the report was written by ``asr-parity --cluster … --json REPORT``.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

HOUR_S = 3600.0
REFERENCE = "pytorch-"  # how the names of its units begin
# Less than this share of the workers' time at work, and more workers are a waste.
SCALES = 0.8


@dataclass(frozen=True)
class Costs:
    """What a unit costs beside its work, in seconds: of the scheduler, of the share, of the client.

    Each of the three serves one unit at a time, whatever the number of workers; for the client, who puts results together and
    compares them, no worker waits. ``overhead`` is the worker's own: fetching, packing, waiting for the next unit.
    """

    scheduler: float = 0.0025
    write: float = 0.0
    client: float = 0.0
    overhead: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """How a run went: seconds until the last result was compared, the workers' share of it at work, and what bounds it.

    ``limit`` is whatever alone would take longest: ``workers`` (the work itself), ``scheduler``, ``share``, ``client`` or
    ``longest unit``.
    """

    workers: int
    wall_s: float
    busy: float
    limit: str


def simulate(times: Sequence[float], workers: int, costs: Costs) -> Simulated:
    """Run units that take ``times`` seconds, in their order, each at the first worker that is free."""
    events = [(0.0, 0, index) for index in range(workers)]  # when, kind (0: free, 1: writes), worker
    scheduler = share = client = 0.0
    waiting = iter(times)
    while events:
        now, writes, worker = heapq.heappop(events)
        if writes:
            share = max(now, share) + costs.write
            heapq.heappush(events, (share, 0, worker))
            client = max(share, client) + costs.client
            continue
        seconds = next(waiting, None)
        if seconds is None:
            continue
        scheduler = max(now, scheduler) + costs.scheduler
        heapq.heappush(events, (scheduler + costs.overhead + seconds, 1, worker))
    return Simulated(workers, client, sum(times) / (workers * client), _limit(times, workers, costs))


def _limit(times: Sequence[float], workers: int, costs: Costs) -> str:
    least = {
        "workers": (sum(times) + len(times) * costs.overhead) / workers,
        "scheduler": len(times) * costs.scheduler,
        "share": len(times) * costs.write,
        "client": len(times) * costs.client,
        "longest unit": max(times),
    }
    return max(least, key=lambda name: least[name])


def most_workers(times: Sequence[float], costs: Costs) -> dict[str, float]:
    """How many workers each of what they share can keep at work; infinity for what costs nothing."""
    work = sum(times) / len(times) + costs.overhead
    serial = {"scheduler": costs.scheduler, "share": costs.write, "client": costs.client}
    bounds = {name: work / cost if cost else float("inf") for name, cost in serial.items()}
    return bounds | {"longest unit": sum(times) / max(times)}


def drawn(recorded: Sequence[float], total_s: float) -> list[float]:
    """Units that together work for ``total_s``, drawn from recorded ones; the same ones every time."""
    chance, units, known = random.Random(0), [], 0.0  # noqa: S311 - no secret
    while known < total_s:
        units.append(chance.choice(recorded))
        known += units[-1]
    return units


def overhead(units: Iterable[dict[str, Any]]) -> float:
    """Seconds a unit that a worker spent beside its work, from its first unit's begin to its last one's end.

    The reference's units and those that are compared with it are counted apart: between them, once a run, everybody waits for the
    reference's last one.
    """
    spans: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for unit in units:
        spans.setdefault((unit["worker"], unit["name"].startswith(REFERENCE)), []).append(unit)
    lost = sum(
        max(one["ended_s"] for one in own) - min(one["began_s"] for one in own) - sum(one["own_s"] for one in own)
        for own in spans.values()
    )
    return float(lost / sum(map(len, spans.values())))


@click.command(help=__doc__)
@click.argument("report", type=click.Path(exists=True, path_type=Path))
@click.option("--hours", default=10_000.0, show_default=True, help="Audio.")
@click.option("--workers", "counts", multiple=True, type=click.IntRange(1), default=(1, 16, 64, 256, 1024), show_default=True)
@click.option("--unit-s", default=30.0, show_default=True, help="Work of a unit: recorded ones are stretched to that mean.")
@click.option("--scheduler-ms", default=2.5, show_default=True, help="The scheduler's time for a unit.")
@click.option("--write-ms", default=20.0, show_default=True, help="The share's time for a result.")
def main(report: Path, hours: float, counts: tuple[int, ...], unit_s: float, scheduler_ms: float, write_ms: float) -> None:
    """Print what the recorded run says of larger ones."""
    document = json.loads(report.read_text(encoding="utf-8"))
    units = [unit for unit in document.get("units", []) if unit["utterances"]]
    if not units:
        raise click.UsageError(f"{report} has no times of units: write it with asr-parity --cluster.")
    audio_s = document["data"]["audio_s"] / document["data"]["utterances"] * sum(unit["utterances"] for unit in units)
    work_s = sum(unit["own_s"] for unit in units)
    mean = work_s / len(units)
    lost = overhead(document["units"])
    click.echo(
        f"measured: {len(units)} units of {mean:.1f} s, {lost:.2f} s a unit beside the work "
        f"({100 * lost / mean:.1f} %; {100 * lost / unit_s:.1f} % of {unit_s:.0f} s)"
    )
    heard = [unit["utterances"] for unit in units if not unit["name"].startswith(REFERENCE)]
    compared_s = document["harness"]["client_cpu_s"] / sum(heard) if heard else 0.0
    costs = Costs(
        scheduler=scheduler_ms / 1000,
        write=write_ms / 1000,
        client=compared_s * sum(unit["utterances"] for unit in units) / work_s * unit_s,
        overhead=max(0.0, lost),
    )
    times = drawn([unit["own_s"] / mean * unit_s for unit in units], hours * HOUR_S * work_s / audio_s)
    click.echo(f"{hours:.0f} h of audio: {len(times)} units, {sum(times) / HOUR_S:.0f} h of work; each costs {asdict(costs)}")
    for count in counts:
        one = simulate(times, count, costs)
        click.echo(f"{count:6} workers: {one.wall_s / HOUR_S:9.2f} h, {100 * one.busy:5.1f} % at work, bound by {one.limit}")
    for name, bound in sorted(most_workers(times, costs).items(), key=lambda pair: pair[1]):
        click.echo(f"{name} keeps {bound:.0f} workers at work")


if __name__ == "__main__":
    main()
