"""When each word was said: cross-attention, dynamic time warping, and openai-whisper's rules around them.

openai-whisper's ``timing.py`` is normative, down to which of two equal paths is taken; numpy only.

Axes: heads, T tokens (prompt, text, end), F audio positions of 20 ms (1500), of which only the first ``frames // 2`` hold sound.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from asr_core.decode import Logits, Mel, log_softmax
from asr_core.tokens import TokenIds

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POSITIONS_A_SECOND = 50
FRAMES_A_POSITION = 2  # mel frames of 10 ms
FILTER_WIDTH = 7  # audio positions that the median is taken of
LONGEST_MEDIAN = 0.7  # seconds: a greater median length of words is not believed
SENTENCE_ENDS = ".。!！?？"
PREPENDED = "\"'“¿([{-"
APPENDED = "\"'.。,，!！?？:：”)]}、"
UNSPACED_LANGUAGES = frozenset(("zh", "ja", "th", "lo", "my", "yue"))
UNDECODABLE = "\ufffd"
DIAGONAL, DOWN, RIGHT = 0, 1, 2  # how a path reaches a cell: both indices grow, the row's, the column's

# openai-whisper's own network: the middle of seven after thirteen exchanges, in place of sorting.
EXCHANGES = ((0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6), (2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4))

Scores = NDArray[np.float32]  # raw cross-attention (before its softmax), [heads, T, F]


@dataclass(frozen=True)
class AlignRequest:
    """Text tokens (no prompt, timestamps or end) to be found in one window of a batch.

    ``window`` is its row, ``frames`` how many of its mel frames hold sound.
    """

    window: int
    tokens: tuple[int, ...]
    frames: int
    language: str | None = "en"
    task: str = "transcribe"


@dataclass(frozen=True)
class Alignment:
    """The path through tokens and time, and how likely each token was.

    ``text`` and ``time`` int [path] are indices of the request's tokens (one more than there are: the end) and audio positions;
    ``probabilities`` float [tokens].
    """

    text: NDArray[np.int64]
    time: NDArray[np.int64]
    probabilities: NDArray[np.float64]


class Aligner(Protocol):
    """What word timestamps need of a runner."""

    tokens: TokenIds

    def align(self, mel: Mel, requests: Sequence[AlignRequest]) -> list[Alignment]:
        """Find tokens in windows, float32 [B, n_mels, 3000]."""


@dataclass(frozen=True)
class Word:
    """A word with its blanks and punctuation; seconds from the beginning of the file, and the mean probability of its tokens."""

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class TimedSpan:
    """A segment whose ends were moved to its words."""

    start: float
    end: float
    words: list[Word]


class Span(Protocol):
    """What is needed of a segment: seconds from the beginning of the file, token ids (timestamps may be among them)."""

    @property
    def start(self) -> float:
        """Seconds."""

    @property
    def end(self) -> float:
        """Seconds."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids."""


# --- from attention to a path


def forced_tokens(ids: TokenIds, request: AlignRequest) -> list[int]:
    """Everything that the decoder is fed: prompt without timestamps, text, end."""
    return [*ids.prompt(request.language, request.task), *request.tokens, ids.end]


def from_attention(scores: Scores, logits: Logits, ids: TokenIds, request: AlignRequest) -> Alignment:
    """An alignment from one forced pass over :func:`forced_tokens`: scores [heads, T, F], logits float32 [T, vocab]."""
    start = len(ids.prompt(request.language, request.task)) - 1  # the prompt's last token predicts the first of the text
    text, time = warp(-attention_matrix(scores, request.frames)[start:-1])
    predicting = logits[start : start + len(request.tokens), : ids.end]
    chosen = log_softmax(predicting)[np.arange(len(request.tokens)), list(request.tokens)]
    return Alignment(text, time, np.exp(chosen))


def attention_matrix(scores: Scores, frames: int) -> NDArray[np.float64]:
    """How much each token looks at each audio position that holds sound, [T, frames / 2]: the mean over heads.

    A position that all tokens look at alike tells nothing and gets 0, where openai-whisper divides 0 by 0.
    """
    positions = min(scores.shape[2], max(1, frames // FRAMES_A_POSITION))
    total = np.zeros((scores.shape[1], positions))
    for head in scores:  # one at a time: the temporaries stay in the processor's cache
        weights = softmax(head[:, :positions])
        spread = weights.std(axis=0)
        total += median_filter((weights - weights.mean(axis=0)) / np.where(spread == 0, 1, spread))
    return total / len(scores)


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    weights: NDArray[np.float32] = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def median_filter(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The median of seven neighbours along the last axis of [T, F], mirrored at the ends; shorter rows than half stay."""
    half = FILTER_WIDTH // 2
    width = rows.shape[-1]
    if width <= half:
        return rows
    padded = np.pad(rows, ((0, 0), (half, half)), mode="reflect")
    columns = [padded[:, i : i + width].copy() for i in range(FILTER_WIDTH)]
    spare = np.empty_like(rows)
    for i, j in EXCHANGES:
        np.minimum(columns[i], columns[j], out=spare)
        np.maximum(columns[i], columns[j], out=columns[j])
        columns[i], spare = spare, columns[i]
    return columns[half]


def warp(cost: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cheapest monotonic path through a cost matrix [N, M] from corner to corner: its row and column indices.

    Dynamic time warping over anti-diagonals, whose cells depend only on the two before. Summed in float64; of equal
    predecessors the one in the same row counts, as in openai-whisper.
    """
    n, m = cost.shape
    skewed = np.full((n + m + 1, n + 1), np.inf)  # [diagonal, row], both from 1: each diagonal is one piece of memory
    for row in range(n):
        skewed[row + 2 : row + 2 + m, row + 1] = cost[row]
    came = np.empty((n + m + 1, n + 1), np.int8)
    before, last = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
    before[0] = 0
    for diagonal in range(2, n + m + 1):
        across, down, right = before[:-1], last[:-1], last[1:]
        by_down = (down < across) & (down < right)
        by_diagonal = (across < down) & (across < right)
        best = np.where(by_diagonal, across, np.where(by_down, down, right))
        came[diagonal, 1:] = np.where(by_diagonal, DIAGONAL, np.where(by_down, DOWN, RIGHT))
        before, last = last, np.concatenate(([np.inf], best + skewed[diagonal, 1:]))
    return _backtrace(came, n, m)


def _backtrace(came: NDArray[np.int8], row: int, column: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    path = []
    while row > 0 or column > 0:
        path.append((row - 1, column - 1))
        on_edge = RIGHT if row == 0 else DOWN
        step = came[row + column, row] if row and column else on_edge
        row -= step != RIGHT
        column -= step != DOWN
    rows, columns = np.array(path[::-1], np.int64).reshape(-1, 2).T
    return rows, columns


# --- from tokens to words


@dataclass
class TimedWord:
    """A word within its window, seconds from the window's beginning; punctuation may still be merged into it."""

    word: str
    tokens: list[int] = field(repr=False)
    start: float
    end: float
    probability: float

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.end - self.start


def split_words(tokenizer: Tokenizer, tokens: Sequence[int], end: int, language: str | None) -> list[tuple[str, list[int]]]:
    """Words and their tokens: by blanks, or by character in languages that write without; special tokens (from ``end`` on) alone.

    A character whose bytes are spread over tokens stays whole.
    """
    characters = list(_split_characters(tokenizer, tokens))
    if language in UNSPACED_LANGUAGES:
        return characters
    words: list[tuple[str, list[int]]] = []
    for text, own in characters:
        begins = own[0] >= end or text.startswith(" ") or text.strip() in string.punctuation
        if begins or not words:
            words.append((text, own))
        else:
            words[-1] = (words[-1][0] + text, words[-1][1] + own)
    return words


def _split_characters(tokenizer: Tokenizer, tokens: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """The smallest runs of tokens whose bytes are whole characters (or can't ever be)."""
    whole = tokenizer.decode(list(tokens), skip_special_tokens=False)
    offset = 0
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=False)
        if UNDECODABLE not in text or whole[offset + text.index(UNDECODABLE)] == UNDECODABLE:
            yield text, held
            held = []
            offset += len(text)


def time_words(tokenizer: Tokenizer, ids: TokenIds, request: AlignRequest, found: Alignment) -> list[TimedWord]:
    """The words of aligned tokens: each begins where the path first reaches its first token."""
    words = split_words(tokenizer, [*request.tokens, ids.end], ids.end, ids.code_of(request.language))[:-1]
    bounds = np.cumsum([0, *(len(tokens) for _, tokens in words)])
    reached = found.time[np.diff(found.text, prepend=-1).astype(bool)] / POSITIONS_A_SECOND
    return [
        TimedWord(word, tokens, float(reached[first]), float(reached[after]), float(found.probabilities[first:after].mean()))
        for (word, tokens), first, after in zip(words, bounds[:-1], bounds[1:], strict=True)
    ]


def merge_punctuation(words: list[TimedWord], prepended: str = PREPENDED, appended: str = APPENDED) -> None:
    """Move punctuation into the word after or before it; what it leaves behind is an empty word."""
    following = len(words) - 1
    for i in range(len(words) - 2, -1, -1):
        mark = words[i]
        if mark.word.startswith(" ") and mark.word.strip() in prepended:
            words[following].word = mark.word + words[following].word
            words[following].tokens = mark.tokens + words[following].tokens
            mark.word, mark.tokens = "", []
        else:
            following = i
    previous = 0
    for i in range(1, len(words)):
        mark = words[i]
        if not words[previous].word.endswith(" ") and mark.word in appended:
            words[previous].word += mark.word
            words[previous].tokens = words[previous].tokens + mark.tokens
            mark.word, mark.tokens = "", []
        else:
            previous = i


# --- from words to segments


def add_word_timestamps(
    segments: Sequence[Span],
    aligner: Aligner,
    tokenizer: Tokenizer,
    mel: Mel,
    *,
    frames: int,
    offset: float,
    language: str | None,
    task: str,
    last_speech: float,
    prepended: str = PREPENDED,
    appended: str = APPENDED,
) -> list[TimedSpan]:
    """The words of each segment of one window, and the segments' ends moved to them.

    ``aligner`` is the runner; ``mel`` float32 [1, n_mels, 3000] is the window, whose first ``frames`` hold sound and which begins
    at ``offset`` seconds of the file; ``last_speech`` is where the segment before the first one ended, in seconds.
    """
    ids = aligner.tokens
    texts = [tuple(token for token in segment.tokens if token < ids.end) for segment in segments]
    request = AlignRequest(0, tuple(token for text in texts for token in text), frames, language, task)
    words: list[TimedWord] = []
    if request.tokens:
        words = time_words(tokenizer, ids, request, aligner.align(mel, [request])[0])
    typical = _typical_duration(words)
    _shorten_at_sentence_ends(words, 2 * typical)
    merge_punctuation(words, prepended, appended)
    spans = []
    waiting = iter(words)
    for segment, text in zip(segments, texts, strict=True):
        own = [_Bounds(word, offset) for word in _take(waiting, len(text)) if word.word]
        start, end = _settle(own, segment.start, segment.end, last_speech, typical)
        last_speech = end if own else last_speech
        spans.append(TimedSpan(start, end, [bounds.word for bounds in own]))
    return spans


def _typical_duration(words: Sequence[TimedWord]) -> float:
    """The median of all durations that are not 0, in seconds, within reason."""
    durations = np.array([word.duration for word in words if word.duration])
    return min(LONGEST_MEDIAN, float(np.median(durations))) if len(durations) else 0.0


def _shorten_at_sentence_ends(words: Sequence[TimedWord], longest: float) -> None:
    """A pause goes to neither the mark that ends a sentence nor the word after it."""
    if not any(word.duration for word in words):
        return
    for before, word in itertools.pairwise(words):
        if word.duration > longest:
            if word.word in SENTENCE_ENDS:
                word.end = word.start + longest
            elif before.word in SENTENCE_ENDS:
                word.start = word.end - longest


def _take(words: Iterator[TimedWord], tokens: int) -> Iterator[TimedWord]:
    """The next words, until they have so many tokens."""
    while tokens > 0:
        word = next(words, None)
        if word is None:
            return
        tokens -= len(word.tokens)
        yield word


class _Bounds:
    """A word in the file, whose ends still move."""

    def __init__(self, timed: TimedWord, offset: float) -> None:
        self._timed = timed
        self.start = round(offset + timed.start, 2)
        self.end = round(offset + timed.end, 2)

    @property
    def duration(self) -> float:
        return self.end - self.start

    @property
    def word(self) -> Word:
        return Word(self._timed.word, self.start, self.end, self._timed.probability)


def _settle(words: list[_Bounds], start: float, end: float, last_speech: float, typical: float) -> tuple[float, float]:
    """Bring words and segment into line, as openai-whisper does; returns the segment's start and end."""
    if not words:
        return start, end
    first, last = words[0], words[-1]
    _shorten_after_pause(words, last_speech, typical)
    if start < first.end and start - 0.5 > first.start:  # the first word is too long: the segment knows better
        first.start = max(0, min(first.end - typical, start))
    else:
        start = first.start
    if end > last.start and end + 0.5 < last.end:
        last.end = max(last.start + typical, end)
    else:
        end = last.end
    return start, end


def _shorten_after_pause(words: list[_Bounds], last_speech: float, typical: float) -> None:
    """After a pause, neither the first nor the second word lasts longer than twice the typical one."""
    first, longest = words[0], 2 * typical
    second = words[1] if len(words) > 1 else None
    if first.end - last_speech <= 4 * typical:
        return
    if first.duration <= longest and (second is None or second.end - first.start <= 2 * longest):
        return
    if second is not None and second.duration > longest:
        first.end = second.start = max(second.end / 2, second.end - longest)
    first.start = max(0, first.end - longest)
