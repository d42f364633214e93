"""openvino_genai's WhisperPipeline over an OpenVINO artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CLIENT = "openvino-genai"


def open(path: Path, threads: int) -> Callable[[NDArray[np.float32]], str]:
    """The client in float32, as our runner computes: at most 30 s of samples in, text out."""
    import openvino_genai

    pipeline = openvino_genai.WhisperPipeline(
        str(path), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32", INFERENCE_NUM_THREADS=threads
    )
    return lambda samples: str(pipeline.generate(samples.tolist(), language="<|en|>", task="transcribe").texts[0].strip())
