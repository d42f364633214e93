"""The page's plots: matplotlib figures as inline SVG that takes its colours from the page and can be read aloud.

Text stays text, so it follows the page's font; every drawn point of an artifact carries a tooltip.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from parity import columns
from parity.columns import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]

# Placeholder colours that are written into the SVG and replaced by the page's custom properties, so that one picture serves
# light and dark. matplotlib wants real colours; these are no one's choice of colour.
INK, FAINT, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0400{i:02x}" for i in range(8))
_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--line"} | {colour: f"--series-{i}" for i, colour in enumerate(SERIES)}
MARKERS = "osD^vPX*"

WIDTH = 5.0  # inches; 360 SVG units, a telephone's width, so that 10-point text is never drawn smaller than 10 pixels
ROW = 0.24  # inches a line of text needs
LABEL_SPACE = 0.1  # of an axis's height, which a name needs for itself
TINY = 1e-9  # exact agreement has no place on a logarithmic axis: it is drawn here, at the left edge
REFERENCE = "pytorch"
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Plot:
    """A finished picture: SVG text, or None with the reason where there is nothing to draw."""

    key: str
    title: str
    caption: str
    svg: str | None


@dataclass
class Canvas:
    """One figure with its axes, and the tooltips of what is drawn in it."""

    figure: Figure
    axes: list[Axes]
    tips: dict[str, str] = field(default_factory=dict)

    def tip(self, text: str) -> str:
        """An id for an artist whose tooltip this is."""
        key = f"tip-{len(self.tips)}"
        self.tips[key] = text
        return key


def _plot(title: str, caption: str) -> Callable[[Callable[[Document], Canvas | None]], Callable[[Document], Plot]]:
    """Make a drawing function return its picture; its name becomes the picture's key."""

    def decorate(draw: Callable[[Document], Canvas | None]) -> Callable[[Document], Plot]:
        key = draw.__name__.replace("_", "-")

        @wraps(draw)
        def plot(document: Document) -> Plot:
            import matplotlib as mpl

            with mpl.rc_context(_style(key)):
                canvas = draw(document)
                return Plot(key, title, caption, None if canvas is None else _svg(canvas, key, title, caption))

        return plot

    return decorate


@_plot(
    "Size, speed and word errors",
    "One mark an artifact, hollow where it doesn't pass; named where nothing is both smaller and faster. "
    "Above, faster is higher; below, worse is higher, with 95 % intervals where there are any. Dashed: PyTorch.",
)
def trade_off(document: Document) -> Canvas | None:
    """Speed-up and ΔWER over size."""
    rows = [row for row in document["rows"] if _finite(row, "size_mb") and (_finite(row, "speedup") or _finite(row, "delta_wer"))]
    if not rows:
        return None
    canvas = _canvas(2, 5.4, sharex=True)
    speed, errors = canvas.axes
    colours = _colours([row["target"] for row in document["rows"]])
    for row in rows:
        size, label = float(row["size_mb"]), columns.name(row)
        colour, marker = colours[row["target"]]
        for axis, key, scale, unit in ((speed, "speedup", 1, "× PyTorch's speed"), (errors, "delta_wer", 100, "points of WER")):
            if _finite(row, key):
                value = scale * float(row[key])
                tip = f"{label}: {size:.1f} MB, {value:.2f} {unit}, {row['status']}"
                face = colour if row["status"] == "pass" else "none"
                axis.plot(size, value, marker, ms=8, mec=colour, mfc=face, mew=1.6, gid=canvas.tip(tip))
        if (ends := columns.interval(row, "delta_wer")) is not None:
            errors.vlines(size, 100 * ends[0], 100 * ends[1], colour, lw=1)
    speed.set_xscale("log")
    speed.margins(x=0.12)
    speed.axhline(1, color=FAINT, lw=1, ls="--")
    errors.axhline(0, color=FAINT, lw=1, ls="--")
    speed.set_ylabel("speed-up, × PyTorch")
    errors.set_ylabel("ΔWER, points")
    errors.set_xlabel("size, MB")
    _plain_ticks(errors)
    _room(errors, 0.5)
    _room(speed, 0.0)
    _name_the_front(speed, [row for row in rows if _finite(row, "speedup")])
    drawn = {row["target"] for row in rows}
    _legend(canvas, {target: style for target, style in colours.items() if target in drawn})
    return canvas


@_plot(
    "Error by stage",
    "Largest absolute error with PyTorch's tokens forced. An error of 1e-9 or less stands at 1e-9.",
)
def error_by_stage(document: Document) -> Canvas | None:
    """Encoder and logits errors by artifact."""
    stages = (("encoder_max_abs", "encoder states", "o", SERIES[0]), ("logits_max_abs", "logits", "D", SERIES[1]))
    rows = [row for row in _artifacts(document) if any(row.get(key) is not None for key, *_ in stages)]
    if not rows:
        return None
    canvas = _by_artifact(rows)
    (axis,) = canvas.axes
    for y, row in enumerate(rows):
        values = {key: max(float(row[key]), TINY) for key, *_ in stages if _finite(row, key)}
        if values:
            axis.hlines(y, min(values.values()), max(values.values()), GRID, lw=2)
        if any(row.get(key) is not None and key not in values for key, *_ in stages):
            _not_finite(axis, y)
        for key, label, marker, colour in stages:
            if key in values:
                tip = f"{columns.name(row)}, {label}: {values[key]:.1e}"
                axis.plot(values[key], y, marker, ms=7, color=colour, gid=canvas.tip(tip))
    axis.set_xscale("log")
    axis.set_xlabel("largest absolute error")
    _legend(canvas, {label: (colour, marker) for _, label, marker, colour in stages})
    return canvas


@_plot(
    "Divergence of the logits",
    "KL divergence from PyTorch's next-token distribution over the probes' positions: the median, the mean and the worst. "
    "1e-9 or less stands at 1e-9.",
)
def logits_kl(document: Document) -> Canvas | None:
    """Spread of the KL divergence over positions, by artifact."""
    curves = _curves(document)
    rows = [row for row in _artifacts(document) if columns.name(row) in curves]
    if not rows:
        return None
    canvas = _by_artifact(rows)
    (axis,) = canvas.axes
    for y, row in enumerate(rows):
        mean, worst = curves[columns.name(row)]
        if not np.isfinite(worst).all():
            _not_finite(axis, y)
            continue
        values = {"median": np.median(mean), "mean": mean.mean(), "worst": worst.max()}
        drawn = {label: max(float(value), TINY) for label, value in values.items()}
        axis.hlines(y, drawn["median"], drawn["worst"], GRID, lw=2)
        for (label, value), marker, colour in zip(drawn.items(), "oDX", SERIES, strict=False):
            tip = f"{columns.name(row)}, {label}: {value:.1e} nats"
            axis.plot(value, y, marker, ms=7, color=colour, gid=canvas.tip(tip))
    axis.set_xscale("log")
    axis.set_xlabel("KL divergence, nats")
    _legend(canvas, dict(zip(("median", "mean", "worst"), zip(SERIES, "oDX", strict=False), strict=False)))
    return canvas


@_plot(
    "Divergence by position",
    "Mean KL divergence over the probes at each token after the prompt. A line that rises betrays a faulty cache.",
)
def kl_by_position(document: Document) -> Canvas | None:
    """Mean KL divergence by position, one panel a target and one line an artifact."""
    curves = {name: curve for name, curve in _curves(document).items() if np.isfinite(curve[1]).all()}
    rows = [row for row in _artifacts(document) if columns.name(row) in curves]
    if not rows:
        return None
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = -(-len(targets) // 2)
    canvas = _canvas(lines, 0.9 + 1.5 * lines, columns=min(2, len(targets)), sharex=True, sharey=True)
    styles = _colours([row["precision"].partition("-")[0] for row in rows])
    panels = dict(zip(targets, canvas.axes, strict=False))
    for row in rows:
        mean, _ = curves[columns.name(row)]
        colour, marker = styles[row["precision"].partition("-")[0]]
        tip = f"{columns.name(row)}: {mean.min():.1e} to {mean.max():.1e} nats"
        panels[row["target"]].plot(np.maximum(mean, TINY), marker=marker, ms=4, lw=1.4, color=colour, gid=canvas.tip(tip))
    for target, axis in panels.items():
        axis.set_title(_text(target), loc="left")
    canvas.axes[0].set_yscale("log")
    for axis in canvas.axes[len(targets) :]:
        axis.set_visible(False)
    canvas.axes[-min(2, len(targets))].set_xlabel("token after the prompt")
    canvas.figure.supylabel("KL divergence, nats", fontsize=10)
    _legend(canvas, styles)
    return canvas


@_plot(
    "Latency",
    "Time of an utterance, batch 1: the box holds the middle half, the whiskers 5 to 95 %, dots are the fastest and the slowest. "
    "Dashed: PyTorch's median.",
)
def latency(document: Document) -> Canvas | None:
    """Distribution of the utterances' times, by artifact."""
    times: dict[str, list[float]] = {}
    for utterance in document.get("utterances", []):
        for name, heard in utterance["heard"].items():
            if heard["latency_s"] is not None:
                times.setdefault(name, []).append(1000 * heard["latency_s"])
    if not times:
        return None
    rows = [row for row in document["rows"] if columns.name(row) in times]
    canvas = _by_artifact(rows)
    (axis,) = canvas.axes
    for y, row in enumerate(rows):
        _box(canvas, y, columns.name(row), np.array(times[columns.name(row)]))
    baseline = next((times[columns.name(row)] for row in rows if row["target"] == REFERENCE), None)
    if baseline:
        axis.axvline(float(np.median(baseline)), color=FAINT, lw=1, ls="--")
    axis.set_xscale("log")
    axis.set_xlabel("milliseconds an utterance")
    _plain_ticks(axis)
    return canvas


def _box(canvas: Canvas, y: int, name: str, values: np.ndarray[Any, Any]) -> None:
    (axis,) = canvas.axes
    low, first, middle, third, high = np.percentile(values, (5, 25, 50, 75, 95))
    tip = canvas.tip(f"{name}: median {middle:.0f} ms, 5 to 95 % {low:.0f} to {high:.0f} ms")
    axis.hlines(y, low, high, INK, lw=1)
    # A hair's breadth at least: equal times are still a box.
    axis.barh(y, max(third - first, 1e-3 * middle), left=first, height=0.55, color=SERIES[0], gid=tip)
    axis.vlines(middle, y - 0.32, y + 0.32, INK, lw=2)
    axis.plot([values.min(), values.max()], [y, y], "o", ms=2.2, color=FAINT)


def _name_the_front(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the names of the artifacts that no other beats in both size and speed."""
    fastest = 0.0
    front = []
    for row in sorted(rows, key=lambda row: (float(row["size_mb"]), -float(row["speedup"]))):
        if float(row["speedup"]) > fastest:
            fastest = float(row["speedup"])
            front.append(row)
    middle = np.sqrt(np.prod(axis.get_xlim()))
    lines: list[float] = []
    low, high = axis.get_ylim()
    for row in front:
        size, speed = float(row["size_mb"]), float(row["speedup"])
        line = (speed - low) / (high - low)
        if any(abs(line - taken) < LABEL_SPACE for taken in lines):
            continue  # it would be written over a name; the mark's tooltip has it
        lines.append(line)
        offset, side = (8, "left") if size < middle else (-8, "right")
        name = _text(columns.name(row))
        axis.annotate(name, (size, speed), (offset, 0), textcoords="offset points", ha=side, va="center")


def _curves(document: Document) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Mean and maximum KL by position of every row that has them."""
    return {
        name: (np.array(curve["mean"], dtype=float), np.array(curve["max"], dtype=float))
        for name, curve in document.get("positions", {}).items()
    }


def _not_finite(axis: Axes, y: float) -> None:
    """Say where an error has no place on the axis: a broken artifact must not look like one without errors."""
    axis.annotate("not a number", (1, y), xycoords=("axes fraction", "data"), ha="right", va="center")


def _artifacts(document: Document) -> list[Mapping[str, Any]]:
    return [row for row in document["rows"] if row["target"] != REFERENCE]


def _finite(row: Mapping[str, Any], key: str) -> bool:
    value = number(row.get(key))
    return value is not None and bool(np.isfinite(value))


def _colours(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every name; the marker tells them apart where colours can't."""
    return {name: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(dict.fromkeys(names))}


def _canvas(lines: int, height: float, *, columns: int = 1, **options: Any) -> Canvas:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(lines, columns, squeeze=False, **options).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(visible=True)
    return Canvas(figure, list(axes))


def _by_artifact(rows: Sequence[Mapping[str, Any]]) -> Canvas:
    """Axes with one line an artifact, the first on top."""
    canvas = _canvas(1, 1.1 + ROW * len(rows))
    (axis,) = canvas.axes
    axis.set_yticks(range(len(rows)), [_text(columns.name(row)) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    return canvas


def _text(name: str) -> str:
    """A name as it stands: matplotlib would read what is between dollar signs as mathematics."""
    return name.replace("$", r"\$")


def _room(axis: Axes, least: float) -> None:
    """Leave room around the marks, and ``least`` units at each side, so that small differences don't look large."""
    low, high = axis.get_ylim()
    spread = 0.08 * (high - low)
    axis.set_ylim(min(low - spread, -least) if least else min(0.0, low), max(high + spread, least))


def _plain_ticks(axis: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _legend(canvas: Canvas, entries: Mapping[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, ls="none", label=_text(label)) for label, (colour, marker) in entries.items()
    ]
    canvas.figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, handletextpad=0.1, columnspacing=1)


def _style(key: str) -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.size": 10,
        "legend.fontsize": 10,
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "axes.labelsize": 10,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.formatter.use_mathtext": False,
    }


def _svg(canvas: Canvas, key: str, title: str, caption: str) -> str:
    """The figure as an SVG element for HTML: no foreign metadata, its own ids, named for those who can't see it."""
    raw = io.StringIO()
    canvas.figure.savefig(raw, format="svg", metadata={"Date": None})
    root = ET.fromstring(raw.getvalue())  # noqa: S314 - matplotlib's own output
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    _name(root, key, title, caption)
    for element in root.iter():
        _localise(element, key)
        if (tip := canvas.tips.get(element.get("id", "").removeprefix(f"{key}-"))) is not None:
            note = ET.Element("title")
            note.text = tip
            element.insert(0, note)
    text = ET.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def _name(root: ET.Element, key: str, title: str, caption: str) -> None:
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-description")
    for at, (tag, suffix, text) in enumerate((("title", "title", title), ("desc", "description", caption))):
        element = ET.Element(tag, {"id": suffix})
        element.text = text
        root.insert(at, element)


def _localise(element: ET.Element, key: str) -> None:
    """Drop the name spaces, which HTML knows by itself, and prefix the ids, which must be unique on the whole page."""
    element.tag = element.tag.removeprefix(_SVG)
    if "id" in element.attrib:
        element.set("id", f"{key}-{element.attrib['id']}")
    if (link := element.attrib.pop(_LINK, None)) is not None:
        element.set("href", f"#{key}-{link.removeprefix('#')}")
    for attribute, value in element.attrib.items():
        if "url(#" in value:
            element.set(attribute, re.sub(r"url\(#", f"url(#{key}-", value))
