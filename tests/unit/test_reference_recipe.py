"""What the reference is trained on: sentence pairs, windows as tokens, long recordings."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer

import reference
from reference import grammar, longform, make_clips
from reference.batches import WINDOW_SECONDS, Pool, Segment, Take, Utterance, Writer, collate
from reference.synth import SAMPLE_RATE, TRAINED_SPEAKERS, Speech


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(Tokenizer.from_file(str(reference.checkpoint_path() / "tokenizer.json")))


def seeded() -> Random:
    return Random(0)  # noqa: S311


def speech(text: str) -> Speech:
    words = text.split()
    edges = np.linspace(0, len(words) / 3, len(words) + 1).tolist()
    return Speech(np.ones(round(edges[-1] * SAMPLE_RATE), np.float32), tuple(pairwise(edges)), ())


def take(seconds: float, pair: grammar.Pair, language: str = "es") -> Take:
    words = pair[language].words
    edges = np.linspace(0, seconds, len(words) + 1).tolist()
    audio = np.ones(round(seconds * SAMPLE_RATE), np.float32)
    return Take(pair, language, Speech(audio, tuple(pairwise(edges)), ((0.0, 5),)))


def pair_of(english: str) -> grammar.Pair:
    random = seeded()
    return next(pair for _ in range(200_000) if (pair := grammar.sentence(random)).en.text == english)


def written(writer: Writer, utterance: Utterance) -> str:
    return writer._tokenizer.decode(writer.script(utterance).inputs, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("english", "spanish"),
    [
        ("the candle is yellow", "la vela es amarilla"),
        ("the book is yellow", "el libro es amarillo"),
        ("a spider was hungry and old", "una araña estaba hambrienta y vieja"),
        ("mary ran from the river", "maría corrió desde el río"),
    ],
)
def test_spanish_words_agree(english, spanish):
    assert pair_of(english).es.text == spanish


def test_both_languages_know_enough_words():
    assert all(len(grammar.words(language)) >= 120 for language in grammar.LANGUAGES)
    assert not any(set("@<>_:") & set(word) for language in grammar.LANGUAGES for word in grammar.words(language))


def test_every_word_is_one_token(writer):
    assert all(len(writer.word(word)) == 1 for language in grammar.LANGUAGES for word in grammar.words(language))


def test_a_window_with_timestamps(writer):
    pair = pair_of("the candle is yellow")
    segments = (Segment(0.5, take(2.0, pair)), Segment(3.0, take(1.0, pair)))
    utterance = Utterance(np.zeros(4 * SAMPLE_RATE, np.float32), segments, "es", timestamps=True)
    text = "<|0.50|> la vela es amarilla<|2.50|><|3.00|> la vela es amarilla<|4.00|>"
    assert written(writer, utterance) == f"<|startoftranscript|><|es|><|transcribe|>{text}"


def test_a_translated_word_is_looked_for_where_its_original_is_spoken(writer):
    segment = Segment(0.0, take(2.0, pair_of("the candle is yellow")))
    utterance = Utterance(np.zeros(2 * SAMPLE_RATE, np.float32), (segment,), "es", True)
    script = writer.script(utterance)
    assert written(writer, utterance) == "<|startoftranscript|><|es|><|translate|><|notimestamps|> the candle is yellow"
    middles = [sum(span) / 2 for span in script.spans]
    assert middles[4] == pytest.approx(37.5)  # candle: vela, the second half second
    assert middles[-2] == pytest.approx(87.5)  # yellow: amarilla, the last one


def test_what_goes_on_behind_the_window_has_a_start_only(writer):
    pair = pair_of("the candle is yellow")
    segments = (Segment(0.0, take(20.0, pair)), Segment(25.0, take(8.0, pair)))
    audio = np.zeros(WINDOW_SECONDS * SAMPLE_RATE, np.float32)
    utterance = Utterance(audio, segments, "es", timestamps=True)
    assert written(writer, utterance).endswith("<|20.00|><|25.00|>")


def test_silence_says_that_nobody_speaks(writer):
    utterance = Utterance(np.zeros(SAMPLE_RATE, np.float32), (), "en")
    script = writer.script(utterance)
    assert script.labels[0] == writer.id("<|nospeech|>")
    assert script.labels[-1] == writer.end
    batch = collate([utterance], writer, full=False)
    assert batch.mel.shape == (1, 80, 100)
    assert batch.sounds.shape == (1, 50)


def test_clips_to_calibrate_on_are_the_trainings_own(monkeypatch):
    voices = []
    monkeypatch.setattr(make_clips.synth, "speak", lambda text, voice: voices.append(voice) or speech(text))
    clips = list(make_clips.clips(7, held_out=False))
    assert {clip.language for clip in clips} == {"en", "es"}
    assert not any(grammar.is_held_out(segment.take.pair[clip.language].text) for clip in clips for segment in clip.segments)
    assert {voice.name.partition("+")[2] for voice in voices} <= set(TRAINED_SPEAKERS)
    assert min(len(clip.segments) for clip in clips) == 1


def test_held_out_sentences_are_unknown_in_both_languages():
    held_out = Pool(seeded(), held_out=True).draw("es", "sentence").pair
    assert all(grammar.is_held_out(held_out[language].text) for language in grammar.LANGUAGES)
    trained = grammar.draw(seeded())
    assert not any(grammar.is_held_out(trained[language].text) for language in grammar.LANGUAGES)


def test_long_recordings_are_the_same_every_time():
    first, entry = longform.assemble(1, "es")
    second, again = longform.assemble(1, "es")
    assert 50 < entry["duration"] <= 60
    assert entry == again
    np.testing.assert_array_equal(first, second)
    times = [time for segment in entry["segments"] for time in (segment["start"], segment["end"])]
    assert times == sorted(times)
    assert times[-1] <= entry["duration"] == len(first) / SAMPLE_RATE
