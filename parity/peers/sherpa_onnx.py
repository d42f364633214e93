"""sherpa-onnx over our ONNX artifact in its layout; it cannot be told how many tokens to make, nor to leave any out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PEER = "sherpa-onnx"
OPENS = "onnx.sherpa"
PRECISIONS = ("fp32", "int8")
ENVIRONMENT = "ASR_EXPORT_PEERS_PYTHON"
SUFFIX = {"fp32": "", "int8": ".int8"}


def open(folder: Path, precision: str, threads: int, scratch: Path) -> Any:
    """Its greedy search, which is the only one that it has."""
    import sherpa_onnx

    parts = {part: str(folder / f"whisper-{part}{SUFFIX[precision]}.onnx") for part in ("encoder", "decoder")}
    tokens_file = str(folder / "whisper-tokens.txt")
    recognisers = {}

    def hear(samples: Any, language: str, tokens: int | None) -> tuple[str, int]:
        if language not in recognisers:
            recognisers[language] = sherpa_onnx.OfflineRecognizer.from_whisper(
                **parts, tokens=tokens_file, language=language, num_threads=threads
            )
        stream = recognisers[language].create_stream()
        stream.accept_waveform(16000, samples)
        recognisers[language].decode_stream(stream)
        return stream.result.text.strip(), len(stream.result.tokens)

    return hear
