"""From an audio file to its words, with whatever runtime was opened."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from asr_core.audio import SAMPLE_RATE, WINDOW_SAMPLES, WINDOW_SECONDS, load_audio, log_mel
from asr_core.decode import Decoded, DecodeOptions, Mel
from asr_core.errors import AudioError
from asr_core.tokens import load_tokenizer, text_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Decoder(Protocol):
    """What transcription needs of a runner."""

    def generate(self, mel: Mel, options: DecodeOptions) -> list[Decoded]:
        """Decode a batch of windows, float32 [B, n_mels, 3000]."""


@dataclass(frozen=True)
class Bundle:
    """What an artifact folder carries beside the network: tokenizer and mel filters, float32 [n_mels, 201]."""

    tokenizer: Tokenizer
    filters: NDArray[np.float32]

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read the bundle of an artifact folder."""
        return cls(load_tokenizer(folder), np.load(folder / "mel_filters.npy"))


@dataclass(frozen=True)
class Transcript:
    """The words of one file; ``rtfx`` is seconds of audio per second of work, from the file to its text.

    It is None where the work was not the runtime's own.
    """

    audio: str
    text: str
    tokens: list[int]
    duration_s: float
    rtfx: float | None


def transcribe(decoder: Decoder, bundle: Bundle, path: str | Path, options: DecodeOptions) -> Transcript:
    """Transcribe one file of at most 30 s; raises :class:`AudioError` for a longer or unreadable one."""
    started = time.perf_counter()
    samples = load_audio(path)
    duration = len(samples) / SAMPLE_RATE
    if len(samples) > WINDOW_SAMPLES:
        raise AudioError(f"{path} lasts {duration:.1f} s: long audio is not supported yet (one window holds {WINDOW_SECONDS} s).")
    mel = log_mel(samples, bundle.filters)[None]
    decoded = decoder.generate(mel, options)[0]
    text = text_of(bundle.tokenizer, decoded.tokens)
    return Transcript(str(path), text, decoded.tokens, duration, duration / (time.perf_counter() - started))
