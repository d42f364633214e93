"""openvino_genai's WhisperPipeline over our OpenVINO artifact, computing in float32 as our runner does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PEER = "openvino_genai"
OPENS = "openvino"
PRECISIONS = ("fp32", "int8")
ENVIRONMENT = "ASR_EXPORT_PEERS_PYTHON"


def take(samples: NDArray[np.float32]) -> list[float]:
    """A list: that is what its own examples read a file into."""
    listed: list[float] = samples.tolist()
    return listed


def open(folder: Path, precision: str, threads: int, scratch: Path) -> Any:
    """Greedy, without timestamps."""
    import openvino_genai

    pipeline = openvino_genai.WhisperPipeline(
        str(folder), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32", INFERENCE_NUM_THREADS=threads
    )

    def hear(samples: Any, language: str, tokens: int | None) -> tuple[str, int]:
        config = pipeline.get_generation_config()
        if tokens:
            config.max_new_tokens, config.ignore_eos = tokens, True
            config.suppress_tokens = [*config.suppress_tokens, config.eos_token_id]
        if config.is_multilingual:
            config.language, config.task = f"<|{language}|>", "transcribe"
        heard = pipeline.generate(samples, config)
        return heard.texts[0].strip(), heard.perf_metrics.get_num_generated_tokens()

    return hear
