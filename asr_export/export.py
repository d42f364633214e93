"""``asr-export``: one checkpoint into every target and precision, each checked against PyTorch before it gets its name."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asr_core.errors import AsrExportError, GateError, UnavailableError, UsageError
from asr_export.cli import checkpoint_options, handle_errors, open_checkpoint, report, stage_progress

if TYPE_CHECKING:
    from rich.progress import Progress

    from asr_core.build import Staged
    from asr_core.checkpoint import Checkpoint
    from parity.compare import Row
    from parity.session import Session

# The clips that an artifact is checked on before it gets its name, and the tokens decoded of each: enough steps to show a
# broken cache, few enough to cost a second. Words don't matter, so any checkpoint is checked on the carried clips.
CHECK_CLIPS = 4
CHECK_TOKENS = 32
LINKED = "linked"  # the layout of --link


@dataclass(frozen=True)
class Job:
    """One artifact to make."""

    target: str
    precision: str
    final: Path

    @property
    def name(self) -> str:
        """``<target>-<precision>``."""
        return f"{self.target}-{self.precision}"


@click.command(help=__doc__, epilog="Exit codes: see the README, section 'Exit codes'.")
@checkpoint_options
@click.option("--target", required=True, help="One of the targets (an unknown one lists them), or 'all'.")
@click.option("--precision", default="all", show_default=True, help="One of the target's precisions, or 'all'.")
@click.option("--layout", help="The form that another client loads (an unknown one lists the target's) [ours].")
@click.option("--link", is_flag=True, help="ONNX over the checkpoint's own weight files, hard-linked, in their precision.")
@click.option("--out", default="artifacts", show_default=True, type=click.Path(path_type=Path), help="Root of the output.")
@click.option(
    "--alignment-heads",
    "asked",
    default="checkpoint",
    show_default=True,
    help="Heads that word timestamps are made from: the checkpoint's, a list (layer:head,…), or 'discover' to find them.",
)
@click.option("--data", "source", type=click.Path(path_type=Path), help="Clips to discover heads with [carried clips].")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Exports at a time, at most.")
@click.option("--memory", type=click.IntRange(1), help="MB for exports at a time, by what earlier ones took [what is free].")
@click.option("--force", is_flag=True, help="Export again even where an artifact is up to date.")
@handle_errors
def main(
    model: str,
    adapter: str | None,
    target: str,
    precision: str,
    layout: str | None,
    out: Path,
    asked: str,
    source: Path | None,
    jobs: int,
    memory: int | None,
    *,
    link: bool,
    force: bool,
) -> None:
    """Run the command."""
    from asr_core import build
    from asr_export import heads

    if link and layout:
        raise UsageError("--link is a form of our own graphs: it goes without --layout.")
    planned = plan(target, precision, LINKED if link else layout)
    require_any({name for name, _ in planned})
    checkpoint = heads.choose(open_checkpoint(model, adapter), asked, source, out)
    if link and precision == "all":  # the one that the weights have
        planned = [(name, chosen) for name, chosen in planned if chosen == checkpoint.weights.precision] or planned
    announce(checkpoint, planned)
    failures = []
    stale = []
    for name, chosen in planned:
        job = Job(name, chosen, out / checkpoint.name / f"{name}-{chosen}")
        try:
            if force or not _up_to_date(checkpoint, job):
                build.refuse_misfit(checkpoint, name, chosen, out)
                stale.append(job)
            else:
                click.echo(f"{job.final}: up to date")
        except AsrExportError as error:
            report(error)
            failures.append(error)
    failures += run(checkpoint, stale, out, jobs, memory) if stale else []
    if failures:
        raise SystemExit(failures[0].exit_code)


def plan(target: str, precision: str, layout: str | None = None) -> list[tuple[str, str]]:
    """Targets and precisions that the options name; raises :class:`~asr_core.errors.UsageError` for unknown ones.

    ``layout`` makes each target ``<target>.<layout>``; of all targets, those that have it.
    """
    from asr_core import build, registry

    targets = registry.names("exporters") if target == "all" else [target]
    if layout:
        having = [name for name in targets if layout in registry.layouts("exporters", name)]
        targets = [f"{name}{registry.LAYOUT}{layout}" for name in having or targets]
    pairs = []
    for name in targets:
        precisions = build.exporter(name).PRECISIONS if precision == "all" else (precision,)
        for one in precisions:
            build.check_precision(name, one)
            pairs.append((name, one))
    return pairs


def announce(checkpoint: Checkpoint, planned: list[tuple[str, str]]) -> None:
    """Say on stderr, before anything is converted, which compact forms of the checkpoint will not reach which artifacts."""
    from asr_core import build

    losing: dict[str, list[str]] = {}
    for target, precision in planned:
        for notice in build.notices(checkpoint, target, precision):
            losing.setdefault(notice, []).append(f"{target}-{precision}")
    for notice, names in losing.items():
        click.echo(f"Note: {notice} in {', '.join(names)}.", err=True)


def require_any(targets: set[str]) -> None:
    """Raise :class:`~asr_core.errors.UnavailableError` where none of the targets can be exported with what is installed."""
    from asr_core import registry

    missing = []
    for target in sorted(targets):
        try:
            registry.require(target, "export")
        except UnavailableError as error:
            missing.append(error)
    if len(missing) == len(targets):
        raise missing[0]


def run(checkpoint: Checkpoint, stale: list[Job], out: Path, jobs: int, memory_mb: float | None) -> list[AsrExportError]:
    """Export and check every job, ``jobs`` at a time where memory allows; reports each failure and returns them."""
    from asr_core import build, capacity
    from asr_export import schedule

    threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    with stage_progress() as progress, _checker(checkpoint, progress) as checker:

        def attempt(job: Job) -> AsrExportError | None:
            bar = progress.add_task(job.name, total=None, stage="export")
            try:
                line = _make(checkpoint, job, checker, threads, lambda stage: progress.update(bar, stage=stage))
            except AsrExportError as error:
                progress.update(bar, total=1, completed=1, stage="[red]failed")
                progress.console.print(f"{job.name}: {error}", markup=False, highlight=False)
                return error
            progress.update(bar, total=1, completed=1, stage="[green]done")
            progress.console.print(line, markup=False, highlight=False)
            return None

        # The answers that all wait for come first, beside the first export.
        first = schedule.Need(math.inf, schedule.ANSWERS.memory_of(checkpoint.dims))
        answers: schedule.Task[AsrExportError | None] = schedule.Task(first, checker.prepare)
        needs = [schedule.need(job.name, build.cost(job.target, job.precision), checkpoint.dims, out) for job in stale]
        tasks = [schedule.Task(need, partial(attempt, job)) for need, job in zip(needs, stale, strict=True)]
        done = schedule.run([answers, *tasks], jobs, memory_mb or capacity.available_mb())
        return [error for error in done if error]


def _make(checkpoint: Checkpoint, job: Job, checker: _Checker, threads: int | None, tell: Callable[[str], None]) -> str:
    """Export one artifact, check it, and give it its name or put it aside; returns a line about it.

    Raises :class:`GateError` where it does not say what PyTorch says.
    """
    from asr_core import build

    staged = build.stage(checkpoint, job.target, job.precision, job.final, tell, threads)
    tell("check against PyTorch")
    row = checker.judge(staged)
    if row.status != "pass":
        failed = staged.quarantine(f"{row.status}: {row.reason}")
        raise GateError(f"{row.status} ({row.reason}); quarantined as {failed}")
    artifact = staged.publish()
    manifest = artifact.manifest
    return (
        f"{job.final}: {artifact.size_mb:.1f} MB, export {manifest.export_seconds:.1f} s, "
        f"peak {manifest.export_peak_rss_mb:.0f} MB, tokens of {CHECK_CLIPS} check clips equal to PyTorch's: "
        f"{100 * (row.token_match or 0):.0f} %"
    )


def _up_to_date(checkpoint: Checkpoint, job: Job) -> bool:
    from asr_core import build, registry

    registry.require(job.target, "export")
    return build.up_to_date(checkpoint, job.target, job.precision, job.final)


class _Checker:
    """The comparison with PyTorch, whose answers are made beside the first exports."""

    def __init__(self, session: Session, tell: Callable[..., None]) -> None:
        self._session, self._tell = session, tell
        self._prepared: Future[None] = Future()

    def prepare(self) -> None:
        """Ask PyTorch; raises :class:`GateError` where it fails, and then so does every :meth:`judge`."""
        try:
            self._session.prepare()
        except BaseException as error:
            self._prepared.set_exception(error)
            raise
        self._prepared.set_result(None)
        self._tell(total=1, completed=1, stage="[green]done")

    def judge(self, staged: Staged) -> Row:
        """Compare a staged artifact with PyTorch, once its answers are there; without them nothing stays of the artifact."""
        try:
            self._prepared.result()
        except BaseException:
            shutil.rmtree(staged.path)
            raise
        return self._session.judge(staged.path)


@contextmanager
def _checker(checkpoint: Checkpoint, progress: Progress) -> Iterator[_Checker]:
    """A parity session over the check clips."""
    import reference
    from parity import data
    from parity.session import Session

    clips = data.read(reference.manifest_path())
    chosen = [clips[i * len(clips) // CHECK_CLIPS] for i in range(CHECK_CLIPS)]
    with tempfile.TemporaryDirectory(prefix="asr-export-check-") as work:
        session = Session(checkpoint, chosen, Path(work), threads=1, max_new_tokens=CHECK_TOKENS, gates="export")
        bar = progress.add_task("pytorch", total=None, stage="reference answers")
        yield _Checker(session, partial(progress.update, bar))
