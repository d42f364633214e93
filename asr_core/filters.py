"""What a token may not be next: small objects that edit next-token logits in place.

The rules are those of openai-whisper's ``decoding.py`` (``SuppressTokens``, ``SuppressBlank``, ``ApplyTimestampRules``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Sequences = Sequence[Sequence[int]]


class LogitFilter(Protocol):
    """Edits next-token logits in place."""

    def apply(self, logits: NDArray[np.float32], produced: Sequences) -> None:
        """Logits float32 [B, vocab] after the new tokens of each row, which all have the same length."""


@dataclass(frozen=True)
class SuppressTokens:
    """Forbid tokens at every position."""

    ids: Sequence[int]

    def apply(self, logits: NDArray[np.float32], produced: Sequences) -> None:
        """Set the forbidden ids to -inf."""
        logits[:, list(self.ids)] = -np.inf


@dataclass(frozen=True)
class SuppressAtBegin:
    """Forbid tokens, such as a lone blank, as the first new token."""

    ids: Sequence[int]

    def apply(self, logits: NDArray[np.float32], produced: Sequences) -> None:
        """Set the forbidden ids to -inf before anything was produced."""
        if not produced[0]:
            logits[:, list(self.ids)] = -np.inf


@dataclass(frozen=True)
class TimestampRules:
    """Timestamps come in pairs around each segment, never decrease, and stand first; text between them.

    ``begin`` is the first timestamp's id, the vocabulary's last ids being the timestamps; ``end`` the end token, below which
    all text lies. ``last_initial`` is the id of the latest timestamp that may come first, None for any.
    """

    begin: int
    end: int
    no_timestamps: int
    last_initial: int | None

    def apply(self, logits: NDArray[np.float32], produced: Sequences) -> None:
        """Forbid what breaks a pair or the order; where timestamps together beat every other token, all but them."""
        logits[:, self.no_timestamps] = -np.inf
        for row, tokens in zip(logits, produced, strict=True):
            self._keep_pairs(row, tokens)
            self._keep_order(row, tokens)
            if not tokens:
                self._begin(row)
            self._prefer_timestamps(row)

    def _keep_pairs(self, row: NDArray[np.float32], tokens: Sequence[int]) -> None:
        if not self._ends_with_timestamp(tokens):
            return
        if self._closes_pair(tokens):
            row[self.begin :] = -np.inf  # text or the end comes next
        else:
            row[: self.end] = -np.inf  # the pair's other half or the end comes next

    def _keep_order(self, row: NDArray[np.float32], tokens: Sequence[int]) -> None:
        last = next((token for token in reversed(tokens) if token >= self.begin), None)
        if last is None:
            return
        # A segment may begin where the one before ended, but not end where it began.
        opens_next = self._ends_with_timestamp(tokens) and not self._closes_pair(tokens)
        row[self.begin : last if opens_next else last + 1] = -np.inf

    def _begin(self, row: NDArray[np.float32]) -> None:
        row[: self.begin] = -np.inf
        if self.last_initial is not None:
            row[self.last_initial + 1 :] = -np.inf

    def _prefer_timestamps(self, row: NDArray[np.float32]) -> None:
        timestamps, best = row[self.begin :], row[: self.begin].max()
        highest = timestamps.max()
        if np.isneginf(highest):
            return
        together = highest + np.log(np.exp(timestamps - highest).sum(dtype=np.float64))
        if together > best:
            row[: self.begin] = -np.inf

    def _ends_with_timestamp(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and tokens[-1] >= self.begin

    def _closes_pair(self, tokens: Sequence[int]) -> bool:
        """Whether the token before the last is a timestamp, too; the very first timestamp counts as a pair."""
        return len(tokens) < 2 or tokens[-2] >= self.begin  # noqa: PLR2004 - the last and the one before
