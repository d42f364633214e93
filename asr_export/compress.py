"""``asr-compress``: a checkpoint into a smaller one, by one method or by a recipe of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from asr_export.cli import handle_errors, stage_progress
from asr_export.comparison import main as comparison
from asr_export.search import main as search

if TYPE_CHECKING:
    from asr_core.compressed import Effect
    from compressors.recipe import Planned
    from compressors.run import Compressed

HEADER = ("tensor", "shape", "bits", "zeros", "rank", "error", "of outputs")
WIDTHS = (0, 10, 6, 8, 5, 8, 10)


@click.group(invoke_without_command=True, help=__doc__, epilog="Exit codes: see the README, section 'Exit codes'.")
@click.option("--model", default="reference", show_default=True, help="Checkpoint folder, hub id, or 'reference' (carried).")
@click.option("--method", help="One of the methods (an unknown one lists them).")
@click.option("-p", "--parameter", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter of the method.")
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML file of several methods, instead of --method.")
@click.option("--out", type=click.Path(path_type=Path), help="New folder of the compressed checkpoint.  [required]")
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    help="New folder for the dense control: the recipe's trainings alone, of the uncompressed checkpoint.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="NeMo manifest or LibriSpeech folder; every other clip calibrates, the rest judge.  [default: the carried clips]",
)
@click.option(
    "--judge",
    type=click.Path(path_type=Path),
    help="NeMo manifest or LibriSpeech folder to judge on; all of --data calibrates then.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of PyTorch.  [default: all processors]")
@click.pass_context
@handle_errors
def main(
    context: click.Context,
    model: str,
    method: str | None,
    settings: tuple[str, ...],
    recipe: Path | None,
    out: Path | None,
    control: Path | None,
    data: Path | None,
    judge: Path | None,
    threads: int | None,
) -> None:
    """Compress, say what it did to every layer, and how far the result is from the original on clips it has not seen."""
    if context.invoked_subcommand is not None:
        return
    from asr_core import registry
    from asr_core.errors import UsageError

    if out is None:
        raise UsageError("--out is missing: the folder of the compressed checkpoint.")

    registry.require("compress")
    plan = _plan(method, settings, recipe)
    import torch

    import reference
    from asr_core.checkpoint import Checkpoint
    from compressors.run import controls, run
    from parity.data import read

    if threads:
        torch.set_num_threads(threads)
    utterances = read(data or reference.manifest_path())
    source = Checkpoint.open(model)
    judging = read(judge) if judge else None
    runs = [(plan, out), *([(controls(source, plan), control)] if control else [])]
    with stage_progress() as progress:
        bar = progress.add_task(source.name, total=None, stage="")

        def tell(stage: str) -> None:
            progress.update(bar, stage=stage)

        made = [run(source, steps, utterances, folder, tell, judging) for steps, folder in runs]
    for one in made:
        _report(one)


def _plan(method: str | None, settings: tuple[str, ...], recipe: Path | None) -> list[Planned]:
    from asr_core.errors import UsageError
    from compressors import recipe as recipes

    if recipe and not method and not settings:
        return recipes.read(recipe)
    if method and not recipe:
        return [recipes.plan(method, settings)]
    raise UsageError("give either --method with its -p KEY=VALUE, or --recipe.")


def _report(made: Compressed) -> None:
    for step in made.steps:
        given = ", ".join(f"{key}={value}" for key, value in step.parameters.items())
        click.echo(f"{step.method} ({given})")
        for row in [HEADER, *map(_cells, step.effects)] if step.effects else []:
            click.echo(
                "  " + " ".join(cell.rjust(width) if width else cell.ljust(46) for cell, width in zip(row, WIDTHS, strict=True))
            )
    before, after = made.record.before, made.record.after
    click.echo(made.checkpoint.path)
    for part in ("body", "embedding"):
        was, now = (getattr(size, f"{part}_bytes") for size in (before, after))
        click.echo(f"  {part:<9} {was / 1e6:9.3f} MB → {now / 1e6:9.3f} MB, {was / now:.2f}× smaller")
    if made.record.kl is not None:
        click.echo(f"  KL {made.record.kl:.2g} nats a token, on clips that no step has seen")


def _cells(effect: Effect) -> tuple[str, ...]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    shape = "×".join(map(str, effect.shape))
    rank = "" if effect.rank is None else str(effect.rank)
    figures = (share(effect.zeros), rank, share(effect.relative_error), share(effect.output_error))
    return (effect.tensor, shape, f"{effect.bits:.2f}", *figures)


main.add_command(search, "search")
main.add_command(comparison, "table")
