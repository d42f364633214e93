"""From the tokens of a window to segments with times.

openai-whisper's ``transcribe.py`` is normative. Times are seconds from the beginning of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from asr_core.align import Word
from asr_core.tokens import TIMESTAMP_STEP

TIMESTAMP_FRAMES = 2  # a timestamp token


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

    ``resume`` is where the next window begins, in frames (10 ms) after this one's beginning; None: where this one ends.
    ``closed`` tells that a lone timestamp ends the tokens: nothing is said after it.
    """

    pieces: list[Cut]
    resume: int | None
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
    resume = (tokens[borders[-1] - 1] - timestamp_begin) * TIMESTAMP_FRAMES
    return Cuts(pieces, None if closed else resume, closed)


def last_word_end(segments: Sequence[Segment]) -> float | None:
    """Where the last word ends, in seconds; without words where the last segment ends; None without segments."""
    ends = (word.end for segment in reversed(segments) for word in reversed(segment.words or []))
    return next(ends, segments[-1].end if segments else None)
