"""transformers' own ``generate`` over the checkpoint, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PEER = "transformers"
OPENS = "checkpoint"
PRECISIONS = ("fp32",)
ENVIRONMENT = "ASR_EXPORT_PEERS_PYTHON"


def open(folder: Path, precision: str, threads: int, scratch: Path) -> Any:
    """The model with its default attention and cache."""
    import torch
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.set_num_threads(threads)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return hearing(model, AutoTokenizer.from_pretrained(folder), WhisperFeatureExtractor(model.config.num_mel_bins))


def hearing(model: Any, tokenizer: Any, extractor: Any) -> Any:
    """How a model of transformers' kind is asked."""

    def length(tokens: int) -> dict[str, Any]:
        """So many tokens, none of them a timestamp: ``generate`` would begin another segment after it."""
        timestamps = range(model.generation_config.no_timestamps_token_id + 1, model.config.vocab_size)
        suppressed = [*(model.generation_config.suppress_tokens or []), *timestamps]
        return {"min_new_tokens": tokens, "max_new_tokens": tokens, "suppress_tokens": suppressed}

    def hear(samples: Any, language: str, tokens: int | None) -> tuple[str, int]:
        features = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
        told = {"language": language, "task": "transcribe"} if getattr(model.generation_config, "lang_to_id", None) else {}
        ids = model.generate(features, **told, **(length(tokens) if tokens else {}), num_beams=1, do_sample=False)[0].tolist()
        start, end = model.config.decoder_start_token_id, model.config.eos_token_id
        made = [token for token in ids[4 if told else 2 :] if token != end] if ids[:1] == [start] else ids
        return tokenizer.decode(ids, skip_special_tokens=True).strip(), len(made)

    return hear
