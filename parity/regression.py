"""Judge a run against its own host's past: what got worse by more than it has always varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from parity.history import Entry, History, Run
from parity.measure import REFERENCE

# Fewer runs say nothing about how much a figure varies.
LEAST_RUNS = 5
# Only the newest runs are the past, so that a change which somebody accepted stops being reported after half as many nights.
WINDOW = 20
# Spreads that a figure may lie beyond its median. The MAD of five runs is itself uncertain, so it takes the floors below to
# keep the alarms rare: of simulated normal figures that vary as much as their floor 0.01 % are called regressions after
# five runs, of those that vary twice as much 1.2 %; after twenty runs 0.01 % and 0.2 %.
FACTOR = 4.0
# The MAD of normally distributed values times this is their standard deviation.
MAD_TO_SD = 1.4826
# What a run that failed measured is nobody's yardstick; what is undecided was measured well, on too few clips.
COUNTED = ("pass", "undecided")


@dataclass(frozen=True)
class Figure:
    """A figure that can get worse. Its spread is never taken for less than the largest of three floors.

    ``absolute`` is in the figure's unit, ``relative`` a share of the median, ``flips`` counts utterances (a share of the set).
    What may change is :data:`FACTOR` times that; ``reason`` justifies it. ``timed`` figures want PyTorch's time of the same run.
    """

    name: str
    higher_is_better: bool
    reason: str
    absolute: float = 0.0
    relative: float = 0.0
    flips: float = 0.0
    timed: bool = False

    def spread(self, past: Sequence[float], utterances: int) -> float:
        """Standard deviation of the past as its MAD tells it, or the floor."""
        middle = median(past)
        mad = MAD_TO_SD * median(abs(value - middle) for value in past)
        return max(mad, self.absolute, self.relative * abs(middle), self.flips / utterances)


# Seconds are not among them: they tell how busy a machine was. `speedup` holds them against PyTorch's of the same run.
FIGURES = (
    Figure(
        "speedup", True, "on a shared two-core machine, calm nights vary by 2 to 7 %: a fifth is more than a bad neighbour",
        relative=0.04, timed=True,
    ),
    Figure("peak_rss_mb", False, "repeats varied by 1 % (allocators, the order of threads)", relative=0.01),
    Figure("size_mb", False, "the same build repeats to the byte but for embedded names and dates: some bytes", relative=4e-4),
    Figure(
        "encoder_max_abs", False, "another build of a kernel rounds in another order, which moves the largest of many roundings "
        "by half its size; 1e-5 in all is float32's own (thresholds.toml)", absolute=2e-6, relative=0.1,
    ),
    Figure("logits_max_abs", False, "as encoder_max_abs", absolute=2e-6, relative=0.1),
    Figure("top1_agreement", True, "one near-tie among the hundred positions of the probes", absolute=2.5e-3),
    Figure("token_match", True, "one utterance may flip where PyTorch itself is undecided, two may not", flips=0.25),
    Figure("wer", False, "a flipped utterance changes one or two words: a third of a carried clip's", flips=0.08, absolute=6e-4),
    Figure("delta_wer", False, "as wer", flips=0.08, absolute=6e-4),
    Figure("cer", False, "as wer", flips=0.08, absolute=6e-4),
)  # fmt: skip

# A busy machine does not slow all runtimes alike (seven nights, one of them with PyTorch at a quarter of its speed: the
# speed-ups fell by a fifth). So PyTorch's own speed tells whether a night can judge speeds at all.
WITNESS = Figure("rtfx", True, "calm nights vary by 6 %; a quarter less is another machine than the past's", relative=0.05)


@dataclass(frozen=True)
class Regression:
    """One figure of one artifact beyond its past: median ± spread over a number of runs."""

    target: str
    precision: str
    figure: str
    median: float
    spread: float
    runs: int
    today: float

    def __str__(self) -> str:
        past = f"{self.median:.4g} ± {self.spread:.2g} over {self.runs} runs"
        return f"{self.target}-{self.precision} {self.figure}: {self.today:.4g} today, {past} before"


@dataclass(frozen=True)
class Judgement:
    """A run against the past: its regressions, and how many runs each artifact has that cannot be judged yet, by name.

    ``busy`` tells by how much PyTorch itself was slower than ever; speeds are not judged then.
    """

    regressions: list[Regression]
    judged: int
    not_enough: dict[str, int]
    busy: Regression | None


def document(judgement: Judgement) -> dict[str, Any]:
    """A judgement as JSON-able data."""
    return asdict(judgement)


def judge(history: History, run: Run) -> Judgement:
    """Hold every artifact of a run against the same artifact on the same host, checkpoint, data and threads."""
    regressions: list[Regression] = []
    not_enough: dict[str, int] = {}
    entries = [entry for entry in history.entries(run.id) if entry.status in COUNTED]
    pasts = [history.past(run, entry.target, entry.precision, COUNTED, WINDOW) for entry in entries]
    witnesses = [pair for pair in zip(entries, pasts, strict=True) if pair[0].target == REFERENCE]
    busy = next((slow for entry, past in witnesses if (slow := _judge(WITNESS, run, entry, past))), None)
    figures = [figure for figure in FIGURES if not (figure.timed and (busy or run.resumed))]
    for entry, past in zip(entries, pasts, strict=True):
        if len(past) < LEAST_RUNS:
            not_enough[f"{entry.target}-{entry.precision}"] = len(past)
            continue
        found = (_judge(figure, run, entry, past) for figure in figures)
        regressions += [regression for regression in found if regression]
    return Judgement(regressions, len(entries) - len(not_enough), not_enough, busy)


def _judge(figure: Figure, run: Run, entry: Entry, past: list[tuple[Run, Entry]]) -> Regression | None:
    today = entry.number(figure.name)
    comparable = [old for before, old in past if not (figure.timed and before.resumed)]
    values = [value for old in comparable if (value := old.number(figure.name)) is not None]
    if today is None or len(values) < LEAST_RUNS:
        return None
    middle, spread = median(values), figure.spread(values, run.utterances)
    worse = middle - today if figure.higher_is_better else today - middle
    if worse <= FACTOR * spread:
        return None
    return Regression(entry.target, entry.precision, figure.name, middle, spread, len(values), today)
