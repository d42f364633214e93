"""The PyTorch runner and our decode loop against transformers' own generate, on every clip at hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

import reference
from asr_core import audio
from asr_core.decode import DecodeOptions
from parity import compare, data
from parity.session import normaliser
from runners.base import open_runner

# Below this top-2 margin float32 arithmetic in another order may choose either token.
UNDECIDED = 1e-4
SHARED = Path(os.environ.get("ASR_EXPORT_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


@pytest.fixture(scope="module")
def runner(checkpoint):
    return open_runner("pytorch", checkpoint.path, 2)


@pytest.fixture(scope="module")
def model(checkpoint):
    return WhisperForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


def carried() -> list[Path]:
    return sorted(reference.manifest_path().parent.glob("*.flac"))


def human() -> list[Path]:
    folders = ("librivox", "cards", "jfk")
    return sorted(file for folder in folders for file in (SHARED / folder).glob("*") if file.suffix in {".wav", ".flac"})


def margin_at(runner, mel, tokens: list[int]) -> float:
    logits = runner.score(mel, [*runner.tokens.prompt(), *tokens])[-1].copy()
    logits[runner.tokens.suppress] = -np.inf
    if not tokens:
        logits[runner.tokens.begin_suppress] = -np.inf
    second, first = np.sort(logits)[-2:]
    return float(first - second)


def assert_same_tokens(runner, model, clips: list[Path]) -> None:
    filters = audio.mel_filters(runner.dims.n_mels)
    for clip in clips:
        mel = audio.log_mel(audio.load_audio(clip), filters)[None]
        ours = runner.generate(mel, DecodeOptions())[0].tokens
        ids = model.generate(torch.from_numpy(mel), language="en", task="transcribe", max_new_tokens=224, num_beams=1)
        theirs = [token for token in ids[0].tolist() if token < runner.tokens.end]
        if ours != theirs:
            shared = ours[: compare.first_difference(ours, theirs)]
            margin = margin_at(runner, mel, shared)
            assert margin < UNDECIDED, f"{clip.name}: tokens differ after {len(shared)}, margin {margin}"


def test_carried_clips_decode_as_transformers_does(runner, model):
    assert len(carried()) >= 100
    assert_same_tokens(runner, model, carried())


def test_human_speech_decodes_as_transformers_does(runner, model):
    if not SHARED.is_dir():
        pytest.skip(f"no human speech at {SHARED}: set ASR_EXPORT_DATA to the folder that holds it")
    assert len(human()) == 11
    assert_same_tokens(runner, model, human())


def test_the_carried_checkpoint_is_trained(checkpoint, runner):
    """At most 5 % WER on voices and sentences that it never heard; silence and noise give no words."""
    utterances = data.read(reference.manifest_path())
    filters = audio.mel_filters(checkpoint.dims.n_mels)
    from asr_core.tokens import load_tokenizer, text_of

    tokenizer = load_tokenizer(checkpoint.path)
    normalise = normaliser(checkpoint)
    heard = []
    for utterance in utterances:
        mel = audio.log_mel(audio.load_audio(utterance.path), filters)[None]
        tokens = runner.generate(mel, DecodeOptions(language=utterance.language))[0].tokens
        heard.append(normalise(text_of(tokenizer, tokens), utterance.language))
    spoken = [normalise(utterance.text, utterance.language) for utterance in utterances]
    assert compare.word_errors(spoken, heard).rate <= 0.05
    assert [text for said, text in zip(spoken, heard, strict=True) if not said] == ["", ""]


def test_the_carried_checkpoint_and_clips_are_what_they_say():
    folder = reference.checkpoint_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    assert sum(clip.stat().st_size for clip in carried()) <= 12_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["d_model"] // config["encoder_attention_heads"] == 64
    durations = [json.loads(line)["duration"] for line in reference.manifest_path().read_text().splitlines()]
    assert min(durations) >= 1
    assert max(durations) <= 29.5
