"""What openai-whisper and transformers themselves decode, and weights that give them something to say."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

NEW_TOKENS = 24


def loud(weights: dict[str, torch.Tensor], embedding: str, positions: str, *crossed: str) -> dict[str, torch.Tensor]:
    """Random weights whose choice of token depends on the place and on the audio, as random weights' hardly does.

    ``crossed`` are parts of the names of the tensors that bring the audio in.
    """
    generator = torch.Generator().manual_seed(1)
    changed = {name: tensor * 8 if any(part in name for part in crossed) else tensor for name, tensor in weights.items()}
    changed[positions] = torch.randn(weights[positions].shape, generator=generator)
    changed[embedding] = torch.randn(weights[embedding].shape, generator=generator) * 0.05
    return changed


def mel(bands: int) -> np.ndarray:
    """One window of noise, float32 [1, bands, 3000]."""
    return np.random.default_rng(0).standard_normal((1, bands, 3000)).astype(np.float32)


def transformers_tokens(model: Any, features: np.ndarray, generation: dict[str, Any]) -> list[int]:
    """Text tokens of transformers' plain greedy search after Whisper's prompt for English.

    Whisper's own ``generate`` takes every token beyond the first timestamp for a timestamp and decodes anew from there.
    """
    from transformers import GenerationConfig, GenerationMixin

    languages, tasks = generation.get("lang_to_id"), generation.get("task_to_id")
    spoken = [languages["<|en|>"], tasks["transcribe"]] if languages else []
    prompt = [generation["decoder_start_token_id"], *spoken, generation["no_timestamps_token_id"]]
    lists = ("suppress_tokens", "begin_suppress_tokens", "eos_token_id", "pad_token_id", "bos_token_id")
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, **{name: generation[name] for name in lists})
    inputs = {"input_features": torch.from_numpy(features), "decoder_input_ids": torch.tensor([prompt])}
    row = GenerationMixin.generate(model, **inputs, generation_config=settings)[0].tolist()[len(prompt) :]
    end = generation["eos_token_id"]
    return row[: row.index(end)] if end in row else row


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own reading of a folder, in float32 from weights of ``dtype``."""
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype).float().eval()
