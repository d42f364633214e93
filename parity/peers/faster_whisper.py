"""faster-whisper over our CTranslate2 artifact, which is what its own converter makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PEER = "faster-whisper"
OPENS = "ctranslate2"
PRECISIONS = ("fp32", "int8")
ENVIRONMENT = "ASR_EXPORT_PEERS_PYTHON"
COMPUTE_TYPES = {"fp32": "float32", "int8": "int8_float32"}
WINDOW = 480_000  # samples


def open(folder: Path, precision: str, threads: int, scratch: Path) -> Any:
    """Greedy, without fallback, timestamps or voice detection."""
    from faster_whisper import WhisperModel

    model = WhisperModel(
        str(folder), device="cpu", compute_type=COMPUTE_TYPES[precision], cpu_threads=threads, local_files_only=True
    )
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    end = generation["eos_token_id"]
    never = [
        end,
        *range(generation["no_timestamps_token_id"] + 1, model.hf_tokenizer.get_vocab_size()),
    ]
    # CTranslate2 stops at half of the length that it is given, and faster-whisper adds its prompt to the number that it is told.
    prompt = 4 if generation.get("lang_to_id") else 2

    def hear(samples: Any, language: str, tokens: int | None) -> tuple[str, int]:
        segments, _ = model.transcribe(
            np.pad(samples, (0, WINDOW - len(samples))),
            language=language,
            beam_size=1,
            temperature=0,
            without_timestamps=True,
            condition_on_previous_text=False,
            vad_filter=False,
            suppress_tokens=[*(generation.get("suppress_tokens") or []), *(never if tokens else [])],
            max_new_tokens=tokens and 2 * tokens - prompt,
            no_speech_threshold=None,
            log_prob_threshold=None,
            compression_ratio_threshold=None,
        )
        heard = list(segments)
        made = [token for segment in heard for token in segment.tokens if token != end]
        return "".join(segment.text for segment in heard).strip(), len(made)

    return hear
