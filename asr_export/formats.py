"""A transcript as text, subtitles, table or JSON: byte for byte what openai-whisper's writers make of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asr_core.align import Word
    from asr_core.segments import Segment
    from asr_core.transcribe import Transcript

LONGEST_LINE = 1000  # characters of a subtitle before it is broken


def as_text(transcript: Transcript) -> str:
    """One segment a line."""
    return "".join(f"{segment.text.strip()}\n" for segment in transcript.segments)


def as_srt(transcript: Transcript, *, highlight: bool = False) -> str:
    """SubRip subtitles."""
    cues = enumerate(_cues(transcript.segments, ",", hours=True, highlight=highlight), start=1)
    return "".join(f"{number}\n{start} --> {end}\n{text}\n\n" for number, (start, end, text) in cues)


def as_vtt(transcript: Transcript, *, highlight: bool = False) -> str:
    """WebVTT subtitles."""
    cues = _cues(transcript.segments, ".", hours=False, highlight=highlight)
    return "WEBVTT\n\n" + "".join(f"{start} --> {end}\n{text}\n\n" for start, end, text in cues)


def as_tsv(transcript: Transcript) -> str:
    """Start and end in milliseconds and the text, between tabs."""
    rows = ((round(1000 * s.start), round(1000 * s.end), s.text.strip().replace("\t", " ")) for s in transcript.segments)
    return "start\tend\ttext\n" + "".join(f"{start}\t{end}\t{text}\n" for start, end, text in rows)


def as_json(transcript: Transcript) -> str:
    """openai-whisper's object (text, segments, language), then what else is known of the file."""
    segments = []
    for segment in transcript.segments:
        content = asdict(segment)
        if segment.words is None:
            del content["words"]
        segments.append(content)
    result: dict[str, Any] = {"text": transcript.text, "segments": segments, "language": transcript.language}
    result |= {
        "audio": transcript.audio,
        "duration_s": round(transcript.duration_s, 3),
        "rtfx": None if transcript.rtfx is None else round(transcript.rtfx, 2),
        "unreadable": [asdict(gap) for gap in transcript.gaps],
    }
    return json.dumps(result)


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": as_text,
    "vtt": as_vtt,
    "srt": as_srt,
    "tsv": as_tsv,
    "json": as_json,
}
HIGHLIGHTED: dict[str, Callable[..., str]] = {"vtt": as_vtt, "srt": as_srt}


def written(transcript: Transcript, form: str, *, highlight: bool = False) -> str:
    """The content of a file of one format; ``highlight`` underlines each word of a subtitle as it is said."""
    return HIGHLIGHTED[form](transcript, highlight=True) if highlight and form in HIGHLIGHTED else FORMATS[form](transcript)


def _cues(segments: list[Segment], marker: str, *, hours: bool, highlight: bool) -> Iterator[tuple[str, str, str]]:
    """Start, end and text of every subtitle: a segment, with the times of its words where it has some."""

    def stamp(seconds: float) -> str:
        return _timestamp(seconds, marker, hours=hours)

    timed = bool(segments) and segments[0].words is not None
    for segment in segments:
        if not timed:
            yield stamp(segment.start), stamp(segment.end), segment.text.strip().replace("-->", "->")
        elif segment.words:
            words = _broken(segment.words)
            if highlight:
                yield from _underlined(segment.words, words, stamp)
            else:
                yield stamp(segment.words[0].start), stamp(segment.words[-1].end), "".join(words)


def _broken(words: list[Word]) -> list[str]:
    """The words of a segment with a line break before those that do not fit their line."""
    texts: list[str] = []
    length = 0
    for word in words:
        text = word.word
        if texts and length + len(text) <= LONGEST_LINE and length:
            length += len(text)
        else:
            text = ("\n" if length else "") + text.strip()
            length = len(text.strip())
        texts.append(text)
    return texts


def _underlined(words: list[Word], texts: list[str], stamp: Callable[[float], str]) -> Iterator[tuple[str, str, str]]:
    last = stamp(words[0].start)
    for i, word in enumerate(words):
        start, end = stamp(word.start), stamp(word.end)
        if last != start:
            yield last, start, "".join(texts)
        marked = [re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", text) if j == i else text for j, text in enumerate(texts)]
        yield start, end, "".join(marked)
        last = end


def _timestamp(seconds: float, marker: str, *, hours: bool) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    whole, minutes = divmod(minutes, 60)
    shown = f"{whole:02d}:" if hours or whole else ""
    return f"{shown}{minutes:02d}:{milliseconds // 1000:02d}{marker}{milliseconds % 1000:03d}"
