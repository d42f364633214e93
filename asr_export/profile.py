"""``asr-parity profile``: where the time of an encoding and of a decode step goes, operation by operation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from asr_export.cli import checkpoint_options, handle_errors, open_checkpoint, stage_progress

if TYPE_CHECKING:
    from rich.table import Table

    from parity.profile import Calls

LEAST = 0.01  # share of a call below which a kind of operation has no row


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@checkpoint_options
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of every runtime.")
@click.option("--windows", default=5, show_default=True, type=click.IntRange(1), help="Encodings to profile.")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(1), help="Decode steps to profile.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write a Chrome trace here (chrome://tracing, Perfetto).")
@handle_errors
def profile(
    artifacts: tuple[Path, ...], model: str, adapter: str | None, threads: int, windows: int, steps: int, trace: Path | None
) -> None:
    """Say which kinds of operations take the time of PyTorch and of ARTIFACTS, as their runtimes themselves tell it.

    Profiling slows a runtime down: compare shares here, and speeds with asr-bench.
    """
    from rich.console import Console

    from asr_core import isolate, registry
    from asr_core.artifact import Artifact
    from parity import report
    from parity.profile import chrome_trace

    registry.require("pytorch", "export")
    checkpoint = open_checkpoint(model, adapter)
    manifests = [(path, Artifact.open(path).manifest) for path in artifacts]
    wanted = [("pytorch-fp32", "pytorch", checkpoint.path)]
    wanted += [(f"{manifest.target}-{manifest.precision}", manifest.target, path) for path, manifest in manifests]
    profiles: list[tuple[str, Calls]] = []
    with stage_progress() as progress:
        for name, target, path in wanted:
            bar = progress.add_task(name, total=None, stage="")
            given = {"target": target, "path": str(path), "threads": threads, "windows": windows, "steps": steps}
            outcome = isolate.run("parity.profile:measure", given, threads=threads)
            calls = isolate.result_or_raise(outcome, f"profiling {name}")["calls"]
            progress.remove_task(bar)
            if calls is None:
                click.echo(f"{name}: not available, its runtime has no profiler that we can ask")
            else:
                profiles.append((name, calls))
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=120)).print(table(profiles))
    if trace:
        report.write_json(trace, chrome_trace(profiles))


def table(profiles: list[tuple[str, Calls]]) -> Table:
    """One row a kind of operation, by runner and part."""
    from rich.table import Table

    from parity.profile import leading, shares

    out = Table(title=f"Where time goes: means a call; kinds below {LEAST:.0%} are left out")
    for column in ("runner", "part", "operation"):
        out.add_column(column, no_wrap=True)
    for column in ("a call", "ms", "share"):
        out.add_column(column, justify="right")
    for name, calls in profiles:
        before = ""
        for share in leading(shares(calls), LEAST):
            start = share.part != before
            out.add_row(
                name if start else "", share.part if start else "", share.kind,
                f"{share.count:.0f}×", f"{1000 * share.seconds:.3f}", f"{share.share:.1%}",
            )  # fmt: skip
            before = share.part
        out.add_section()
    return out
