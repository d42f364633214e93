"""``asr-parity``: compare every artifact with the PyTorch reference, each in its own process, and print one table."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asr_core.errors import GateError, UnavailableError, UndecidedError
from asr_export.cli import handle_errors, stage_progress

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint
    from parity.compare import Row
    from parity.data import Utterance
    from parity.session import Session


EXIT_CODES = (
    "Exit codes: 0 all pass, 1 some fail, 10 none fails but the utterances are too few to tell of some, "
    "5 none of these but some could not run here."
)


@click.command(help=__doc__, epilog=EXIT_CODES)
@click.option("--artifacts", default="artifacts", show_default=True, type=click.Path(path_type=Path), help="Artifacts' root.")
@click.option("--model", default="reference", show_default=True, help="Checkpoint folder, hub id, or 'reference' (carried).")
@click.option("--data", "source", type=click.Path(path_type=Path), help="NeMo manifest or LibriSpeech folder [carried clips].")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of every runtime.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the report here too.")
@handle_errors
def main(artifacts: Path, model: str, source: Path | None, threads: int, json_file: Path | None) -> None:
    """Run the command."""
    from asr_core import registry

    registry.require("pytorch", "export")
    import reference
    from asr_core.checkpoint import Checkpoint
    from parity import data, report
    from parity.session import discover

    checkpoint = Checkpoint.open(model)
    utterances = data.read(source or reference.manifest_path())
    folders = discover(artifacts, checkpoint.name)
    rows, session = measure_all(checkpoint, utterances, folders, threads)
    if json_file:
        report.write_json(json_file, report.document(checkpoint, session.utterances, rows, threads) | session.context)
    _print(rows)
    raise SystemExit(_exit_code(rows))


def measure_all(
    checkpoint: Checkpoint, utterances: list[Utterance], folders: list[Path], threads: int
) -> tuple[list[Row], Session]:
    """Measure PyTorch and every artifact, with progress on the terminal; returns the rows and the session."""
    from parity.session import Session

    with tempfile.TemporaryDirectory(prefix="asr-parity-") as work, stage_progress() as progress:
        bar = progress.add_task("", total=len(folders) + 1, stage="")
        session = Session(
            checkpoint,
            utterances,
            Path(work),
            threads,
            progress=lambda name, stage: progress.update(bar, description=name, stage=stage),
        )
        rows = [session.prepare()]
        progress.advance(bar)
        for folder in folders:
            rows.append(session.judge(folder))
            progress.advance(bar)
        return rows, session


def _print(rows: list[Row]) -> None:
    from rich.console import Console

    from parity import report

    terminal = Console()
    # A redirected table is for a file: it may be as wide as it needs.
    console = terminal if terminal.is_terminal else Console(width=240)
    console.print(report.table(rows))
    for row in rows:
        if row.reason:
            console.print(f"{row.target}-{row.precision} [bold]{row.status}[/]: ", end="")
            console.print(row.reason, markup=False, highlight=False)


def _exit_code(rows: list[Row]) -> int:
    statuses = {row.status for row in rows}
    if statuses & {"fail", "crashed", "timeout"}:
        return GateError.exit_code
    if "undecided" in statuses:
        return UndecidedError.exit_code
    return UnavailableError.exit_code if "unavailable" in statuses else 0
