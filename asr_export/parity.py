"""``asr-parity``: compare every artifact with the PyTorch reference, each in its own process, and print one table.

An interrupted run is taken up where it ended by the next one with the same inputs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from asr_core.errors import REFUSALS, GateError, RegressionError, UnavailableError, UndecidedError, UsageError
from asr_export.cli import checkpoint_options, handle_errors, open_checkpoint, stage_progress
from asr_export.history import history
from asr_export.localise import localise
from asr_export.merge import merge
from asr_export.profile import profile

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint
    from parity import suite
    from parity.compare import Row
    from parity.data import Utterance
    from parity.measurers import Measurer
    from parity.regression import Judgement
    from parity.session import Session

WORK = ".parity"  # below the artifacts' root: where large files are expected, and where `make clean` looks
EPILOG = (
    "Exit codes: 0 all pass, 1 some fail, 10 none fails but the data cannot decide some, 3 none of these but some got worse "
    "than this machine's own past (--history), 5 none of these but some could not run here."
)


@click.group(help=__doc__, epilog=EPILOG, invoke_without_command=True)
@click.option("--artifacts", default="artifacts", show_default=True, type=click.Path(path_type=Path), help="Artifacts' root.")
@checkpoint_options
@click.option("--data", "source", type=click.Path(path_type=Path), help="NeMo manifest or LibriSpeech folder [carried clips].")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of every runtime.")
@click.option(
    "--suite",
    "level",
    default="quick",
    show_default=True,
    type=click.Choice(["quick", "full"]),
    help="Failure classes that every artifact goes through; full adds lengths, threads, prompts and the ecosystems' clients.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the report here too.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write the report as one page that needs no network.")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), help="Write a summary for a pull request.")
@click.option("--history", "history_file", type=click.Path(path_type=Path), help="Append here, and judge against the past.")
@click.option(
    "--cluster", help="Measure on the workers of a Dask scheduler (its address), or on processes of this machine: local."
)
@click.option("--share", help="Where the workers leave results: a folder that all see, or an fsspec address (s3://…).")
@click.option("--unit", "size", type=click.IntRange(1), help="Utterances of one unit of a cluster's work [about 30 s of work].")
@click.option("--work", type=click.Path(path_type=Path), help=f"Where unfinished runs wait [{WORK} below the artifacts].")
@click.option("--fresh", is_flag=True, help="Measure anew what an interrupted run had finished.")
@click.option("--trim-silence", is_flag=True, hidden=True, help="Refused, with the reason.")
@click.pass_context
@handle_errors
def main(
    context: click.Context,
    artifacts: Path,
    model: str,
    adapter: str | None,
    source: Path | None,
    threads: int,
    level: suite.Level,
    json_file: Path | None,
    html_file: Path | None,
    markdown_file: Path | None,
    history_file: Path | None,
    cluster: str | None,
    share: str | None,
    size: int | None,
    work: Path | None,
    *,
    fresh: bool,
    trim_silence: bool,
) -> None:
    """Run the command."""
    if trim_silence:
        raise UsageError("parity compares what is said of whole windows, as PyTorch hears them, and --trim-silence cuts them.")
    if context.invoked_subcommand:
        _refuse_options(context)
        return
    _check_cluster(cluster, share, size)
    from asr_core import registry

    registry.require("pytorch", "export")
    import reference
    from parity import data, provenance, report
    from parity.session import discover

    if history_file:
        _check_history(history_file)
    checkpoint = open_checkpoint(model, adapter)
    utterances = data.read(source or reference.manifest_path())
    folders = discover(artifacts, checkpoint.name)
    with ExitStack() as stack:
        place = stack.enter_context(_work_folder(work, artifacts, _inputs(checkpoint, utterances, threads, level), fresh=fresh))
        measurer = stack.enter_context(_measurer(cluster, share, place, size or _unit_size(checkpoint), threads, fresh=fresh))
        measured = measure_all(checkpoint, utterances, folders, threads, level, place, measurer)
        session = measured.session
        plain = report.document(
            checkpoint, session.utterances, measured.rows, threads, details=measured.details, context=session.context
        )
        document = provenance.stamp(plain, utterances)
        # Of several machines, as of several runs, speeds are no ratio to PyTorch's on the same one.
        document["resumed"] = bool(session.kept.resumed or cluster)
        if cluster:
            document["units"] = [asdict(one) for one in measurer.times]
        judgement = None
        try:
            if history_file:
                judgement = _record(history_file, document)
        finally:  # hours of measuring must not be lost to a full disk under the history
            _write(document, json_file, html_file, markdown_file)
    _print(measured.rows)
    if judgement:
        _print_judgement(judgement)
    raise SystemExit(exit_code({row.status for row in measured.rows}, regressed=bool(judgement and judgement.regressions)))


main.add_command(history)
main.add_command(localise)
main.add_command(merge)
main.add_command(profile)


@dataclass(frozen=True)
class Measured:
    """The rows of a run, the utterances behind them (:func:`parity.details.read`), and the session that measured them."""

    rows: list[Row]
    details: dict[str, Any]
    session: Session


def measure_all(
    checkpoint: Checkpoint,
    utterances: list[Utterance],
    folders: list[Path],
    threads: int,
    level: suite.Level,
    work: Path,
    measurer: Measurer,
) -> Measured:
    """Measure PyTorch and every artifact, with progress on the terminal; the files lie in ``work``."""
    from parity import details
    from parity.session import Session, normaliser

    started = time.perf_counter()
    with stage_progress() as progress:
        bar = progress.add_task("", total=len(folders) + 1, stage="")
        session = Session(
            checkpoint,
            utterances,
            work,
            threads,
            level=level,
            measurer=measurer,
            progress=lambda name, stage: progress.update(bar, description=name, stage=stage),
        )
        rows = [session.prepare()]
        progress.advance(bar)
        session.expect(folders)
        for folder in folders:
            rows.append(session.judge(folder))
            rows += session.testimony(rows[-1], folder)
            progress.advance(bar)
    if session.kept.resumed:
        click.echo(f"Resumed: {', '.join(session.kept.resumed)} measured before (--fresh measures anew).", err=True)
    behind = details.read(work, rows, session.utterances, normaliser(checkpoint))
    session.context["harness"] = {
        "wall_s": time.perf_counter() - started,
        "features_s": session.features_s,
        "backends_s": session.backends_s,
        "client_cpu_s": time.thread_time() - session.prepared_cpu_s,
    }
    return Measured(rows, behind, session)


def exit_code(statuses: set[str], *, regressed: bool) -> int:
    """What the rows' statuses mean for the caller: the worst of them (README, "Exit codes")."""
    if statuses & {"fail", "crashed", "timeout"}:
        return GateError.exit_code
    if "undecided" in statuses:
        return UndecidedError.exit_code
    if regressed:
        return RegressionError.exit_code
    return UnavailableError.exit_code if "unavailable" in statuses else 0


def _refuse_options(context: click.Context) -> None:
    """An option of the run before a command would do nothing: say so."""
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
        named = ", ".join(options[name] for name in given)
        raise UsageError(f"{named} belongs to a parity run; put the options of {context.invoked_subcommand} after its name.")


def _check_cluster(cluster: str | None, share: str | None, size: int | None) -> None:
    """Refuse options that would do nothing, and a cluster that would have no place for its results."""
    if cluster is None and (share or size):
        raise UsageError(f"{'--share' if share else '--unit'} belongs to --cluster.")
    if cluster is None:
        return
    from asr_core import registry
    from parity.measurers import LOCAL

    registry.require("cluster")
    if cluster != LOCAL and not share:
        raise UsageError(f"--cluster {cluster} needs --share: a folder that all its workers see, or an fsspec address.")


@contextmanager
def _measurer(cluster: str | None, share: str | None, place: Path, size: int, threads: int, *, fresh: bool) -> Iterator[Measurer]:
    """Who measures: this machine alone, or a fleet whose results wait in the share under the name of the run."""
    if cluster is None:
        from parity.measurers import Alone

        yield Alone()
        return
    from parity import fleet, resume

    address = f"{share.rstrip('/')}/{place.name}" if share else str((place / resume.SHARE).absolute())
    with fleet.connect(cluster, address, size, threads, fresh=fresh) as measurer:
        yield measurer


def _unit_size(checkpoint: Checkpoint) -> int:
    """Utterances of about half a minute of work."""
    import math

    from asr_core.dims import expected_shapes
    from parity import units

    return units.size(sum(math.prod(shape) for shape in expected_shapes(checkpoint.dims).values()))


def _inputs(checkpoint: Checkpoint, utterances: list[Utterance], threads: int, level: suite.Level) -> dict[str, Any]:
    """Everything that the measurements of one run share: an interrupted run is taken up only where all of it is equal."""
    from parity import provenance, report, resume

    return {
        "fingerprint": checkpoint.fingerprint,
        "data": provenance.digest(utterances),
        "threads": threads,
        "suite": level,
        "host": provenance.identity(report.host()),
        "code": resume.code_version(),
        "versions": provenance.versions(),
    }


@contextmanager
def _work_folder(work: Path | None, artifacts: Path, inputs: dict[str, Any], *, fresh: bool) -> Iterator[Path]:
    """Where this run can be taken up again; a temporary folder where another run has it or nothing may be written."""
    from parity import resume

    with ExitStack() as stack:
        try:
            place = stack.enter_context(resume.work_folder(work or artifacts / WORK, inputs, fresh=fresh))
        except OSError as error:
            if not isinstance(error, BlockingIOError) and (work or error.errno not in REFUSALS):
                raise
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asr-parity-")))
        yield place


def _check_history(file: Path) -> None:
    """Refuse a file that cannot be appended to before the measuring, not after it."""
    from parity.history import History

    History(file).close()


def _record(file: Path, document: dict[str, Any]) -> Judgement:
    from parity import regression
    from parity.history import History

    with History(file) as opened:
        number = opened.append(document)
        judgement = regression.judge(opened, opened.run(number))
    document["regressions"] = regression.document(judgement)
    return judgement


def _write(document: dict[str, Any], json_file: Path | None, html_file: Path | None, markdown_file: Path | None) -> None:
    from parity import page, report

    if json_file:
        report.write_json(json_file, document)
    if html_file:
        page.write_html(html_file, document)
    if markdown_file:
        page.write_markdown(markdown_file, document)


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


def _print_judgement(judgement: Judgement) -> None:
    from parity.regression import LEAST_RUNS

    for regression in judgement.regressions:
        click.echo(f"regression: {regression}")
    if judgement.busy:
        click.echo(f"busy machine, speeds are not judged: {judgement.busy}")
    if judgement.not_enough:
        names = ", ".join(f"{name} ({runs} of {LEAST_RUNS} runs)" for name, runs in judgement.not_enough.items())
        click.echo(f"not enough history: {names}")
    if judgement.judged:
        click.echo(f"history: {judgement.judged} artifacts judged, {len(judgement.regressions)} regressions")
