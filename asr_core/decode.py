"""The decode loop, shared by every step runner: small objects over ``encode`` and ``step``, numpy only.

The policy is openai-whisper's (``decoding.py``, and ``decode_with_fallback`` of ``transcribe.py``): filters edit the logits, a
search picks tokens, finished rows leave the batch, and an answer that looks wrong is tried again at the next temperature.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asr_core.dims import Dims
from asr_core.errors import UsageError
from asr_core.filters import LogitFilter, SuppressAtBegin, SuppressTokens, TimestampRules
from asr_core.search import Beam, Sampling, Search, best_of, log_total
from asr_core.tokens import TIMESTAMP_STEP, TokenIds

Mel = NDArray[np.float32]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class DecodeOptions:
    """The decode policy; every field that openai-whisper has means what it means there.

    ``language`` None: detected for each window. ``max_initial_timestamp`` in seconds (None or 0: any). ``temperatures`` are
    tried in order until an answer passes the three thresholds; beam search is for temperature 0, ``best_of`` for those above.
    ``prompt``, ``prefix`` and ``hotwords`` are token ids: the text before, the beginning of the answer, and words to expect
    (faster-whisper's: they stand before the prompt, and give way to a prefix). ``suppress`` None means the checkpoint's list,
    ``suppress_blank`` is about its list of tokens that cannot begin. ``max_new_tokens`` None means the model's own bound (half
    of its text context).
    """

    language: str | None = "en"
    task: str = "transcribe"
    timestamps: bool = False
    max_initial_timestamp: float | None = 1.0
    temperatures: tuple[float, ...] = (0.0,)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    beam_size: int | None = None
    patience: float | None = None
    best_of: int | None = None
    length_penalty: float | None = None
    seed: int = 0
    prompt: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    hotwords: tuple[int, ...] = ()
    suppress: tuple[int, ...] | None = None
    suppress_blank: bool = True
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a combination that means nothing."""
        if not self.temperatures or min(self.temperatures) < 0:
            raise UsageError(f"temperatures are {self.temperatures}: give at least one, and none below 0.")
        if min(self.beam_size or 1, self.best_of or 1, self.max_new_tokens or 1) < 1:
            raise UsageError("beam size, best of and the bound on new tokens are at least 1.")
        if self.patience is not None and (self.beam_size is None or round(self.beam_size * self.patience) < 1):
            raise UsageError(f"patience {self.patience} needs a beam size, and their product is at least 1.")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise UsageError(f"the length penalty is {self.length_penalty}; it lies between 0 and 1.")


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

    ``no_speech_prob`` is read at the start token; None where the model has no such token or the runtime does not tell.
    ``timings`` are those of the batch that the utterance was decoded in. ``language`` is the code of the language that
    it was decoded in, ``temperature`` the one that gave this answer.
    """

    tokens: list[int]
    sum_logprob: float
    no_speech_prob: float | None
    timings: Timings
    language: str = "en"
    temperature: float = 0.0

    @property
    def avg_logprob(self) -> float:
        """The mean log-probability of the tokens and the end."""
        return self.sum_logprob / (len(self.tokens) + 1)


class Stepper(Protocol):
    """What the loop needs of a runtime; ``state`` is the runtime's own and is never looked into."""

    tokens: TokenIds
    dims: Dims

    def encode(self, mel: Mel) -> Any:
        """Float32 [B, n_mels, 3000] → state."""

    def step(self, tokens: NDArray[np.int64], state: Any) -> Logits:
        """Int [B, T] after the tokens already seen → logits float32 [B, T, vocab]; advances ``state``."""

    def step_at(self, tokens: NDArray[np.int64], state: Any, wanted: Sequence[int]) -> Logits:
        """The same with the logits of the wanted new tokens alone, float32 [B, wanted, vocab]."""

    def reorder(self, state: Any, rows: NDArray[np.int64]) -> Any:
        """The state of the given batch rows, in their order; ``state`` itself cannot go on after it."""

    def restart(self, state: Any, rows: NDArray[np.int64]) -> Any:
        """A state at position 0 over the given windows of ``state``, which is one that ``encode`` gave."""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones written out and timestamps left out."""


def filters_for(tokens: TokenIds, options: DecodeOptions | None = None) -> list[LogitFilter]:
    """The filters of a policy; without one, those of plain transcription."""
    options = options or DecodeOptions()
    filters: list[LogitFilter] = [SuppressTokens(tokens.suppress if options.suppress is None else options.suppress)]
    if options.suppress_blank:
        filters.append(SuppressAtBegin(tokens.begin_suppress))
    if options.timestamps:
        last = initial_timestamp_index(options)
        bound = None if last is None else tokens.timestamp_begin + last
        filters.append(TimestampRules(tokens.timestamp_begin, tokens.end, tokens.no_timestamps, bound))
    return filters


def initial_timestamp_index(options: DecodeOptions) -> int | None:
    """How many steps the first timestamp may lie after 0; None for any."""
    return round(options.max_initial_timestamp / TIMESTAMP_STEP) if options.max_initial_timestamp else None


def initial_tokens(ids: TokenIds, options: DecodeOptions, language: str | None, context: int) -> list[int]:
    """Everything that the decoder is given before it chooses: [previous, hotwords, prompt,] start, …, [prefix].

    ``context`` is the model's number of text positions. Hotwords and prompt share half of it less one: hotwords are cut at
    their end, what room they leave is the prompt's, which is cut at its beginning. Raises :class:`UsageError` for an unknown
    language or task, and where nothing could follow.
    """
    half = context // 2
    hotwords = [] if options.prefix else list(options.hotwords[: half - 1])
    before = [*hotwords, *_last(options.prompt, half - 1 - len(hotwords))]
    if before:
        before = [_previous(ids), *before]
    prefix = list(options.prefix)
    if options.max_new_tokens and options.max_new_tokens < half:
        prefix = _last(prefix, half - options.max_new_tokens)
    tokens = [*before, *ids.prompt(language or "en", options.task, timestamps=options.timestamps), *prefix]
    if len(tokens) > context:
        raise UsageError(f"prompt and prefix are {len(tokens)} tokens long; the model has {context} positions for them.")
    return tokens


def _previous(ids: TokenIds) -> int:
    if ids.previous is None:
        raise UsageError("this model has no <|startofprev|> token: it takes no prompt and no hotwords.")
    return ids.previous


def _last(tokens: Sequence[int], count: int) -> list[int]:
    return list(tokens[max(len(tokens) - count, 0) :])


def new_token_limit(ids: TokenIds, options: DecodeOptions, given: int, context: int) -> int:
    """How many tokens may follow ``given`` ones: the policy's bound, or where the context ends."""
    return min(options.max_new_tokens or ids.max_new_tokens, context + 1 - given)


def compression_ratio(text: str) -> float:
    """How many times smaller zlib makes a text: high where it repeats itself."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


def needs_fallback(decoded: Decoded, text: str, options: DecodeOptions) -> bool:
    """Whether an answer is too repetitive or too improbable to keep, and not just silence."""
    ratio, logprob, silence = (options.compression_ratio_threshold, options.logprob_threshold, options.no_speech_threshold)
    improbable = logprob is not None and decoded.avg_logprob < logprob
    repetitive = ratio is not None and compression_ratio(text) > ratio
    silent = silence is not None and decoded.no_speech_prob is not None and decoded.no_speech_prob > silence
    return (improbable or repetitive) and not (silent and improbable)


def language_probabilities(logits: Logits, ids: TokenIds) -> list[dict[str, float]]:
    """Probabilities by code, from logits [B, vocab] after the start token."""
    chosen = logits[:, list(ids.languages.values())]
    probabilities = np.exp(chosen - log_total(chosen)[:, None])
    return [dict(zip(ids.languages, row, strict=True)) for row in probabilities.tolist()]


def detect_language(stepper: Stepper, state: Any, windows: int) -> list[dict[str, float]]:
    """The probability of every language that the model knows, for each window of a fresh state, which advances."""
    ids = stepper.tokens
    if not ids.languages:
        return [{"en": 1.0}] * windows
    return language_probabilities(stepper.step(np.full((windows, 1), ids.start, np.int64), state)[:, 0], ids)


@dataclass
class _Clock:
    """When encoding ended and when the first token was chosen, seconds of ``time.perf_counter``."""

    started: float = field(default_factory=time.perf_counter)
    encoded: float = 0.0
    first_token: float = 0.0

    def chose(self) -> None:
        self.first_token = self.first_token or time.perf_counter()

    def timings(self) -> Timings:
        return Timings(self.encoded - self.started, time.perf_counter() - self.encoded, self.first_token - self.encoded)


def with_fallback(
    windows: int, options: DecodeOptions, attempt: Callable[[list[int], int], list[Decoded]], text: Callable[[list[int]], str]
) -> list[Decoded]:
    """Decode windows at one temperature after the other, each until its answer may be kept; the last one's is.

    ``attempt`` decodes the windows of the given indices at the temperature of the given index; ``text`` reads tokens.
    """
    answers: dict[int, Decoded] = {}
    pending = list(range(windows))
    for index in range(len(options.temperatures)):
        answers |= zip(pending, attempt(pending, index), strict=True)
        if index + 1 < len(options.temperatures):
            pending = [row for row in pending if needs_fallback(answers[row], text(answers[row].tokens), options)]
        if not pending:
            break
    return [answers[row] for row in range(windows)]


def generate(stepper: Stepper, mel: Mel, options: DecodeOptions) -> list[Decoded]:
    """Decode a batch of windows, float32 [B, n_mels, 3000], which are encoded once however often they are decoded."""
    clock = _Clock()
    state = stepper.encode(mel)
    clock.encoded = time.perf_counter()
    given = options.language is not None
    detected = [] if given else detect_language(stepper, state, len(mel))
    languages = [options.language] * len(mel) if given else [likeliest(found) for found in detected]
    context = stepper.dims.n_text_ctx
    prompts = np.array([initial_tokens(stepper.tokens, options, language, context) for language in languages], np.int64)

    def attempt(rows: list[int], index: int) -> list[Decoded]:
        begun = state if given and index == 0 else stepper.restart(state, np.array(rows, np.int64))
        search = _search(len(rows), options, index, stepper.tokens.end)
        no_speech = _drive(stepper, begun, prompts[rows], options, search, clock)
        best = [best_of(found, options.length_penalty) for found in search.candidates()]
        codes = [stepper.tokens.code_of(languages[row]) for row in rows]
        timings, temperature = clock.timings(), options.temperatures[index]
        return [
            Decoded(list(found.tokens), found.sum_logprob, silence, timings, code, temperature)
            for found, silence, code in zip(best, no_speech, codes, strict=True)
        ]

    return with_fallback(len(mel), options, attempt, stepper.text)


def likeliest(probabilities: Mapping[str, float]) -> str:
    """The key of the highest value."""
    return max(probabilities, key=probabilities.__getitem__)


def _drive(
    stepper: Stepper, state: Any, prompts: NDArray[np.int64], options: DecodeOptions, search: Search, clock: _Clock
) -> list[float | None]:
    """Run a search over every window of a fresh state; returns their no-speech probabilities."""
    ids = stepper.tokens
    limit = new_token_limit(ids, options, prompts.shape[1], stepper.dims.n_text_ctx)
    filters = filters_for(ids, options)
    prompt_logits = stepper.step_at(prompts, state, [prompts[0].tolist().index(ids.start), prompts.shape[1] - 1])
    no_speech = _no_speech(prompt_logits[:, 0], ids)
    logits = prompt_logits[:, 1]
    for produced in range(limit):
        for logit_filter in filters:
            logit_filter.apply(logits, search.sequences)
        picked, rows = search.advance(logits)
        clock.chose()
        if not len(picked) or produced + 1 == limit:
            break
        if not np.array_equal(rows, np.arange(len(logits))):
            state = stepper.reorder(state, rows)
        logits = stepper.step(picked[:, None], state)[:, -1]
    return no_speech


def _search(windows: int, options: DecodeOptions, index: int, end: int) -> Search:
    temperature = options.temperatures[index]
    if temperature == 0 and options.beam_size is not None:
        return Beam(windows, options.beam_size, options.patience or 1.0, end)
    group = 1 if temperature == 0 else options.best_of or 1
    return Sampling(windows, group, temperature, end, (options.seed, index))


def teacher_forced(stepper: Stepper, state: Any, tokens: Sequence[int]) -> Logits:
    """Logits float32 [T, vocab] at every position of a given sequence, fed exactly as decoding would feed it.

    The prompt goes in one pass and each later token in its own step, so the cache is exercised too.
    """
    prompt = 2 if not stepper.tokens.languages else 4
    pieces = [np.array([tokens[:prompt]], np.int64), *(np.array([[token]], np.int64) for token in tokens[prompt:])]
    return np.concatenate([stepper.step(piece, state)[0].copy() for piece in pieces])  # valid until the next step only


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _no_speech(logits: Logits, ids: TokenIds) -> list[float | None]:
    if ids.no_speech is None:
        return [None] * len(logits)
    return [float(p) for p in np.exp(logits[:, ids.no_speech] - log_total(logits))]
