"""Verdicts over the failure classes, from made-up results; the windows themselves."""

from copy import deepcopy

import numpy as np
import pytest

from asr_core import audio
from parity import data, suite

TOLERANCE = 1e-4


@pytest.fixture
def reference() -> dict:
    alone = {"clip": [5, 6, 7], "silence": [], "0.1 s": [8]}
    return {
        "alone": alone,
        "again": [5, 6, 7],
        "batch": deepcopy(alone),
        "prompts": {"task translate": [9]},
        "threads": [5, 6, 7],
        "margins": {"clip": [3.0, 1e-5, 3.0, 3.0], "silence": [2.0], "0.1 s": [2.0, 2.0]},
    }


def test_the_reference_passes_itself(reference):
    assert suite.judge(reference, reference, TOLERANCE) == {}
    assert suite.judge(reference, reference, None) == {}


@pytest.mark.parametrize(
    ("where", "tokens", "named"),
    [
        (("alone", "silence"), [4], "silence"),
        (("alone", "0.1 s"), [], "0.1 s"),
        (("batch", "0.1 s"), [3], "0.1 s in a batch"),
        (("prompts", "task translate"), [5, 6, 7], "prompt with task translate"),
        (("threads",), [5], "another number of threads"),
        (("again",), [5, 6, 7, 7], "the same clip twice"),
    ],
)
def test_each_case_is_named(reference, where, tokens, named):
    candidate = deepcopy(reference)
    *path, last = where
    place = candidate
    for step in path:
        place = place[step]
    place[last] = tokens
    if where[0] == "alone":
        candidate["batch"][last] = tokens
    # Where the second token of the clip differs PyTorch is undecided; nowhere else.
    expected = set() if named == "another number of threads" else {named}
    assert set(suite.judge(reference, candidate, TOLERANCE)) == expected
    assert set(suite.judge(reference, candidate, 0.0)) == {named}


def test_a_quantised_artifact_may_say_something_else_but_not_run_on_or_remember(reference):
    candidate = deepcopy(reference)
    candidate["alone"]["0.1 s"] = [9]
    candidate["batch"]["0.1 s"] = [10]
    assert suite.judge(reference, candidate, None) == {}
    candidate["alone"]["silence"] = [1] * suite.MOST_TOKENS
    candidate["again"] = [5]
    assert set(suite.judge(reference, candidate, None)) == {"silence", "the same clip twice"}


def test_windows_are_what_they_are_called(clips, tmp_path):
    utterances = [data.Utterance(clip.stem, clip, "words " * i) for i, clip in enumerate(clips[:4])]
    suite.prepare(utterances, 80, tmp_path)
    with np.load(tmp_path / suite.WINDOWS) as windows:
        assert set(windows) == set(suite.LEVELS["full"]) > set(suite.LEVELS["quick"])
        assert all(mel.shape == (80, audio.WINDOW_FRAMES) for mel in windows.values())
        assert len(np.unique(windows["silence"])) == 1
        longest = audio.log_mel(audio.load_audio(clips[3]), audio.mel_filters(80))
        np.testing.assert_array_equal(windows[suite.CLIP], longest)
        np.testing.assert_allclose(windows["29.9 s"][:, :2900], windows["30 s"][:, :2900], atol=1e-5)
