"""What the commands share: every failure ends as one sentence on stderr and an exit code, never as a traceback."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import click

from asr_core.errors import REFUSALS, AsrExportError, StorageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from asr_core.checkpoint import Checkpoint

INTERRUPTED = 130  # what a shell reports for a command that ended by Ctrl-C
P = ParamSpec("P")
R = TypeVar("R")


def handle_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Make a click callback (decorate below ``@click.command``) end with a sentence and the error's exit code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AsrExportError as error:
            fail(error)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            raise SystemExit(INTERRUPTED) from None
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            fail(StorageError(f"{error.filename or 'the output'}: {error.strerror}."))

    return run


def checkpoint_options(command: Callable[P, R]) -> Callable[P, R]:
    """Give a click callback the options that name a checkpoint: ``model`` and ``adapter``."""
    model = click.option(
        "--model",
        default="reference",
        show_default=True,
        help="Checkpoint: folder, .pt file, adapter, hub id (owner/name or owner/name@revision), or 'reference' (carried).",
    )
    adapter = click.option("--adapter", help="PEFT adapter (folder or hub id) to merge into the model.")
    return model(adapter(command))


def open_checkpoint(model: str, adapter: str | None) -> Checkpoint:
    """Open what the options name; what had to be converted, merged or rebuilt is said on stderr."""
    from asr_core.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model, adapter)
    for remark in checkpoint.remarks:
        click.echo(f"Note: {remark}.", err=True)
    return checkpoint


def report(error: AsrExportError) -> None:
    """Print an error to stderr, as every command does."""
    click.echo(f"Error: {error}", err=True)


def fail(error: AsrExportError) -> NoReturn:
    """Print an error and leave with its exit code."""
    report(error)
    raise SystemExit(error.exit_code) from None


def stage_progress() -> Progress:
    """A progress display on stderr whose tasks carry a ``stage`` field."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[stage]}"))
    return Progress(*columns, console=Console(stderr=True))
