"""Word timestamps: attention and words of every backend, beside PyTorch's and openai-whisper's."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino_genai
import pytest
import torch
from whisper import timing

import reference
from asr_core import align, audio, registry
from asr_core.align import AlignRequest, TimedWord
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import UsageError
from asr_core.tokens import load_tokenizer
from runners.base import Runner, StepRunner, open_runner
from tests import openai_oracle

TARGETS = registry.names("exporters")
TOLERANCE = 0.02 + 1e-9  # seconds: one audio position
# Of openai-whisper's boundaries, equal paths decide the rest.
EXPECTED_SHARE = 0.95
# openvino_genai has a path and rules of its own: 94 % of 164 boundaries, the others up to 0.2 s apart.
CLIENT_SHARE = 0.9


class Heard(NamedTuple):
    """A window and what PyTorch says in it."""

    samples: np.ndarray
    mel: np.ndarray
    request: AlignRequest


@pytest.fixture(scope="module")
def pytorch(checkpoint: Checkpoint) -> StepRunner:
    return open_runner("pytorch", checkpoint.path, 1)


def hear(clip: Path, pytorch: StepRunner) -> Heard:
    samples = audio.load_audio(clip)[: audio.WINDOW_SAMPLES]
    mel = audio.log_mel(samples, audio.mel_filters(pytorch.dims.n_mels))[None]
    tokens = tuple(pytorch.generate(mel, DecodeOptions())[0].tokens)
    return Heard(samples, mel, AlignRequest(0, tokens, min(3000, len(samples) // audio.HOP)))


@pytest.fixture(scope="module")
def few(pytorch: StepRunner) -> list[Heard]:
    clips = sorted(reference.manifest_path().parent.glob("*.flac"))
    return [hear(clip, pytorch) for clip in clips[:: len(clips) // 4][:4]]


def words_of(runner: Runner, folder: Path, heard: Heard) -> list[TimedWord]:
    found = runner.align(heard.mel, [heard.request])[0]
    return align.time_words(load_tokenizer(folder), runner.tokens, heard.request, found)


def bounds(words: list) -> np.ndarray:
    return np.array([time for word in words for time in (word.start, word.end)])


def share_within(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Of boundaries that are one position apart at most."""
    return float((np.abs(np.concatenate(ours) - np.concatenate(theirs)) <= TOLERANCE).mean())


def test_words_are_openais(checkpoint, pytorch):
    """On the same weights and tokens."""
    clips = sorted(reference.manifest_path().parent.glob("*.flac"))[::7]
    theirs = openai_oracle.model(checkpoint, checkpoint.alignment_heads)
    tokenizer = openai_oracle.tokenizer(checkpoint.path)
    ours, expected = [], []
    for heard in (hear(clip, pytorch) for clip in clips):
        words = words_of(pytorch, checkpoint.path, heard)
        found = timing.find_alignment(
            theirs, tokenizer, list(heard.request.tokens), torch.from_numpy(heard.mel[0]), heard.request.frames
        )
        assert [(word.word, word.tokens) for word in words] == [(word.word, word.tokens) for word in found]
        np.testing.assert_allclose([word.probability for word in words], [word.probability for word in found], atol=1e-4)
        ours.append(bounds(words))
        expected.append(bounds(found))
    assert len(np.concatenate(expected)) > 60
    assert share_within(ours, expected) >= EXPECTED_SHARE


@pytest.mark.parametrize("target", TARGETS)
def test_every_backend_finds_the_words_that_pytorch_finds(artifacts, checkpoint, pytorch, few, target):
    folder = artifacts / "reference" / f"{target}-fp32"
    runner = open_runner(target, folder, 1)
    assert runner.alignment_heads == checkpoint.alignment_heads
    ours = [bounds(words_of(runner, folder, heard)) for heard in few]
    theirs = [bounds(words_of(pytorch, checkpoint.path, heard)) for heard in few]
    assert share_within(ours, theirs) >= EXPECTED_SHARE
    if not isinstance(runner, StepRunner):
        return
    for heard in few:
        forced = np.array([align.forced_tokens(runner.tokens, heard.request)], np.int64)
        expected, _ = pytorch.cross_attention(forced, pytorch.encode(heard.mel))
        scores, logits = runner.cross_attention(forced, runner.encode(heard.mel))
        # Products of 64 numbers of the order of 1, in another order.
        np.testing.assert_allclose(scores, expected, atol=1e-3)
        assert logits.shape == (forced.shape[1], runner.dims.vocab)


def test_a_batch_is_aligned_window_by_window(artifacts, few):
    folder = artifacts / "reference" / "onnx-fp32"
    runner = open_runner("onnx", folder, 1)
    mel = np.concatenate([heard.mel for heard in few])
    requests = [replace(heard.request, window=i) for i, heard in enumerate(few)]
    together = runner.align(mel, requests)
    for heard, found in zip(few, together, strict=True):
        (alone,) = runner.align(heard.mel, [heard.request])
        np.testing.assert_array_equal(found.time, alone.time)


def test_openvino_genai_finds_the_same_words(artifacts, few, checkpoint, pytorch):
    folder = artifacts / "reference" / "openvino-fp32"
    precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    client = openvino_genai.WhisperPipeline(str(folder), "CPU", word_timestamps=True, **precise)
    ours, theirs = [], []
    for heard in few:
        said = client.generate(heard.samples.tolist(), language="<|en|>", task="transcribe", word_timestamps=True)
        words = words_of(pytorch, checkpoint.path, heard)
        assert [word.word for word in said.words] == [word.word for word in words]
        ours.append(bounds(words))
        theirs.append(np.array([time for word in said.words for time in (word.start_ts, word.end_ts)]))
    assert share_within(ours, theirs) >= CLIENT_SHARE


def test_an_artifact_without_attention_says_how_to_get_it(pytorch, few, monkeypatch):
    monkeypatch.setattr(pytorch, "alignment_heads", None)
    with pytest.raises(UsageError, match="Export it again"):
        pytorch.align(few[0].mel, [few[0].request])
