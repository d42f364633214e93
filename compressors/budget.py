"""What a search must stay within: ``size<=3MB, delta_wer<=0.5, latency_p95<=50ms``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from asr_core.errors import UsageError

TERM = re.compile(r"(?P<figure>\w+)\s*<=\s*(?P<number>[-+.\deE]+?)\s*(?P<unit>[a-zA-Z%]*)")
TIMES = {"s": 1.0, "ms": 1e-3}
SIZES = {"MB": 1.0, "kB": 1e-3, "KB": 1e-3, "GB": 1e3}
# A figure, its units (the first is the one that it is kept and shown in), and what its excess is measured by where the
# limit is zero.
UNITS: dict[str, dict[str, float]] = {
    "size": SIZES,
    "delta_wer": {"points": 1.0, "pt": 1.0, "%": 1.0},
    "latency_p50": TIMES,
    "latency_p95": TIMES,
    "memory": SIZES,
}


@dataclass(frozen=True)
class Figures:
    """What one artifact measures: MB (10⁶ bytes), points of word error rate above the source's, seconds an utterance.

    ``delta_wer_low`` is the lower end of the 95 % interval. ``status`` is the gate's verdict as in :class:`parity.compare.Row`.
    NaN where nothing was measured.
    """

    size: float
    delta_wer: float
    delta_wer_low: float
    latency_p50: float
    latency_p95: float
    memory: float
    status: str = "pass"
    reason: str = ""

    @property
    def measured(self) -> bool:
        """Whether more than the size is known."""
        return not math.isnan(self.latency_p50)


def too_large(size: float) -> Figures:
    """Of an artifact that was not run, because its size alone is too much."""
    unknown = float("nan")
    return Figures(size, unknown, unknown, unknown, unknown, unknown, status="fail", reason=f"{size:.2f} MB")


@dataclass(frozen=True)
class Bound:
    """A figure and what it may be at most."""

    figure: str
    limit: float

    @property
    def unit(self) -> str:
        """The unit of the limit."""
        return next(iter(UNITS[self.figure]))

    def excess(self, figures: Figures) -> float:
        """How far the figure is above the limit, as a share of it (of one unit, where it is zero); at most 0 where it is met.

        A figure that was not measured, because another one was above its limit already, exceeds nothing.
        """
        value = getattr(figures, self.figure)
        return 0.0 if math.isnan(value) else float((value - self.limit) / (abs(self.limit) or 1.0))

    def __str__(self) -> str:
        return f"{self.figure}<={self.limit:g} {self.unit}"


@dataclass(frozen=True)
class Budget:
    """Bounds that all have to be met."""

    bounds: Sequence[Bound]

    def limit(self, figure: str) -> float | None:
        """The limit of a figure, if it has one."""
        return next((bound.limit for bound in self.bounds if bound.figure == figure), None)

    def exceeded(self, figures: Figures) -> list[Bound]:
        """The bounds that are not met."""
        return [bound for bound in self.bounds if bound.excess(figures) > 0]

    def excess(self, figures: Figures) -> float:
        """The sum of all excesses; 0 where the budget is met."""
        return sum(max(0.0, bound.excess(figures)) for bound in self.bounds)

    def __str__(self) -> str:
        return ", ".join(map(str, self.bounds))


def parse(text: str) -> Budget:
    """Read a budget; raises :class:`UsageError` naming the term that is wrong."""
    bounds = [_bound(term.strip()) for term in text.replace("≤", "<=").split(",") if term.strip()]
    if not bounds:
        raise UsageError("the budget is empty; it looks like 'size<=3MB, delta_wer<=0.5, latency_p95<=50ms'.")
    twice = [bound.figure for i, bound in enumerate(bounds) if bound.figure in {other.figure for other in bounds[:i]}]
    if twice:
        raise UsageError(f"the budget bounds {twice[0]} twice.")
    return Budget(bounds)


def _bound(term: str) -> Bound:
    found = TERM.fullmatch(term)
    if not found:
        raise UsageError(f"budget: {term!r} is not FIGURE<=NUMBER with a unit, as size<=3MB.")
    figure, unit = found["figure"], found["unit"]
    if figure not in UNITS:
        raise UsageError(f"budget: unknown figure {figure!r}; the known ones: {', '.join(UNITS)}.")
    if unit and unit not in UNITS[figure]:
        raise UsageError(f"budget: {figure} is not measured in {unit!r}, but in {', '.join(UNITS[figure])}.")
    try:
        limit = float(found["number"]) * (UNITS[figure][unit] if unit else 1.0)
    except ValueError:
        raise UsageError(f"budget: {found['number']!r} in {term!r} is no number.") from None
    if not math.isfinite(limit) or (figure != "delta_wer" and limit <= 0):
        raise UsageError(f"budget: nothing can have {term!r}; the limit must be above 0.")
    return Bound(figure, limit)
