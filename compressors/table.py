"""The comparison as Markdown and as a picture, and whether it beats what others published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.comparison import ORIGINAL, PLAIN, PYTORCH, Line
from compressors.published import POINTS, Published
from compressors.winograd import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

NOTHING = "–"
HEADER = (
    "technique", "runtime", "body, MB", "embedding, MB", "files, MB", "smaller", "WER %", "ΔWER, points [95 %]", "CER %",
    "identical", "KL", "ms a window", "faster", "peak MB",
)  # fmt: skip
LEFT = 2  # columns of words
POINT = 100  # in a fraction


@dataclass(frozen=True)
class Speed:
    """By turns with the original's plain artifact of the same target: how many times as fast, and seconds a window."""

    faster: float
    seconds: float


@dataclass(frozen=True)
class Trade:
    """What a line gains and costs beside the original's plain artifact of the same target; None is not measured.

    ``smaller`` and ``faster`` are factors, ``worse`` the relative increase of the WER.
    """

    line: Line
    smaller: float | None
    faster: float | None
    worse: float | None


def trades(lines: Sequence[Line], speeds: Mapping[str, Speed]) -> list[Trade]:
    """Every measured line beside its original; ``speeds`` are by :func:`key`."""
    plain = {line.artifact: line for line in lines if line.recipe == ORIGINAL}
    found = []
    for line in lines:
        if line.wer is None:
            continue
        base = plain.get(f"{line.target}-{PLAIN}")
        smaller = base.size_mb / line.size_mb if base and base.size_mb and line.size_mb else None
        worse = line.delta_wer / (line.wer - line.delta_wer) if line.delta_wer is not None and line.wer > line.delta_wer else None
        speed = speeds.get(key(line))
        found.append(Trade(line, smaller, speed.faster if speed else None, worse))
    return found


def key(line: Line) -> str:
    """A line's name."""
    return f"{line.recipe}.{line.artifact}"


def markdown(lines: Sequence[Line], speeds: Mapping[str, Speed], kernels: Sequence[Measured]) -> str:
    """The table, Winograd's rows, the published points beside it, and what could not be made."""
    found = trades(lines, speeds)
    rows = [
        HEADER,
        ["---"] * LEFT + ["---:"] * (len(HEADER) - LEFT),
        *(_cells(trade, speeds.get(key(trade.line))) for trade in found),
    ]
    text = ["\n".join(_row(row) for row in rows), ""]
    text += [_told(kernel) for kernel in kernels]
    text += ["", "Published by others, on their models and data:", ""]
    theirs = [("technique", "study", "smaller", "faster", "WER, relative", "beside it, ours"), ["---"] * 6]
    text.append("\n".join(_row(row) for row in [*theirs, *(_published(point, found) for point in POINTS)]))
    problems = [line for line in lines if line.problem]
    if problems:
        text += ["", "Not measured:", "", *(f"- {line.title}, {line.artifact}: {line.problem}" for line in problems)]
    return "\n".join(text) + "\n"


def _told(kernel: Measured) -> str:
    return (
        f"- Winograd F(2, 3) for the first convolution, width {kernel.width}: {_factor(kernel.faster)} as fast as PyTorch's "
        f"convolution, error {kernel.error:.0e}."
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(trade: Trade, speed: Speed | None) -> list[str]:
    line = trade.line
    return [
        line.title,
        line.artifact,
        _number(line.body_mb, ".2f"),
        _number(line.embedding_mb, ".2f"),
        _number(line.size_mb, ".2f"),
        _factor(trade.smaller),
        _number(line.wer, ".2f", POINT),
        _delta(line),
        _number(line.cer, ".2f", POINT),
        _number(line.identical, ".0f", POINT, " %"),
        _number(line.kl, ".1g"),
        _number(speed.seconds if speed else None, ".0f", 1000),
        _factor(trade.faster),
        _number(line.peak_rss_mb, ".0f"),
    ]


def _delta(line: Line) -> str:
    if line.delta_wer is None or line.interval is None:
        return NOTHING
    if line.recipe == ORIGINAL and line.artifact.startswith(PYTORCH):
        return ""
    low, high = (POINT * end for end in line.interval)
    return f"{POINT * line.delta_wer:+.2f} [{low:+.2f}, {high:+.2f}]"


def _number(value: float | None, form: str, scale: float = 1, unit: str = "") -> str:
    return NOTHING if value is None else f"{scale * value:{form}}{unit}"


def _factor(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}×"


def _published(point: Published, found: Sequence[Trade]) -> list[str]:
    worse = NOTHING if point.worse is None else f"{point.worse:+.1%}"
    return [point.technique, point.study, _factor(point.smaller), _factor(point.faster), worse, verdict(point, found)]


def verdict(point: Published, found: Sequence[Trade]) -> str:
    """Which artifact of ours, of the same kind of technique, is better in all that they tell; else the nearest, and why."""
    ours = [trade for trade in found if set(trade.line.methods) & set(point.methods) and trade.line.target != PYTORCH]
    if not ours:
        return "not measured"

    def rank(trade: Trade) -> tuple[int, float, float]:
        return (len(_missed(point, trade)), -min(_margins(point, trade), default=0.0), trade.worse or 0.0)

    best = min(ours, key=rank)
    told = f"{best.line.title} ({best.line.artifact}): {_factor(best.smaller)} smaller, {_factor(best.faster)} as fast"
    told += f", WER {best.worse:+.1%}" if best.worse is not None else ""
    missed = _missed(point, best)
    return f"beaten by {told}" if not missed else f"**not beaten** ({', '.join(missed)}); nearest: {told}"


def _margins(point: Published, trade: Trade) -> list[float]:
    """By which share each figure of theirs is exceeded; negative where it is missed."""
    factors = [
        (ours or 0.0) / theirs - 1
        for ours, theirs in ((trade.smaller, point.smaller), (trade.faster, point.faster))
        if theirs is not None
    ]
    return factors + ([point.worse - (trade.worse or 0.0)] if point.worse is not None else [])


def _missed(point: Published, trade: Trade) -> list[str]:
    missed = []
    if point.smaller is not None and (trade.smaller or 0.0) < point.smaller:
        missed.append("size")
    if point.faster is not None and (trade.faster or 0.0) < point.faster:
        missed.append("speed")
    if point.worse is not None and (trade.worse is None or trade.worse >= point.worse):
        missed.append("WER")
    return missed


# Families of techniques, by the method that names them best: (methods, name, colour).
FAMILIES = (
    (("distil", "layers"), "fewer layers", "#8c564b"),
    (("ffn", "heads"), "narrower layers", "#2ca02c"),
    (("lowrank",), "low rank", "#9467bd"),
    (("prune",), "zeros", "#d62728"),
    (("cluster",), "clustering", "#ff7f0e"),
    (("quantise", "qat", "static", "smooth"), "quantisation", "#1f77b4"),
)
MARKERS = "osPv^X"
THEIRS = "D"
FACTORS = (0.8, 1, 1.5, 2, 3, 4, 6)
CHANGES = (-20, -10, 0, 10, 20, 50, 100, 200, 500, 1000)  # % of the WER
LINEAR = 10  # up to here the axis of changes is not logarithmic


def plot(lines: Sequence[Line], speeds: Mapping[str, Speed], file: Path) -> None:
    """Draw what size and speed cost in WER: every artifact, one colour a family, one marker a target; others' points hollow."""
    from matplotlib.figure import Figure

    found = [trade for trade in trades(lines, speeds) if trade.line.target != PYTORCH and trade.line.recipe != ORIGINAL]
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, figure_of, label in zip(panels, ("smaller", "faster"), ("smaller than", "as fast as"), strict=True):
        _points(axes, found, figure_of)
        for point in POINTS:
            x = getattr(point, figure_of)
            if x is not None and point.worse is not None:
                _point(axes, x, point.worse, point.technique, marker=THEIRS, color="grey", mfc="none")
        axes.axhline(0, color="black", lw=0.6)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.set_xticks(FACTORS, [f"{factor:g}×" for factor in FACTORS])
        axes.set_yticks(CHANGES, [f"{change:+d} %" if change else "0" for change in CHANGES])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.set_xlabel(f"{label} the original's float32 artifact of the same runtime")
    panels[0].set_ylabel("change of the word error rate, relative")
    figure.legend(handles=_legend({trade.line.target for trade in found}), fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=130)


def _points(axes: Axes, found: Sequence[Trade], figure_of: str) -> None:
    markers = dict(zip(sorted({trade.line.target for trade in found}), MARKERS, strict=False))
    for trade in found:
        x = getattr(trade, figure_of)
        if x is not None and trade.worse is not None:
            _point(axes, x, trade.worse, trade.line.recipe, marker=markers[trade.line.target], color=_colour(trade.line))


def _point(axes: Axes, x: float, worse: float, label: str, **style: Any) -> None:
    axes.plot(x, POINT * worse, ms=7, ls="", alpha=0.85, **style)
    axes.annotate(label, (x, POINT * worse), (6, -3), textcoords="offset points", fontsize=6.5, color=style["color"])


def _legend(targets: set[str]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    families = [Line2D([], [], ls="", marker="o", color=colour, label=name) for _, name, colour in FAMILIES]
    runtimes = [
        Line2D([], [], ls="", marker=marker, color="black", mfc="none", label=target)
        for target, marker in zip(sorted(targets), MARKERS, strict=False)
    ]
    return [*families, *runtimes, Line2D([], [], ls="", marker=THEIRS, mfc="none", color="grey", label="published by others")]


def _colour(line: Line) -> str:
    return next((colour for methods, _, colour in FAMILIES if set(methods) & set(line.methods)), "black")
