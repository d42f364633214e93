"""``asr-parity``: compare every artifact with the PyTorch reference, each in its own process, and print one table."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asr_core.errors import GateError, UnavailableError
from asr_export.cli import handle_errors, stage_progress

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint
    from parity.compare import Row
    from parity.data import Utterance


@click.command(help=__doc__, epilog="Exit codes: 0 all pass, 1 some fail, 5 none fails but some could not run here.")
@click.option("--artifacts", default="artifacts", show_default=True, type=click.Path(path_type=Path), help="Artifacts' root.")
@click.option("--model", default="reference", show_default=True, help="Checkpoint folder, hub id, or 'reference' (carried).")
@click.option("--data", "source", type=click.Path(path_type=Path), help="NeMo manifest or LibriSpeech folder [carried clips].")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of every runtime.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the report here too.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write the report as one page that needs no network.")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), help="Write a summary for a pull request.")
@handle_errors
def main(
    artifacts: Path,
    model: str,
    source: Path | None,
    threads: int,
    json_file: Path | None,
    html_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Run the command."""
    from asr_core import registry

    registry.require("pytorch", "export")
    import reference
    from asr_core.checkpoint import Checkpoint
    from parity import data, page, report
    from parity.session import discover

    checkpoint = Checkpoint.open(model)
    utterances = data.read(source or reference.manifest_path())
    folders = discover(artifacts, checkpoint.name)
    rows, prepared, behind = measure_all(checkpoint, utterances, folders, threads)
    content = report.document(checkpoint, prepared, rows, threads, details=behind)
    if json_file:
        report.write_json(json_file, content)
    if html_file:
        page.write_html(html_file, content)
    if markdown_file:
        page.write_markdown(markdown_file, content)
    _print(rows)
    raise SystemExit(_exit_code(rows))


def measure_all(
    checkpoint: Checkpoint, utterances: list[Utterance], folders: list[Path], threads: int
) -> tuple[list[Row], list[Utterance], dict[str, Any]]:
    """Measure PyTorch and every artifact, with progress on the terminal; returns rows, utterances with durations, details."""
    from parity import details
    from parity.session import Session, normaliser

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
        return rows, session.utterances, details.read(session.work, rows, session.utterances, normaliser(checkpoint))


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
    return UnavailableError.exit_code if "unavailable" in statuses else 0
