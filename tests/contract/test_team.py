"""Several copies of every artifact decode at the same time and say what one says."""

import json
from itertools import pairwise

import numpy as np
import pytest
import soundfile

import reference
from asr_core import capacity
from asr_core.decode import DecodeOptions
from asr_core.transcribe import Bundle, TranscribeOptions, transcribe
from runners.base import open_team

ARTIFACTS = ["onnx-fp32", "onnx-int8", "ctranslate2-int8", "openvino-int8", "tflite-fp32", "ncnn-fp32"]
CLIPS = 4


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Short carried clips, one behind the other; also where each begins and ends, in seconds."""
    manifest = reference.manifest_path()
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    short = sorted((entry for entry in entries if entry["text"]), key=lambda entry: entry["duration"])[:CLIPS]
    sounds = [soundfile.read(manifest.with_name(entry["audio_filepath"]), dtype="float32")[0] for entry in short]
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(path, np.concatenate(sounds), 16000)
    edges = [0.0, *np.cumsum([len(sound) / 16000 for sound in sounds]).tolist()]
    return path, tuple(pairwise(edges))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_team_says_what_one_says(artifacts, talk, name):
    path, clips = talk
    folder = artifacts / "reference" / name
    options = TranscribeOptions(DecodeOptions("en", timestamps=True), clips=clips, batch_size=2)
    said = []
    for threads in (1, 2):
        team = open_team(name.split("-")[0], folder, threads, options.batch_size)
        assert len(team) == threads
        said.append(transcribe(team, Bundle.read(folder), path, options))
        for runner in team:
            runner.close()
    assert said[1].text == said[0].text != ""
    assert [(s.start, s.end, s.tokens) for s in said[1].segments] == [(s.start, s.end, s.tokens) for s in said[0].segments]


def test_one_copy_has_all_threads_where_more_are_of_no_use_or_have_no_room(artifacts, monkeypatch):
    folder, opened = artifacts / "reference" / "onnx-int8", []
    monkeypatch.setattr("runners.onnx.open", lambda path, threads: opened.append(threads))
    open_team("onnx", folder, 4, batch_size=1)
    monkeypatch.setattr(capacity, "available_mb", lambda: 1.0)
    open_team("onnx", folder, 4, batch_size=8)
    assert opened == [4, 4]
    monkeypatch.setattr(capacity, "copies", lambda *given: 3)
    open_team("onnx", folder, 4, batch_size=8)
    assert opened[2:] == [1, 1, 2]
