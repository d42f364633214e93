"""From the tokens of a window to segments with times, and which of them are probably not speech.

openai-whisper's ``transcribe.py`` is normative. Times are seconds from the beginning of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from asr_core.align import APPENDED, PREPENDED, Word
from asr_core.tokens import TIMESTAMP_STEP

PUNCTUATION = PREPENDED + APPENDED
# openai-whisper's signs of a word that was not said: unlikely, or too short or long for a word, in seconds.
UNLIKELY = 0.15
SHORTEST_WORD, SHORT_PENALTY = 0.133, 15
LONGEST_WORD = 2.0
JUDGED_WORDS = 8  # of a segment
NEAR_BORDER = 2.0  # seconds to a window's border that count as silence


@dataclass(frozen=True)
class Segment:
    """A stretch of speech; the names are openai-whisper's.

    ``seek`` is the frame (10 ms) at which its window begins. ``tokens`` include timestamps. The four figures are those of its
    window; ``no_speech_prob`` is None where the runtime does not tell. ``words`` is None where they were not asked for.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float | None
    words: list[Word] | None = None

    @property
    def voiced(self) -> bool:
        """Whether it lasts and says something."""
        return self.start != self.end and bool(self.text.strip())

    def cleared(self) -> Segment:
        """Itself without what it said."""
        return replace(self, text="", tokens=[], words=None if self.words is None else [])


@dataclass(frozen=True)
class Cut:
    """Tokens between two timestamps, which are in seconds from the window's beginning; ``end`` None: the window's end."""

    tokens: list[int]
    start: float
    end: float | None


@dataclass(frozen=True)
class Cuts:
    """What a window's tokens fall into.

    ``resume_s`` is where the next window begins, in seconds after this one; None: where this one ends. ``closed`` tells that a
    lone timestamp ends the tokens: nothing is said after it.
    """

    pieces: list[Cut]
    resume_s: float | None
    closed: bool


def cut(tokens: Sequence[int], timestamp_begin: int) -> Cuts:
    """Cut a window's tokens where two timestamps meet.

    What follows the last pair is unfinished: it is left to the next window, which begins there. Without a pair all tokens are
    one piece, which lasts to its last timestamp.
    """
    stamps = [token >= timestamp_begin for token in tokens]
    closed = stamps[-2:] == [False, True]
    borders = [i + 1 for i in range(len(tokens) - 1) if stamps[i] and stamps[i + 1]]

    def seconds(index: int) -> float:
        return (tokens[index] - timestamp_begin) * TIMESTAMP_STEP

    if not borders:
        times = [seconds(i) for i, stamp in enumerate(stamps) if stamp]
        end = times[-1] if times and times[-1] > 0 else None
        return Cuts([Cut(list(tokens), 0.0, end)], None, closed)
    if closed:
        borders.append(len(tokens))
    starts = [0, *borders[:-1]]
    pieces = [Cut(list(tokens[a:b]), seconds(a), seconds(b - 1)) for a, b in zip(starts, borders, strict=True)]
    return Cuts(pieces, None if closed else pieces[-1].end, closed)


def anomalous(segment: Segment | None) -> bool:
    """Whether a segment's words are mostly too short, too long or unlikely."""
    if segment is None or not segment.words:
        return False
    words = [word for word in segment.words if word.word not in PUNCTUATION][:JUDGED_WORDS]
    score = sum(map(_strangeness, words))
    return score >= 3 or score + 0.01 >= len(words)


def _strangeness(word: Word) -> float:
    duration = word.end - word.start
    short = (SHORTEST_WORD - duration) * SHORT_PENALTY if duration < SHORTEST_WORD else 0.0
    return float(word.probability < UNLIKELY) + short + max(0.0, duration - LONGEST_WORD)


def first_with_words(segments: Sequence[Segment]) -> Segment | None:
    """The first segment that has words."""
    return next((segment for segment in segments if segment.words), None)


def last_word_end(segments: Sequence[Segment]) -> float | None:
    """Where the last word ends, in seconds; without words where the last segment ends; None without segments."""
    ends = (word.end for segment in reversed(segments) for word in reversed(segment.words or []))
    return next(ends, segments[-1].end if segments else None)
