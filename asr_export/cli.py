"""What the commands share: every failure ends as one sentence on stderr and an exit code, never as a traceback."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import click

from asr_core.errors import REFUSALS, AsrExportError, StorageError

if TYPE_CHECKING:
    from rich.progress import Progress

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
