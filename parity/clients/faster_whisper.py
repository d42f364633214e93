"""faster-whisper over a CTranslate2 artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asr_core import audio
from asr_core.artifact import Artifact
from parity.clients import require

CLIENT = "faster-whisper"
TARGET = "ctranslate2"
COMPUTE_TYPES = {"fp32": "float32", "fp16": "float32", "int8": "int8_float32"}


def open(path: Path, threads: int) -> Callable[[NDArray[np.float32], str], str]:
    """The client, told our decode policy: at most 30 s of samples and their language in, text out."""
    require(CLIENT)
    from faster_whisper import WhisperModel

    manifest = Artifact.open(path).manifest
    compute_type = COMPUTE_TYPES[manifest.precision]
    model = WhisperModel(str(path), device="cpu", compute_type=compute_type, cpu_threads=threads, local_files_only=True)

    def hear(samples: NDArray[np.float32], language: str) -> str:
        # Padded, as Whisper does; the client would take the front end's own shorter window for a clip.
        window = np.pad(samples, (0, audio.WINDOW_SAMPLES - len(samples)))
        segments, _ = model.transcribe(
            window,
            language=language,
            beam_size=1,
            temperature=0,
            without_timestamps=True,
            condition_on_previous_text=False,
            vad_filter=False,
            suppress_tokens=manifest.tokens.suppress,
            # No second opinion on silence or on improbable words: ours keeps what was decoded.
            no_speech_threshold=None,
            log_prob_threshold=None,
            compression_ratio_threshold=None,
        )
        return "".join(segment.text for segment in segments).strip()

    return hear
