"""What a set of utterances can tell: paired intervals, non-inferiority, how many utterances it would take, and quality rates.

Everything works on integer counts per utterance, an utterance being the unit that is sampled.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

CONFIDENCE = 0.95
# An end of the interval then repeats to 1.4 % of its half-width from seed to seed (standard error of a normal 2.5 % quantile).
RESAMPLES = 10_000
SEED = 20_260_101
BATCH = 1000  # resamples drawn at a time: of 10,000 utterances 80 MB
TAIL = (1 - CONFIDENCE) / 2
Z = 1.959964  # standard normal quantile at 1 - TAIL
Z_POWER = 0.841621  # at 0.8: four sets of the advised size in five give a verdict
# openai-whisper's own sign of a loop (transcribe.py, compression_ratio_threshold): text that zlib shrinks this much.
LOOP_COMPRESSION = 2.4
# Shorter loops don't shrink: a phrase of up to eight words said at least five times in a row. People say a digit thrice.
LOOP_REPEATS = 5
LOOP_WORDS = 8
LOOP = re.compile(rf"(?<!\S)(\S+(?: \S+){{0,{LOOP_WORDS - 1}}}?)(?: \1){{{LOOP_REPEATS - 1}}}(?!\S)")


@dataclass(frozen=True)
class Edits:
    """Edit counts of every utterance, int64 [N]: all errors, the insertions among them, and the reference's words."""

    errors: Counts
    insertions: Counts
    words: Counts

    @property
    def rate(self) -> float | None:
        """Pooled errors a reference word; None where the set holds no words at all."""
        return float(self.errors.sum() / self.words.sum()) if self.words.sum() else None

    @property
    def insertion_rate(self) -> float | None:
        """Pooled insertions a reference word; None where the set holds no words at all."""
        return float(self.insertions.sum() / self.words.sum()) if self.words.sum() else None


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval, fractions."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """``pass``, ``fail`` or ``undecided``; why not ``pass``, and how many utterances would tell where that can be said."""

    status: str
    reason: str = ""
    needed: int | None = None


def delta_interval(reference: Edits, candidate: Edits, resamples: int = RESAMPLES, seed: int = SEED) -> Interval | None:
    """Difference of two pooled error rates on the same utterances, with its paired bootstrap percentile interval.

    Utterances are drawn with replacement and each keeps both of its error counts (Bisani and Ney 2004, "Bootstrap estimates
    for confidence intervals in ASR performance evaluation"). A resample without a single word has no rate and is left out.
    Sets without a difference give an interval of width zero: that is all they can say. None where the set has no words.
    """
    words = reference.words
    if not words.sum():
        return None
    # Utterances with the same counts are the same ticket: drawing how often each kind comes up is drawing the utterances.
    kinds, tickets = np.unique(np.stack([candidate.errors - reference.errors, words], axis=1), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    shares = tickets / tickets.sum()
    batches = [min(BATCH, resamples - done) for done in range(0, resamples, BATCH)]
    sums = np.concatenate([generator.multinomial(len(words), shares, size) @ kinds for size in batches])
    spoken = sums[sums[:, 1] > 0]
    low, high = np.quantile(spoken[:, 0] / spoken[:, 1], [TAIL, 1 - TAIL])
    return Interval(float((candidate.errors - reference.errors).sum() / words.sum()), float(low), float(high))


def non_inferiority(interval: Interval, margin: float, accepted: float | None = None) -> Verdict:
    """Judge a difference of error rates: the loss must surely be below ``margin``, and its estimate at most ``accepted``.

    All in fractions. ``pass``: the interval ends below the margin and the estimate is accepted. ``fail``: the interval ends
    below the margin, so the set is large enough, and the estimate isn't accepted; or the interval begins beyond what is
    accepted (without ``accepted``: beyond the margin), so the loss is real whatever the size of the set. Anything else is
    ``undecided``. An estimate beyond the bounds doesn't fail by itself: on ten utterances one wrong word is
    two points. What is not a number fails.
    """
    limit = margin if accepted is None else accepted
    shown = (
        f"ΔWER {100 * interval.estimate:+.2f} points, {100 * CONFIDENCE:.0f} % interval "
        f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}"
    )
    if not all(map(math.isfinite, (interval.estimate, interval.low, interval.high))):
        return Verdict("fail", f"{shown}: not a number")
    if interval.low > limit:
        return Verdict("fail", f"{shown}: all of it beyond {100 * limit:g}")
    if interval.high >= margin:
        return Verdict("undecided", f"{shown} reaches the margin of {100 * margin:g}")
    if interval.estimate > limit:
        return Verdict("fail", f"{shown}: more than {100 * limit:g} points")
    return Verdict("pass")


def utterances_needed(reference: Edits, candidate: Edits, margin: float) -> int | None:
    """Utterances after which a set like this one would tell a loss from ``margin`` (a fraction), four times in five.

    Normal approximation: n = ((z₀.₉₇₅ + z₀.₈) s / (margin - Δ))² (Julious 2004, "Sample sizes for clinical trials with
    normal data", section 5, one group of paired differences), where s is the spread of an utterance's share in a ratio of
    sums (Cochran 1977, "Sampling techniques", section 6.4): (dᵢ - Δ wᵢ) over the mean number of words. With Δ beyond the
    margin it is what would show that. None where nothing differs, or the estimate stands on the margin.
    """
    words = reference.words
    extra = candidate.errors - reference.errors
    if len(words) < 2 or not words.sum():  # noqa: PLR2004 - a spread takes two
        return None
    delta = float(extra.sum() / words.sum())
    spread = float(np.std((extra - delta * words) / words.mean(), ddof=1))
    distance = abs(margin - delta)
    if not spread or not distance:
        return None
    return math.ceil(((Z + Z_POWER) * spread / distance) ** 2)


def at_least(hits: int, count: int, share: float) -> Verdict:
    """Judge a share of utterances: ``pass`` where ``hits`` of ``count`` reach it.

    ``fail`` where so few hits have a probability below 2.5 % in a population that just reaches it (exact binomial test),
    otherwise ``undecided``, with the number of utterances of the normal approximation.
    """
    observed = hits / count
    if observed >= share:
        return Verdict("pass")
    shown = f"{observed:.3g} < {share:g}"
    if _binomial_tail(hits, count, share) < TAIL:
        return Verdict("fail", shown)
    spread = math.sqrt(share * (1 - share))
    needed = math.ceil(((Z + Z_POWER) * spread / (share - observed)) ** 2)
    return Verdict("undecided", f"{shown} on {count} utterances, which a good artifact may show by chance", needed)


def _binomial_tail(hits: int, count: int, share: float) -> float:
    """Probability of at most ``hits`` among ``count``."""
    if share >= 1:
        return 0.0 if hits < count else 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(share) + (count - k) * math.log1p(-share)
        for k in range(hits + 1)
    ]  # fmt: skip
    return math.fsum(map(math.exp, logs))


def quality(spoken: list[str], heard: list[str], reference: Edits, candidate: Edits) -> dict[str, float | None]:
    """Quality of inference, fractions of the utterances: not worse than the reference's, empty, looping; and insertions a word.

    An output is empty where words were spoken and none is heard; it loops by :func:`loops` where what was spoken does not.
    """
    speaking = [text for said, text in zip(spoken, heard, strict=True) if said]
    looping = [loops(text) and not loops(said) for said, text in zip(spoken, heard, strict=True)]
    return {
        "no_worse_share": float((candidate.errors <= reference.errors).mean()),
        "empty_rate": sum(not text for text in speaking) / len(speaking) if speaking else None,
        "loop_rate": sum(looping) / len(looping),
        "insertion_rate": candidate.insertion_rate,
    }


def loops(text: str) -> bool:
    """Whether a normalised text repeats itself as a stuck decoder does.

    Either zlib shrinks it more than 2.4 times (openai-whisper's rule, which long loops meet), or a phrase of one to eight
    words comes five times in a row.
    """
    return compression_ratio(text) > LOOP_COMPRESSION or LOOP.search(text) is not None


def compression_ratio(text: str) -> float:
    """UTF-8 bytes of a text over those that zlib makes of it; as in openai-whisper's ``utils.py``."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data))


def worst(verdicts: Iterable[Verdict]) -> str:
    """The status of several verdicts together: one failure fails, one doubt leaves it undecided."""
    statuses = {verdict.status for verdict in verdicts}
    return next((status for status in ("fail", "undecided") if status in statuses), "pass")


def describe() -> dict[str, Any]:
    """How the intervals come about, for the report."""
    return {"interval": "paired bootstrap, percentile", "confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED}
