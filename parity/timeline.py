"""Draw the history: a panel a figure, a line an artifact and host, runs in the order of their time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from asr_core import registry
from asr_core.errors import UsageError
from parity.history import Entry, Run

DRAWN = ("speedup", "wer", "logits_max_abs", "peak_rss_mb", "size_mb")
LOGARITHMIC = ("_max_abs",)  # errors of different precisions lie orders of magnitude apart
PANEL_INCHES = (10.0, 2.6)
Series = dict[str, tuple[list[datetime], list[float]]]


def draw(file: Path, runs: Sequence[tuple[Run, list[Entry]]], figures: Sequence[str]) -> None:
    """Write the plot in the format that the file's ending names.

    Raises :class:`UsageError` for an unknown one, :class:`~asr_core.errors.UnavailableError` without a plotting library.
    """
    registry.require("export")
    from matplotlib.figure import Figure

    picture = Figure(figsize=(PANEL_INCHES[0], PANEL_INCHES[1] * len(figures)), layout="constrained")
    known = picture.canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in known:
        raise UsageError(f"{file}: a plot ends in one of: {', '.join(sorted(known))}.")
    panels = picture.subplots(len(figures), 1, squeeze=False, sharex=True)[:, 0]
    for panel, figure in zip(panels, figures, strict=True):
        for name, (times, values) in series(runs, figure).items():
            panel.plot(times, values, marker="o", markersize=3, linewidth=1, label=name)
        panel.set_ylabel(figure)
        panel.grid(visible=True, alpha=0.3)
        if figure.endswith(LOGARITHMIC):
            panel.set_yscale("log", nonpositive="clip")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        picture.legend(handles, labels, loc="outside right upper", fontsize="x-small")
    picture.autofmt_xdate()
    picture.savefig(file)


def series(runs: Sequence[tuple[Run, list[Entry]]], figure: str) -> Series:
    """Times and values of one figure by artifact; the host is named where there are several, None values are left out."""
    several = len({run.host for run, _ in runs}) > 1
    found: Series = {}
    for run, entries in runs:
        for entry in entries:
            value = entry.number(figure)
            if value is None:
                continue
            name = f"{entry.target}-{entry.precision}" + (f" ({run.host_name})" if several else "")
            times, values = found.setdefault(name, ([], []))
            times.append(datetime.fromisoformat(run.time))
            values.append(value)
    return found
