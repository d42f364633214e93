"""The CTranslate2 artifact in the hands of the client that most people use for it."""

from pathlib import Path

import numpy as np
import pytest

from asr_core import audio, build
from asr_core.artifact import Artifact
from asr_core.decode import DecodeOptions
from asr_core.tokens import load_tokenizer, text_of
from runners import ctranslate2

CLIPS = 10


@pytest.fixture(scope="module")
def artifact(trained, tmp_path_factory) -> Artifact:
    return build.stage(trained, "ctranslate2", "fp32", tmp_path_factory.mktemp("client") / "ctranslate2-fp32").publish()


@pytest.fixture(scope="module")
def windows(clips) -> list[np.ndarray]:
    """Clips spread over the set, padded to a window: faster-whisper would decode shorter ones otherwise than Whisper does."""
    chosen = clips[:: len(clips) // CLIPS][:CLIPS]
    samples = [audio.load_audio(clip)[: audio.WINDOW_SAMPLES] for clip in chosen]
    return [np.pad(clip, (0, audio.WINDOW_SAMPLES - len(clip))) for clip in samples]


def our_texts(folder: Path, windows: list[np.ndarray]) -> list[str]:
    runner, tokenizer = ctranslate2.open(folder, 1), load_tokenizer(folder)
    filters = np.load(folder / "mel_filters.npy")
    mels = [audio.log_mel(window, filters)[None] for window in windows]
    return [text_of(tokenizer, runner.generate(mel, DecodeOptions())[0].tokens) for mel in mels]


def test_faster_whisper_loads_the_folder_and_says_the_same(artifact, windows):
    from faster_whisper import WhisperModel

    model = WhisperModel(str(artifact.path), device="cpu", compute_type="float32", cpu_threads=1, local_files_only=True)
    assert model.model.is_multilingual
    assert model.feature_extractor.mel_filters.shape[0] == artifact.manifest.dims.n_mels
    policy = {
        "language": "en",
        "beam_size": 1,
        "temperature": 0,
        "without_timestamps": True,
        "condition_on_previous_text": False,
        "vad_filter": False,
        "suppress_tokens": artifact.manifest.tokens.suppress,
        # No second opinion on silence or on improbable words: ours keeps what was decoded.
        "no_speech_threshold": None,
        "log_prob_threshold": None,
        "compression_ratio_threshold": None,
    }
    theirs = ["".join(segment.text for segment in model.transcribe(window, **policy)[0]).strip() for window in windows]
    assert theirs == our_texts(artifact.path, windows)
    assert len(set(theirs)) > 1


@pytest.mark.parametrize("name", ["mini.en", "mini-large-v3"])
def test_faster_whisper_knows_what_kind_of_model_it_is(shape_folder, export_here, windows, name):
    """An English-only one, and one of 128 mels and 100 languages."""
    from faster_whisper import WhisperModel

    artifact = export_here(shape_folder(name), "ctranslate2", "fp32")
    model = WhisperModel(str(artifact.path), device="cpu", compute_type="float32", cpu_threads=1, local_files_only=True)
    assert model.model.is_multilingual == bool(artifact.manifest.tokens.languages)
    assert model.feature_extractor.mel_filters.shape[0] == artifact.manifest.dims.n_mels
    segments, _ = model.transcribe(windows[0], language="en", temperature=0, max_new_tokens=5)
    assert sum(len(segment.tokens) for segment in segments) > 0
