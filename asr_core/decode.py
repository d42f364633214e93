"""The decode loop, shared by every step runner: small objects over ``encode`` and ``step``, numpy only.

The policy follows openai-whisper's ``decoding.py``: filters edit the logits, the loop picks tokens, finished rows leave the
batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asr_core.tokens import TokenIds

Mel = NDArray[np.float32]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class DecodeOptions:
    """The decode policy. ``max_new_tokens`` None means the model's own bound (half of its text context)."""

    language: str = "en"
    task: str = "transcribe"
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds of one batch: encoding, all of decoding, and of that the prompt's pass (to the first token).

    ``prompt_s`` is None where a runtime decodes by itself and does not tell.
    """

    encode_s: float
    decode_s: float
    prompt_s: float | None


@dataclass(frozen=True)
class Decoded:
    """One utterance: token ids without prompt and end, their summed log-probability (the end's included).

    ``no_speech_prob`` is read at the first position of the prompt; None where the model has no such token or the runtime does
    not tell. ``timings`` are those of the batch that the utterance was decoded in.
    """

    tokens: list[int]
    sum_logprob: float
    no_speech_prob: float | None
    timings: Timings


class Stepper(Protocol):
    """What the loop needs of a runtime; ``state`` is the runtime's own and is never looked into."""

    tokens: TokenIds

    def encode(self, mel: Mel) -> Any:
        """Float32 [B, n_mels, 3000] → state."""

    def step(self, tokens: NDArray[np.int64], state: Any) -> Logits:
        """Int [B, T] after the tokens already seen → logits float32 [B, T, vocab]; advances ``state``."""

    def reorder(self, state: Any, rows: NDArray[np.int64]) -> Any:
        """The state of the given batch rows, in their order."""


class LogitFilter(Protocol):
    """Edits next-token logits in place."""

    def apply(self, logits: Logits, produced: int) -> None:
        """Logits float32 [B, vocab] after ``produced`` new tokens."""


@dataclass(frozen=True)
class SuppressTokens:
    """Forbid the checkpoint's suppressed tokens at every position."""

    ids: Sequence[int]

    def apply(self, logits: Logits, produced: int) -> None:
        """Set the forbidden ids to -inf."""
        logits[:, list(self.ids)] = -np.inf


@dataclass(frozen=True)
class SuppressAtBegin:
    """Forbid tokens, such as a lone blank, as the first new token."""

    ids: Sequence[int]

    def apply(self, logits: Logits, produced: int) -> None:
        """Set the forbidden ids to -inf before anything was produced."""
        if produced == 0:
            logits[:, list(self.ids)] = -np.inf


def filters_for(tokens: TokenIds) -> list[LogitFilter]:
    """The filters of the policy for plain transcription."""
    return [SuppressTokens(tokens.suppress), SuppressAtBegin(tokens.begin_suppress)]


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def greedy(stepper: Stepper, mel: Mel, options: DecodeOptions) -> list[Decoded]:
    """Decode a batch of windows by taking the best token at every step.

    ``mel`` float32 [B, n_mels, 3000]. A row is finished when it chooses the end token or reaches the bound; finished rows
    leave the batch, so they cost nothing.
    """
    ids = stepper.tokens
    prompt = np.array(ids.prompt(options.language, options.task), np.int64)
    limit = options.max_new_tokens or ids.max_new_tokens
    filters = filters_for(ids)
    hypotheses = [_Hypothesis() for _ in mel]
    open_rows = hypotheses

    started = time.perf_counter()
    state = stepper.encode(mel)
    encoded = time.perf_counter()
    prompt_logits = stepper.step(np.tile(prompt, (len(mel), 1)), state)
    no_speech = _no_speech(prompt_logits[:, 0], ids)
    logits = prompt_logits[:, -1]
    first_token = None
    for produced in range(limit):
        for logit_filter in filters:
            logit_filter.apply(logits, produced)
        picked = logits.argmax(axis=-1)
        alive = _extend(open_rows, picked, log_softmax(logits), ids.end)
        first_token = first_token or time.perf_counter()
        if not len(alive) or produced + 1 == limit:
            break
        if len(alive) < len(open_rows):
            open_rows, picked = [open_rows[row] for row in alive], picked[alive]
            state = stepper.reorder(state, alive)
        logits = stepper.step(picked[:, None].astype(np.int64), state)[:, -1]
    timings = Timings(encoded - started, time.perf_counter() - encoded, (first_token or encoded) - encoded)
    return [Decoded(h.tokens, h.sum_logprob, p, timings) for h, p in zip(hypotheses, no_speech, strict=True)]


@dataclass
class _Hypothesis:
    tokens: list[int] = field(default_factory=list)
    sum_logprob: float = 0.0


def _extend(rows: Sequence[_Hypothesis], picked: NDArray[np.int64], logprobs: NDArray[np.float64], end: int) -> NDArray[np.int64]:
    """Add each row's pick to its hypothesis; returns the indices of the rows that go on."""
    for i, (row, token) in enumerate(zip(rows, picked.tolist(), strict=True)):
        row.sum_logprob += float(logprobs[i, token])
        if token != end:
            row.tokens.append(token)
    return np.flatnonzero(picked != end)


def teacher_forced(stepper: Stepper, state: Any, tokens: Sequence[int]) -> Logits:
    """Logits float32 [T, vocab] at every position of a given sequence, fed exactly as decoding would feed it.

    The prompt goes in one pass and each later token in its own step, so the cache is exercised too.
    """
    prompt = 2 if not stepper.tokens.languages else 4
    pieces = [np.array([tokens[:prompt]], np.int64), *(np.array([[token]], np.int64) for token in tokens[prompt:])]
    return np.concatenate([stepper.step(piece, state)[0].copy() for piece in pieces])  # valid until the next step only


def _no_speech(logits: Logits, ids: TokenIds) -> list[float | None]:
    if ids.no_speech is None:
        return [None] * len(logits)
    return [float(p) for p in np.exp(log_softmax(logits)[:, ids.no_speech])]
