"""CTranslate2 decodes by itself: its Python interface has no single decode step."""

from __future__ import annotations

import time
from pathlib import Path

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from asr_core.artifact import read_manifest
from asr_core.decode import Decoded, DecodeOptions, Logits, Mel, Timings

# The type to compute in, by stored precision; where a CPU cannot, CTranslate2 would warn and choose one for us.
COMPUTE_TYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8_float32"}


class CTranslate2Runner:
    """A converted model on the CPU, with CTranslate2's own greedy search."""

    decoder = "native"
    timed = True
    timing_needs = ""

    def __init__(self, path: Path, threads: int) -> None:
        manifest = read_manifest(path)
        self.dims = manifest.dims
        self.tokens = manifest.tokens
        wanted = COMPUTE_TYPES[manifest.precision]
        supported = ctranslate2.get_supported_compute_types("cpu")
        self._model = ctranslate2.models.Whisper(
            str(path),
            device="cpu",
            compute_type=wanted if wanted in supported else "float32",
            inter_threads=1,
            intra_threads=threads,
        )

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """Float32 [B, n_mels, 3000] → encoder states float32 [B, 1500, D]."""
        return np.array(self._encode(mel), dtype=np.float32)

    def generate(self, mel: Mel, options: DecodeOptions) -> list[Decoded]:
        """Decode a batch of windows, float32 [B, n_mels, 3000]."""
        prompt = self.tokens.prompt(options.language, options.task)
        limit = options.max_new_tokens or self.tokens.max_new_tokens
        started = time.perf_counter()
        states = self._encode(mel)
        encoded = time.perf_counter()
        results = self._model.generate(
            states,
            [prompt] * len(mel),
            beam_size=1,
            # A score is Σ log p / length ** penalty; the sum contains the end token, the length does not.
            length_penalty=0,
            max_length=_max_length(limit, len(prompt)),
            suppress_tokens=self.tokens.suppress,
            suppress_blank=True,  # the config's suppress_ids_begin: the same list as our begin_suppress
            return_scores=True,
            return_no_speech_prob=True,
        )
        timings = Timings(encoded - started, time.perf_counter() - encoded, None)
        return [
            Decoded(
                list(result.sequences_ids[0]),
                float(result.scores[0]),
                None if self.tokens.no_speech is None else float(result.no_speech_prob),
                timings,
            )
            for result in results
        ]

    def score(self, mel: Mel, tokens: list[int]) -> Logits | None:
        """Nothing: CTranslate2 shows no logits of a given sequence."""

    def close(self) -> None:
        """Free the model."""
        self._model.unload_model()

    def _encode(self, mel: Mel) -> ctranslate2.StorageView:
        # The view borrows the array's memory, so the array must outlive the call.
        features = np.ascontiguousarray(mel)
        return self._model.encode(ctranslate2.StorageView.from_array(features))


def open(path: Path, threads: int) -> CTranslate2Runner:
    """Open an artifact folder."""
    return CTranslate2Runner(path, threads)


def _max_length(new_tokens: int, prompt: int) -> int:
    """The ``max_length`` that allows exactly so many new tokens: CTranslate2 stops at min(m // 2, m - prompt + 1)."""
    return max(2 * new_tokens, new_tokens + prompt - 1)
