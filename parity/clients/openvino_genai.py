"""openvino_genai's WhisperPipeline over an OpenVINO artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parity.clients import require

CLIENT = "openvino-genai"
TARGET = "openvino"


def open(path: Path, threads: int) -> Callable[[NDArray[np.float32], str], str]:
    """The client in float32, as our runner computes: at most 30 s of samples and their language in, text out."""
    require(CLIENT)
    import openvino_genai

    pipeline = openvino_genai.WhisperPipeline(
        str(path), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32", INFERENCE_NUM_THREADS=threads
    )

    def hear(samples: NDArray[np.float32], language: str) -> str:
        heard = pipeline.generate(samples.tolist(), language=f"<|{language}|>", task="transcribe")
        return str(heard.texts[0].strip())

    return hear
