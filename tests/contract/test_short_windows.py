"""Windows that end with their audio: what the encoders that take them say, CTranslate2's own among them."""

import json
from pathlib import Path

import numpy as np
import pytest

import reference
from asr_core.audio import load_audio, log_mel, mel_filters
from asr_core.decode import DecodeOptions
from runners.base import open_runner
from tests.support import run_command

TAKERS = ("onnx-fp32", "openvino-fp32", "ctranslate2-fp32")
FRAMES = 778


def runner_of(artifacts: Path, name: str):
    return open_runner(name.partition("-")[0], artifacts / "reference" / name, 1)


def first_clips(count: int) -> list[Path]:
    lines = reference.manifest_path().read_text().splitlines()[:count]
    return [reference.manifest_path().parent / json.loads(line)["audio_filepath"] for line in lines]


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    mels = [log_mel(load_audio(clip), mel_filters(80)) for clip in first_clips(3)]
    return np.ascontiguousarray(np.stack(mels)[:, :, :FRAMES])


@pytest.mark.parametrize("name", TAKERS[:2])
def test_a_short_window_is_what_ctranslate2_makes_of_it(artifacts, windows, name):
    """That runtime takes any length by itself, and shares no code with our graphs."""
    theirs, ours = runner_of(artifacts, "ctranslate2-fp32"), runner_of(artifacts, name)
    assert theirs.short_windows
    assert ours.short_windows
    expected = theirs.encoder_states(windows)
    assert expected.shape[1] == FRAMES // 2
    # As between whole windows: float32 in two orders of summation, states of about 1.
    np.testing.assert_allclose(ours.encoder_states(windows), expected, atol=2e-3)
    answers = [[said.tokens for said in one.generate(windows, DecodeOptions())] for one in (ours, theirs)]
    assert answers[0] == answers[1]
    assert all(answers[0])


def test_the_command_trims(artifacts):
    clip = first_clips(1)[0]
    said = [
        run_command("asr-transcribe", clip, "--artifact", artifacts / "reference" / name, "--trim-silence", "--language", "en")
        for name in TAKERS
    ]
    assert [done.returncode for done in said] == [0] * len(TAKERS)
    assert len({done.stdout for done in said}) == 1
    assert said[0].stdout.strip()


def test_a_fixed_encoder_refuses(artifacts):
    done = run_command("asr-transcribe", first_clips(1)[0], "--artifact", artifacts / "reference" / "ncnn-fp32", "--trim-silence")
    assert done.returncode == 2
    assert "takes whole windows of 30 s" in done.stderr


def test_parity_refuses(artifacts):
    done = run_command("asr-parity", "--artifacts", artifacts, "--trim-silence")
    assert done.returncode == 2
    assert "parity compares what is said of whole windows" in done.stderr
