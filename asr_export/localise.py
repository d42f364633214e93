"""``asr-parity localise``: replay one clip stage by stage through an artifact and through PyTorch; name what goes wrong first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from asr_core.errors import GateError, UsageError
from asr_export.cli import checkpoint_options, handle_errors, open_checkpoint

if TYPE_CHECKING:
    from rich.table import Table

    from parity.localise import Localised

PICTURES = (".png", ".svg", ".pdf")


@click.command(epilog="Exit codes: 0 every stage in bounds, 1 one is out of bounds; others: see the README.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--clip", required=True, type=click.Path(path_type=Path), help="Audio of at most 30 s.")
@checkpoint_options
@click.option("--language", default="en", show_default=True, help="Language that is spoken, as a code.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of both runtimes.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw error by stage here (.png, .svg, .pdf).")
@handle_errors
def localise(
    artifact: Path, clip: Path, model: str, adapter: str | None, language: str, threads: int, picture: Path | None
) -> None:
    """Name the first stage of ARTIFACT that does something else than PyTorch's.

    Every stage is judged alone: it is given what the artifact's stage before it has shown, and compared with what the
    checkpoint's weights make of that. So errors that were made before, or quantisation's sum, are not laid to its charge.
    """
    if picture and picture.suffix.lower() not in PICTURES:
        raise UsageError(f"{picture}: a picture's name ends with {', '.join(PICTURES)}.")
    from asr_core import registry

    registry.require("pytorch", "export")
    from rich.console import Console

    from parity import stage_plot
    from parity.localise import Localiser

    found = Localiser(open_checkpoint(model, adapter), threads).localise(artifact, clip, language=language)
    console = Console()
    console.print(_table(found))
    for sentence in [*found.remarks, _divergence(found), _verdict(found)]:
        console.print(f"{sentence}.", markup=False, highlight=False)
    if picture:
        stage_plot.write(picture, found)
    if found.culprit:
        raise SystemExit(GateError.exit_code)


def _table(found: Localised) -> Table:
    from rich.table import Table

    table = Table(title=f"{found.artifact}, {found.clip}", caption="alone: given what the artifact's stage before it has shown")
    table.add_column("stage")
    for column in ("error", "alone", "bound"):
        table.add_column(column, justify="right")
    table.add_column("")
    for stage in found.stages:
        if stage.own is None or stage.error is None:
            table.add_row(stage.title, "not shown", "", "", "")
            continue
        mark = "[bold red]out of bounds[/]" if stage.out else ""
        table.add_row(stage.title, f"{stage.error:.1e}", f"{stage.own:.1e}", f"{stage.bound:.0e}", mark)
    return table


def _divergence(found: Localised) -> str:
    if found.step is None or found.chosen is None:
        return "Its tokens are PyTorch's"
    mine, theirs = found.chosen
    return f"Its tokens leave PyTorch's at token {found.step + 1}: {mine!r} instead of {theirs!r}, up to where it was replayed"


def _verdict(found: Localised) -> str:
    if found.culprit:
        stage = found.culprit
        return f"The first stage out of bounds: {stage.title} (alone {stage.own:.1e}, bound {stage.bound:.0e})"
    if found.step is None:
        return "Every stage is in bounds"
    return "Every stage is in bounds: the tokens differ by what small errors add up to"
