"""``asr-parity history``: what earlier runs measured, as tables, JSON or a plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asr_core.errors import UsageError
from asr_export.cli import handle_errors

if TYPE_CHECKING:
    from rich.table import Table

    from parity.history import Entry, Run

DEFAULT = "artifacts/history.sqlite"
SHOWN = ("speedup", "wer", "delta_wer", "token_match", "encoder_max_abs", "logits_max_abs", "peak_rss_mb", "size_mb")


@dataclass(frozen=True)
class Listed:
    """A run and those of its rows that were asked for."""

    run: Run
    entries: list[Entry]


@click.command()
@click.option("--history", "file", default=DEFAULT, show_default=True, type=click.Path(path_type=Path), help="The file.")
@click.option("--target", help="Only this target.")
@click.option("--precision", help="Only this precision.")
@click.option("--figure", "figures", multiple=True, help="Only this figure of the report; may be repeated.")
@click.option("--last", type=click.IntRange(1), help="Only so many newest runs.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the figures over time here (.png, .svg, .pdf).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@handle_errors
def history(
    file: Path,
    target: str | None,
    precision: str | None,
    figures: tuple[str, ...],
    last: int | None,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    """List what earlier runs measured, and draw it over time."""
    from parity.history import History

    with History(file, create=False) as opened:
        listed = [Listed(run, opened.entries(run.id, target=target, precision=precision)) for run in opened.runs(last=last)]
    _check(listed, figures)
    if plot:
        from parity import timeline

        timeline.draw(plot, [(one.run, one.entries) for one in listed], figures or timeline.DRAWN)
    if as_json:
        click.echo(json.dumps({"runs": [_json(one, figures) for one in listed]}, indent=1))
    else:
        _print(listed, figures or SHOWN, everything=bool(target or precision or figures))


def _check(listed: list[Listed], figures: tuple[str, ...]) -> None:
    entries = [entry for one in listed for entry in one.entries]
    if not entries:
        raise UsageError("the history holds no such rows.")
    known = sorted({name for entry in entries for name in entry.figures if entry.number(name) is not None})
    unknown = [name for name in figures if name not in known]
    if unknown:
        raise UsageError(f"no figure {unknown[0]!r}; the history has: {', '.join(known)}.")


def _json(one: Listed, figures: tuple[str, ...]) -> dict[str, Any]:
    rows = [asdict(entry) for entry in one.entries]
    for row in rows:
        row.pop("run")
        row["figures"] = {name: row["figures"].get(name) for name in figures} if figures else row["figures"]
    return asdict(one.run) | {"rows": rows}


def _print(listed: list[Listed], figures: tuple[str, ...], *, everything: bool) -> None:
    """The runs, then their rows: all that were asked for, or the newest run's where nothing particular was."""
    from rich.console import Console

    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=240)
    console.print(_runs(listed))
    console.print(_rows(listed if everything else listed[-1:], figures))


def _runs(listed: list[Listed]) -> Table:
    columns: dict[str, Callable[[Listed], str]] = {
        "run": lambda one: str(one.run.id),
        "time (UTC)": lambda one: _time(one.run),
        "host": lambda one: one.run.host_name,
        "checkpoint": lambda one: f"{one.run.checkpoint} {one.run.fingerprint[:8]}",
        "clips": lambda one: f"{one.run.utterances} ({one.run.data[:8]})",
        "verdicts": lambda one: _verdicts(one.entries),
        "commit": lambda one: (one.run.commit or "–")[:8] + ("-dirty" if (one.run.commit or "").endswith("-dirty") else ""),
        "": lambda one: "resumed" if one.run.resumed else "",
    }
    return _table("Runs", list(columns), [[cell(one) for cell in columns.values()] for one in listed])


def _rows(listed: list[Listed], figures: tuple[str, ...]) -> Table:
    lines = [
        [
            str(one.run.id),
            _time(one.run),
            f"{entry.target}-{entry.precision}",
            entry.status,
            *(_figure(entry, f) for f in figures),
        ]
        for one in listed
        for entry in one.entries
    ]
    return _table("Rows (a dash is “not measured”)", ["run", "time (UTC)", "artifact", "verdict", *figures], lines)


def _table(title: str, columns: list[str], lines: list[list[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    out = Table(title=title, title_justify="left", pad_edge=False)
    for column in columns:
        out.add_column(column, no_wrap=column in {"run", "artifact", "verdict"})
    for line in lines:
        out.add_row(*(Text(cell) for cell in line))
    return out


def _verdicts(entries: list[Entry]) -> str:
    statuses = [entry.status for entry in entries]
    return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))


def _time(run: Run) -> str:
    return run.time[:19].replace("T", " ")


def _figure(entry: Entry, name: str) -> str:
    value = entry.number(name)
    return "–" if value is None else f"{value:.4g}"
