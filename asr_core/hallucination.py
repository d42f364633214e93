"""Segments that are probably not speech, told by the times and probabilities of their words.

openai-whisper's ``hallucination_silence_threshold`` is normative: where silence lies around such a segment, it is dropped and
the next window begins where speech may. Times are seconds from the beginning of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asr_core.align import APPENDED, PREPENDED, Word
from asr_core.segments import Segment, last_word_end

PUNCTUATION = PREPENDED + APPENDED
# openai-whisper's signs of a word that was not said: unlikely, or too short or long for a word, in seconds.
UNLIKELY = 0.15
SHORTEST_WORD, SHORT_PENALTY = 0.133, 15
LONGEST_WORD = 2.0
JUDGED_WORDS = 8  # of a segment
ANOMALOUS_SCORE = 3
NEAR_BORDER = 2.0  # seconds to a window's border that count as silence


@dataclass(frozen=True)
class Surroundings:
    """Where a window lies: its first second, that of its last content and of its last frame, and the file's last.

    ``last_speech`` is where the last word before it ended; ``threshold`` is how long a silence must be to be skipped, seconds.
    """

    start: float
    content_end: float
    end: float
    file_end: float
    last_speech: float
    threshold: float


def resume_after_words(segments: Sequence[Segment], around: Surroundings) -> float | None:
    """Where the next window begins: after the last word if a long silence follows it; None: at this window's end."""
    end = last_word_end(segments)
    return end if end is not None and around.end - end > around.threshold else None


def leading_silence(segments: Sequence[Segment], around: Surroundings) -> float:
    """How long a silence to skip before a first segment that is an anomaly; 0 where there is none."""
    first = _first_with_words(segments)
    if first is None or not anomalous(first):
        return 0.0
    gap = first.start - around.start
    return gap if gap > around.threshold else 0.0


def kept(segments: Sequence[Segment], around: Surroundings) -> tuple[list[Segment], float | None]:
    """The segments before the first anomaly that has silence or anomalies on both sides, and where the next window begins.

    That is None where all are kept; the file's end where nothing but silence follows.
    """
    last_end = around.last_speech
    for i, segment in enumerate(segments):
        if not segment.words:
            continue
        following = _first_with_words(segments[i + 1 :])
        if anomalous(segment) and _silent_before(segment, last_end, around) and _silent_after(segment, following, around):
            over = around.file_end - segment.end < around.threshold
            return list(segments[:i]), around.file_end if over else max(around.start + 1, segment.start)
        last_end = segment.end
    return list(segments), None


def _silent_before(segment: Segment, last_end: float, around: Surroundings) -> bool:
    return (
        segment.start - last_end > around.threshold
        or segment.start < around.threshold
        or segment.start - around.start < NEAR_BORDER
    )


def _silent_after(segment: Segment, following: Segment | None, around: Surroundings) -> bool:
    speech = following.words[0].start if following and following.words else around.content_end
    return speech - segment.end > around.threshold or anomalous(following) or around.end - segment.end < NEAR_BORDER


def anomalous(segment: Segment | None) -> bool:
    """Whether a segment's words are mostly too short, too long or unlikely."""
    if segment is None or not segment.words:
        return False
    words = [word for word in segment.words if word.word not in PUNCTUATION][:JUDGED_WORDS]
    score = sum(map(_strangeness, words))
    return score >= ANOMALOUS_SCORE or score + 0.01 >= len(words)


def _strangeness(word: Word) -> float:
    duration = word.end - word.start
    short = (SHORTEST_WORD - duration) * SHORT_PENALTY if duration < SHORTEST_WORD else 0.0
    return float(word.probability < UNLIKELY) + short + max(0.0, duration - LONGEST_WORD)


def _first_with_words(segments: Sequence[Segment]) -> Segment | None:
    return next((segment for segment in segments if segment.words), None)
