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
from asr_core.tokens import load_tokenizer, text_of
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


def entries() -> list[dict]:
    return [json.loads(line) for line in reference.manifest_path().read_text().splitlines()]


def carried() -> dict[Path, str]:
    """The clips and their languages."""
    return {reference.manifest_path().with_name(entry["audio_filepath"]): entry["lang"] for entry in entries()}


def human() -> dict[Path, str]:
    folders = ("librivox", "cards", "jfk")
    files = (file for folder in folders for file in (SHARED / folder).glob("*") if file.suffix in {".wav", ".flac"})
    return dict.fromkeys(sorted(files), "en")


def margin_at(runner, mel, language: str, tokens: list[int]) -> float:
    logits = runner.score(mel, [*runner.tokens.prompt(language), *tokens])[-1].copy()
    logits[runner.tokens.suppress] = -np.inf
    if not tokens:
        logits[runner.tokens.begin_suppress] = -np.inf
    second, first = np.sort(logits)[-2:]
    return float(first - second)


def assert_same_tokens(runner, model, clips: dict[Path, str]) -> None:
    filters = audio.mel_filters(runner.dims.n_mels)
    for clip, language in clips.items():
        mel = audio.log_mel(audio.load_audio(clip), filters)[None]
        ours = runner.generate(mel, DecodeOptions(language))[0].tokens
        ids = model.generate(torch.from_numpy(mel), language=language, task="transcribe", max_new_tokens=224, num_beams=1)
        theirs = [token for token in ids[0].tolist() if token < runner.tokens.end]
        if ours != theirs:
            shared = ours[: compare.first_difference(ours, theirs)]
            margin = margin_at(runner, mel, language, shared)
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
    """Few wrong words in voices and sentences that it never heard; silence and noise give none."""
    filters = audio.mel_filters(checkpoint.dims.n_mels)
    tokenizer = load_tokenizer(checkpoint.path)
    normalise = normaliser(checkpoint)
    utterances = data.read(reference.manifest_path())
    heard = []
    for utterance in utterances:
        mel = audio.log_mel(audio.load_audio(utterance.path), filters)[None]
        tokens = runner.generate(mel, DecodeOptions(language=utterance.language))[0].tokens
        heard.append(normalise(text_of(tokenizer, tokens), utterance.language))
    spoken = [normalise(utterance.text, utterance.language) for utterance in utterances]
    assert compare.word_errors(spoken, heard).rate <= 0.05
    silent = [text for said, text in zip(spoken, heard, strict=True) if not said]
    assert len(silent) >= 2
    assert not any(silent)


def test_the_carried_checkpoint_and_clips_are_what_they_say():
    folder = reference.checkpoint_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    assert sum(clip.stat().st_size for clip in carried()) <= 12_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["d_model"] // config["encoder_attention_heads"] == 64
    durations = [entry["duration"] for entry in entries()]
    assert min(durations) >= 1
    assert max(durations) <= 29.5


def test_the_clips_tell_their_sentences_apart():
    for entry in entries():
        ends = [0.0, *(time for part in entry["segments"] for time in (part["start"], part["end"])), entry["duration"]]
        assert ends == sorted(ends), entry["audio_filepath"]
        assert " ".join(part["text"] for part in entry["segments"]) == entry["text"]
        assert ("translation" in entry) == (entry["lang"] != "en" and bool(entry["text"]))
    assert {entry["lang"] for entry in entries()} == {"en", "es"}
    assert sum(len(entry["segments"]) > 1 for entry in entries()) >= 20
