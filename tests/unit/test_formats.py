"""Every format byte for byte as openai-whisper's writers make it."""

import io
import json

import pytest
from whisper import utils

from asr_core.align import Word
from asr_core.audio import Gap
from asr_core.segments import Segment
from asr_core.transcribe import Transcript
from asr_export.formats import FORMATS, written


def segment(start: float, text: str, words: list[Word] | None) -> Segment:
    return Segment(0, 0, start, start + 1.2345, text, [1, 2], 0.2, -0.5, 1.5, 0.01, words)


def transcript(*, timed: bool) -> Transcript:
    texts = [" Good morning, --> señor.\tTab", "", "  Zweite Zeile", " " + "many words " * 150, " 3.6 s"]
    segments = []
    for i, text in enumerate(texts):
        start = i * 1000.007
        pieces = [f" {piece}" for piece in text.split()]
        words = [Word(piece, start + k * 0.3, start + k * 0.3 + (0.3 if k % 2 else 0.21), 0.5) for k, piece in enumerate(pieces)]
        segments.append(segment(start, text, words if timed else None))
    return Transcript("talk.wav", "".join(texts), segments, "en", 12.3456, 7.891, (Gap(1.0, 2.5),))


def theirs(found: Transcript, form: str, **options: bool) -> str:
    result = json.loads(FORMATS["json"](found))
    file = io.StringIO()
    writer = utils.get_writer(form, ".")
    writer.write_result(result, file, options)
    return file.getvalue()


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_formats_are_openai_whispers(form, timed):
    found = transcript(timed=timed)
    assert written(found, form) == theirs(found, form)
    empty = Transcript("silence.wav", "", [], "en", 1.0, None)
    assert written(empty, form) == theirs(empty, form)


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_highlighted_words_are_openai_whispers(form):
    found = transcript(timed=True)
    assert written(found, form, highlight=True) == theirs(found, form, highlight_words=True)


def test_json_says_what_was_not_readable():
    assert json.loads(written(transcript(timed=False), "json"))["unreadable"] == [{"start": 1.0, "end": 2.5}]
