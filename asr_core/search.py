"""Which tokens go on: search strategies over next-token logits, and the choice between what they found.

The rules are those of openai-whisper's ``decoding.py``: ``GreedyDecoder``, ``BeamSearchDecoder``, ``MaximumLikelihoodRanker``.
A search begins with one row of logits a window; each step tells which rows of the last one its rows go on from, so that
windows open as many rows as they need and finished ones leave the batch.

Axes: N open rows, M rows of the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """One possible answer: tokens without the end, and their summed log-probability, the end's included where it was chosen."""

    tokens: tuple[int, ...] = ()
    sum_logprob: float = 0.0


@dataclass(frozen=True)
class _Open:
    """A row of the batch: the window that it belongs to, and which of that window's rows it is."""

    window: int
    member: int
    so_far: Candidate = field(default_factory=Candidate)


class Search(Protocol):
    """A strategy over the windows of one batch."""

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """The new tokens of every open row, in the order in which the next logits must come."""

    def advance(self, logits: Logits) -> tuple[Rows, Rows]:
        """Filtered logits [N, vocab] of the open rows → next tokens [M] and, for each, the row of ``logits`` it goes on from."""

    def candidates(self) -> list[list[Candidate]]:
        """What was found for each window, best or first one first; call it once the search is over."""


def log_total(logits: Logits) -> NDArray[np.float64]:
    """The logarithm of the sum of exponentials over the last axis: what turns a logit into a log-probability."""
    highest = logits.max(axis=-1, keepdims=True)
    shifted = logits - highest
    total: NDArray[np.float64] = np.exp(shifted, out=shifted).sum(axis=-1, dtype=np.float64)
    result: NDArray[np.float64] = np.log(total) + highest[..., 0]
    return result


class Sampling:
    """Each row follows its own choice: the best token at temperature 0, else one drawn from softmax(logits / temperature).

    ``group`` rows a window are drawn independently. A row's draws depend on the seed and on its place in its group only, not
    on the batch around it. Log-probabilities are those at temperature 1.
    """

    def __init__(self, windows: int, group: int, temperature: float, end: int, seed: Sequence[int]) -> None:
        self._end = end
        self._temperature = temperature
        self._random = [[np.random.default_rng([*seed, member]) for member in range(group)] for _ in range(windows)]
        self._done: list[list[Candidate]] = [[Candidate()] * group for _ in range(windows)]
        self._group = group
        self._open = [_Open(window, 0) for window in range(windows)]
        self._begun = False

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """The new tokens of every open row."""
        return [row.so_far.tokens for row in self._open]

    def advance(self, logits: Logits) -> tuple[Rows, Rows]:
        """Choose a token for every row; the rows that chose the end leave."""
        totals = log_total(logits)
        sources = np.arange(len(logits))
        if not self._begun:
            sources = np.repeat(sources, self._group)
            self._open = [_Open(row.window, member) for row in self._open for member in range(self._group)]
            self._begun = True
        best = logits.argmax(axis=-1)
        picked, kept, going = [], [], []
        for row, source in zip(self._open, sources.tolist(), strict=True):
            token = int(best[source]) if self._temperature == 0 else self._draw(logits[source], row)
            sum_logprob = row.so_far.sum_logprob + float(logits[source, token]) - float(totals[source])
            tokens = row.so_far.tokens if token == self._end else (*row.so_far.tokens, token)
            moved = Candidate(tokens, sum_logprob)
            self._done[row.window][row.member] = moved
            if token != self._end:
                picked.append(token)
                kept.append(source)
                going.append(_Open(row.window, row.member, moved))
        self._open = going
        return np.array(picked, np.int64), np.array(kept, np.int64)

    def candidates(self) -> list[list[Candidate]]:
        """The rows of each window, finished or not."""
        return self._done

    def _draw(self, logits: Logits, row: _Open) -> int:
        scaled = (logits - logits.max()) / np.float32(self._temperature)
        reached = np.exp(scaled).cumsum(dtype=np.float64)
        drawn = self._random[row.window][row.member].random() * reached[-1]
        # Rounding may carry the draw to the very end, past the last token that has a probability.
        return int(min(np.searchsorted(reached, drawn, "right"), np.searchsorted(reached, reached[-1], "left")))


class Beam:
    """The best ``size`` rows of each window go on together, until enough of them have ended.

    A window is finished when ``round(size * patience)`` sequences ended. It leaves the batch then, so that it neither costs
    nor learns anything from the windows that take longer.
    """

    def __init__(self, windows: int, size: int, patience: float, end: int) -> None:
        self._size = size
        self._enough = round(size * patience)
        self._end = end
        self._ended: list[list[Candidate]] = [[] for _ in range(windows)]
        self._last: list[list[Candidate]] = [[] for _ in range(windows)]
        self._open = [_Open(window, 0) for window in range(windows)]

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """The new tokens of every open row."""
        return [row.so_far.tokens for row in self._open]

    def advance(self, logits: Logits) -> tuple[Rows, Rows]:
        """Extend every window's rows by their best tokens and keep the best of all."""
        tops = _top(logits, self._size + 1)
        totals = log_total(logits)
        ways: dict[int, list[tuple[float, int, int]]] = {row.window: [] for row in self._open}
        for source, (row, top, total) in enumerate(zip(self._open, tops, totals.tolist(), strict=True)):
            base = row.so_far.sum_logprob - total
            ways[row.window] += [(base + float(logits[source, token]), source, token) for token in top.tolist()]
        going: list[_Open] = []
        sources: list[int] = []
        for window, found in ways.items():
            kept = self._keep(window, sorted(found, key=lambda way: -way[0]))
            if len(self._ended[window]) < self._enough:
                going += [_Open(window, member, candidate) for member, (candidate, _) in enumerate(kept)]
                sources += [source for _, source in kept]
        self._open = going
        return np.array([row.so_far.tokens[-1] for row in going], np.int64), np.array(sources, np.int64)

    def candidates(self) -> list[list[Candidate]]:
        """Ended sequences of each window; where fewer than the beam's size ended, the best open ones too."""
        pairs = zip(self._ended, self._last, strict=True)
        return [ended + last[: max(self._size - len(ended), 0)] for ended, last in pairs]

    def _keep(self, window: int, ways: list[tuple[float, int, int]]) -> list[tuple[Candidate, int]]:
        """Of the ways to go on, best first: the beam, with the row of each; what ends above its last row has ended."""
        kept: list[tuple[Candidate, int]] = []
        ended: list[Candidate] = []
        for score, source, token in ways:
            tokens = self._open[source].so_far.tokens
            if token == self._end:
                ended.append(Candidate(tokens, score))
                continue
            kept.append((Candidate((*tokens, token), score), source))
            if len(kept) == self._size:
                break
        self._ended[window] += ended[: self._enough - len(self._ended[window])]
        self._last[window] = [candidate for candidate, _ in kept]
        return kept


def _top(logits: Logits, count: int) -> Rows:
    """The ``count`` best tokens of each row, best first."""
    unsorted = np.argpartition(logits, -count, axis=-1)[:, -count:]
    order = np.argsort(-np.take_along_axis(logits, unsorted, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(unsorted, order, axis=-1)


def best_of(candidates: Sequence[Candidate], length_penalty: float | None) -> Candidate:
    """The candidate with the highest log-probability for its length.

    The sum is divided by the number of tokens or, where ``length_penalty`` is given, by ((5 + tokens) / 6) ** penalty
    (Wu et al. 2016, equation 14).
    """
    # openai-whisper divides by zero where nothing was said; here such an answer counts as one token long.
    if length_penalty is None:
        scores = [found.sum_logprob / max(len(found.tokens), 1) for found in candidates]
    else:
        scores = [found.sum_logprob / ((5 + len(found.tokens)) / 6) ** length_penalty for found in candidates]
    return candidates[int(np.argmax(scores))]
