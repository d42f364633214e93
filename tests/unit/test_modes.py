"""Verdicts over the other modes of transcription, from made-up results."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from asr_core import audio
from parity import data, modes
from parity.data import Utterance

TIE = 1e-4


@pytest.fixture
def reference() -> dict:
    heard = [{"tokens": [5, 6, 7], "sum_logprob": -3.0}, {"tokens": [8], "sum_logprob": -0.5}]
    segments = [{"start": 0.0, "end": 2.0, "tokens": [5, 6]}, {"start": 2.0, "end": 31.0, "tokens": [7]}]
    return {
        "decoded": {"timestamps": heard, "beam": deepcopy(heard)},
        "languages": [{"en": 0.9, "es": 0.1}, {"en": 0.5002, "es": 0.4998}],
        "boundaries": [[0.0, 1.5, 1.5, 3.0], [0.2, 0.8]],
        "words": [[[0.0, 0.5], [0.5, 1.5]], [[0.2, 0.8]]],
        "long": {"long form": segments},
    }


def test_the_reference_passes_itself_and_is_measured_against_the_truth(reference):
    judged = modes.judge(reference, reference, [(0.1, 1.5, 1.6, 3.0), ()], TIE)
    assert judged.wrong == {}
    assert (judged.figures.boundary_p95_s, judged.figures.word_p95_s) == (0, 0)
    assert (judged.figures.words_in_place, judged.figures.language_match) == (1, 1)  # of the one window that is clear
    assert judged.figures.boundary_error_s == pytest.approx(0.05)  # the window of unknown truth doesn't count


def test_other_tokens_fail_unless_the_model_finds_them_as_likely(reference):
    candidate = deepcopy(reference)
    candidate["decoded"]["beam"][0] = {"tokens": [5, 6, 9, 9], "sum_logprob": -3.0004}
    assert modes.judge(reference, candidate, [(), ()], TIE).wrong == {}
    assert modes.judge(reference, candidate, [(), ()], 1e-5).wrong == {"beam": "1 of 2 windows, first window 0 from token 2 on"}


def test_each_wrong_mode_is_named(reference):
    candidate = deepcopy(reference)
    candidate["languages"] = [{"en": 0.4, "es": 0.6}] * 2  # PyTorch is undecided about the second
    candidate["long"]["long form"][1]["end"] = 30.0
    wrong = modes.judge(reference, candidate, [(), ()], TIE).wrong
    assert wrong["language"] == "window 0 is es, for PyTorch en"
    assert wrong["long form"].startswith("segment 1 of 2: 2.00 to 30.00 s for 2.00 to 31.00 s")
    del candidate["long"]["long form"][1]
    assert modes.judge(reference, candidate, [(), ()], TIE).wrong["long form"] == "1 segments for 2"


def test_a_quantised_artifact_is_judged_by_its_figures(reference):
    candidate = deepcopy(reference)
    candidate["decoded"]["timestamps"][0]["tokens"] = [1]
    candidate["boundaries"] = [[0.0, 1.7, 1.7, 3.0], [0.2]]
    candidate["words"] = [[[0.0, 0.5], [0.5, 1.54]], [[0.22, 0.8]]]
    judged = modes.judge(reference, candidate, [(), ()], None)
    assert judged.wrong == {}
    assert judged.figures.boundary_p95_s == pytest.approx(np.percentile([0, 0.2, 0.2, 0], 95))
    assert judged.figures.words_in_place == pytest.approx(5 / 6)
    candidate["words"] = None
    assert modes.figures(reference, candidate, [(), ()]).words_in_place is None


def test_the_recording_is_utterances_of_one_language_with_pauses(clips: list[Path], tmp_path: Path):
    utterances = [
        Utterance(clip.stem, clip, "words", language=code) for clip, code in zip(clips, ["en", "es", "en"], strict=False)
    ]
    modes.prepare(utterances, tmp_path)
    samples = audio.load_audio(tmp_path / modes.RECORDING)
    assert len(samples) / audio.SAMPLE_RATE == pytest.approx(modes.RECORDING_S)
    first, third = audio.load_audio(clips[0]), audio.load_audio(clips[2])
    np.testing.assert_allclose(samples[: len(first)], first, atol=1e-4)
    after = len(first) + round(modes.PAUSE_S * audio.SAMPLE_RATE)
    assert np.abs(samples[len(first) : after]).max() == 0
    np.testing.assert_allclose(samples[after : after + len(third)], third, atol=1e-4)


def test_manifests_tell_languages_and_boundaries(tmp_path: Path):
    segments = [{"start": 0.5, "end": 1}, {"start": 2, "end": 3}]
    entries = [
        {"audio_filepath": "a.flac", "text": "uno dos", "lang": "es", "segments": segments},
        {"audio_filepath": "b.flac", "text": "one"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    spanish, english = data.read(tmp_path / "m.jsonl")
    assert (spanish.language, spanish.boundaries) == ("es", (0.5, 1.0, 2.0, 3.0))
    assert (english.language, english.boundaries) == ("en", ())
