"""Core ML programs under WhisperKit's names, called as that client calls them: one window and one token at a time.

On macOS Core ML runs them, elsewhere the interpreter (see :mod:`runners.coreml`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr_core import audio
from asr_core.artifact import Artifact
from asr_core.decode import Logits, Mel
from asr_core.errors import ArtifactError
from runners.base import WithoutAttention
from runners.coreml import FIRST_MACOS, MACOS, check_system, open_model

MASKED = -10000.0  # what WhisperKit fills its padding mask with
MEL_TOLERANCE = 1e-3  # of features between about -1 and 1.5, float32 against our own front end; float32 sums differ by 1e-5


@dataclass
class Row:
    """One window: the encoder's output, and K and V [1, L · D, 1, 448] before ``position``."""

    position: int
    encoded: NDArray[Any]
    keys: NDArray[np.float16]
    values: NDArray[np.float16]


class WhisperKitRunner(WithoutAttention):
    """The programs of one artifact."""

    timed = MACOS
    timing_needs = f"macOS {FIRST_MACOS}+"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.folder = artifact.path
        self.dims = artifact.manifest.dims
        self.tokens = artifact.manifest.tokens
        check_system(newer=False)
        self._mel, self._encoder, self._decoder = (
            open_model(artifact.path / f"{name}.mlpackage", [], threads)
            for name in ("MelSpectrogram", "AudioEncoder", "TextDecoder")
        )
        self._check_front_end()

    def encode(self, mel: Mel) -> list[Row]:
        """Run the encoder on every window; the caches start as zeros."""
        return [self._begin(self._encode(window)) for window in mel]

    def step(self, tokens: NDArray[np.int64], state: list[Row]) -> Logits:
        """Feed every row's new tokens, one at a time."""
        logits = np.empty((*tokens.shape, self.dims.vocab), np.float32)
        for own, row, out in zip(tokens.astype(np.int32), state, logits, strict=True):
            for i, token in enumerate(own):
                out[i] = self._feed(token, row)
        return logits

    def reorder(self, state: list[Row], rows: NDArray[np.int64]) -> list[Row]:
        """Copy the caches."""
        chosen = (state[row] for row in rows)
        return [Row(row.position, row.encoded, row.keys.copy(), row.values.copy()) for row in chosen]

    def restart(self, state: list[Row], rows: NDArray[np.int64]) -> list[Row]:
        """The windows' encodings with caches of zeros."""
        return [self._begin(state[row].encoded) for row in rows]

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        return np.stack([np.asarray(self._encode(window), np.float32)[0, :, 0].T for window in mel])

    def _encode(self, window: NDArray[np.float32]) -> NDArray[Any]:
        made = self._encoder.predict({"melspectrogram_features": np.ascontiguousarray(window[None, :, None])})
        return np.asarray(made["encoder_output_embeds"])

    def _begin(self, encoded: NDArray[Any]) -> Row:
        shape = (1, self.dims.decoder_layers * self.dims.d_model, 1, self.dims.n_text_ctx)
        return Row(0, encoded, np.zeros(shape, np.float16), np.zeros(shape, np.float16))

    def _feed(self, token: np.int32, row: Row) -> NDArray[np.float32]:
        """Logits [vocab] after one more token."""
        places = np.arange(self.dims.n_text_ctx)[None]
        made: Mapping[str, Any] = self._decoder.predict(
            {
                "input_ids": np.array([token], np.int32),
                "cache_length": np.array([row.position], np.int32),
                "key_cache": row.keys,
                "value_cache": row.values,
                "kv_cache_update_mask": (places == row.position).astype(np.float16),
                "encoder_output_embeds": row.encoded,
                "decoder_key_padding_mask": np.where(places > row.position, MASKED, 0).astype(np.float16),
            }
        )
        row.keys[..., row.position] = np.asarray(made["key_cache_updates"])[..., 0]
        row.values[..., row.position] = np.asarray(made["value_cache_updates"])[..., 0]
        row.position += 1
        return np.asarray(made["logits"], np.float32).reshape(-1)

    def _check_front_end(self) -> None:
        """Raise :class:`ArtifactError` where the spectrogram's program hears something else than our own front end."""
        samples = np.random.default_rng(0).normal(0, 0.1, audio.WINDOW_SAMPLES).astype(np.float32)
        made = np.asarray(self._mel.predict({"audio": samples})["melspectrogram_features"], np.float32)
        error = np.abs(made[0, :, 0] - audio.log_mel(samples, np.load(self.folder / "mel_filters.npy"))).max()
        if not error <= MEL_TOLERANCE:
            raise ArtifactError(f"{self.folder}: MelSpectrogram is {error:.2g} away from Whisper's. Export again.")


def open(path: Path, threads: int) -> WhisperKitRunner:
    """Open and verify an artifact folder."""
    return WhisperKitRunner(Artifact.open(path), threads)
