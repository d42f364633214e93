"""Find the smallest artifact of a target that stays within a budget: recipes of compression and their bits, layer by layer."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asr_export.cli import handle_errors, stage_progress

if TYPE_CHECKING:
    from compressors.budget import Budget
    from compressors.lab import Workbench
    from compressors.search import Found, Point

FRONT, PLOT, RECIPE, CHECKPOINT = "pareto.json", "pareto.png", "recipe.yaml", "checkpoint"
HEADER = f"{'MB':>9} {'ΔWER':>7} {'p50 ms':>8} {'p95 ms':>8}  candidate"


@click.command(help=__doc__, epilog="Exit codes: see the README, section 'Exit codes'.")
@click.option("--budget", required=True, help="As 'size<=3MB, delta_wer<=0.5, latency_p95<=50ms'; also latency_p50, memory.")
@click.option("--target", required=True, help="One of the targets (an unknown one lists them).")
@click.option("--precision", default="all", show_default=True, help="One of the target's precisions, or 'all' to choose from.")
@click.option("--model", default="reference", show_default=True, help="Checkpoint folder, hub id, or 'reference' (carried).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the search; the same one goes on.")
@click.option("--trials", default=40, show_default=True, type=click.IntRange(1), help="Points to try.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="NeMo manifest or LibriSpeech folder; some clips calibrate, the rest judge.  [default: the carried clips]",
)
@click.option(
    "--judge", type=click.Path(path_type=Path), help="NeMo manifest or LibriSpeech folder to judge on; --data calibrates then."
)
@click.option("--repair", default=0, show_default=True, type=click.IntRange(0), help="Steps of fine-tuning after every cut.")
@click.option("--allow-slower", is_flag=True, help="Accept artifacts that are smaller but slower than the source's own.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of every measurement.")
@click.option("--seed", default=0, show_default=True, help="Of the optimiser.")
@handle_errors
def main(
    budget: str,
    target: str,
    precision: str,
    model: str,
    out: Path,
    trials: int,
    data: Path | None,
    judge: Path | None,
    repair: int,
    threads: int,
    seed: int,
    *,
    allow_slower: bool,
) -> None:
    """Search, print and plot the Pareto front, and leave the winner's recipe, checkpoint and artifact."""
    from asr_core import registry
    from asr_core.errors import UsageError
    from asr_export.export import plan
    from compressors.budget import parse

    bounds = parse(budget)
    if target == "all":
        raise UsageError("search for one target at a time: what is small in one is not in another.")
    precisions = [name for _, name in plan(target, precision)]
    registry.require(target, "export", "compress")
    import reference
    from asr_core.checkpoint import Checkpoint
    from compressors.lab import Workbench
    from compressors.search import Search
    from compressors.space import Space
    from parity.data import read

    source = Checkpoint.open(model)
    utterances = read(data or reference.manifest_path())
    judges = read(judge) if judge else None
    with stage_progress() as progress:
        bar = progress.add_task(source.name, total=None, stage="")
        trial = progress.add_task("", total=None, stage="")
        root = out / f"{source.name}-{source.fingerprint[:12]}-{target}"

        def tell(stage: str) -> None:
            progress.update(bar, stage=stage)

        def detail(stage: str) -> None:
            progress.update(trial, stage=stage)

        lab = Workbench(source, target, utterances, judges, root, bounds, threads, detail)
        space = Space(source.dims, precisions, repair)
        search = Search(space, bounds, lab, root, trials, seed, allow_slower, tell)
        found = search.run()
    _write(found, bounds, lab, out)
    _report(found, bounds, out)


def _write(found: Found, budget: Budget, lab: Workbench, out: Path) -> None:
    """The front, its picture, and the winner; what an earlier search left under the winner's names is replaced."""
    import yaml

    from compressors import search

    listed = [{"candidate": asdict(point.candidate), "figures": asdict(point.figures)} for point in search.front(found.points)]
    winner = found.winner and {"candidate": asdict(found.winner.candidate), "figures": asdict(found.winner.figures)}
    document: dict[str, Any] = {"winner": winner, "front": listed, "rejected": found.rejected}
    search.write(out / FRONT, json.dumps(document, indent=1) + "\n")
    search.plot(found.points, found.winner, budget, out / PLOT)
    if found.winner is None:
        return
    candidate = found.winner.candidate
    artifact = lab.artifact_folder(candidate)
    search.write(out / RECIPE, yaml.safe_dump({"steps": candidate.steps}, sort_keys=False))
    for made, name in ((lab.checkpoint(candidate), CHECKPOINT), (artifact, artifact.name)):
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(made, out / name)


def _report(found: Found, budget: Budget, out: Path) -> None:
    from asr_core.errors import GateError
    from compressors.search import front

    click.echo("Pareto front, on few clips")
    click.echo(HEADER)
    for point in front(found.points):
        click.echo(_line(point))
    for reason in found.rejected:
        click.echo(f"not confirmed: {reason}")
    if found.winner is None:
        nearest = f" The nearest is:\n{HEADER}\n{_line(found.nearest)}" if found.nearest else ""
        raise GateError(f"none of {len(found.points)} points meets {budget}.{nearest}")
    click.echo(f"Smallest within {budget}, on all clips\n{HEADER}\n{_line(found.winner)}")
    click.echo(f"{out / RECIPE}, {out / CHECKPOINT}, {out / PLOT}")


def _line(point: Point) -> str:
    figures = point.figures
    values = (figures.size, figures.delta_wer, 1e3 * figures.latency_p50, 1e3 * figures.latency_p95)
    widths = (9, 7, 8, 8)
    cells = ["-".rjust(w) if math.isnan(value) else f"{value:{w}.2f}" for value, w in zip(values, widths, strict=True)]
    return f"{' '.join(cells)}  {point.candidate}"
