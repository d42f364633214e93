"""CTranslate2's own Whisper format, in the layout that faster-whisper loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asr_core.artifact import TensorSpec
from asr_core.capacity import Cost
from asr_core.checkpoint import Checkpoint
from asr_core.dims import Dims
from asr_core.errors import ExportError
from asr_core.isolate import Progress
from asr_core.tokens import load_tokenizer

# int8_float32 rather than int8: both store the same matrices in 8 bits per row, embedding included, and compute alike on a
# CPU, but int8 leaves the small rest (norms, biases, positions) in whatever type the checkpoint was saved in.
QUANTIZATION = {"fp32": "float32", "fp16": "float16", "int8": "int8_float32"}
PRECISIONS = tuple(QUANTIZATION)
# The format knows dense layers only, and quantises weights by its own rule: whoever compressed one gets its values, not its form.
CARRIES: dict[str, tuple[str, ...]] = {}
COST = {"fp32": Cost(800, 8, 4), "fp16": Cost(800, 8, 2), "int8": Cost(800, 8, 1.1)}
LENT = "<|startoflm|>"


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Convert with CTranslate2's converter; raises :class:`ExportError` where it refuses or leaves something out."""
    from ctranslate2.converters import TransformersConverter
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    progress("convert")
    try:
        TransformersConverter(str(checkpoint.path)).convert(str(folder), quantization=QUANTIZATION[precision], force=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ExportError(f"CTranslate2's converter refuses {checkpoint.name}: {error}") from error
    progress("verify")
    _complete_config(checkpoint, folder / "config.json")
    _complete_vocabulary(checkpoint, folder / "vocabulary.json")
    return _tensors(checkpoint.dims)


def _complete_config(checkpoint: Checkpoint, path: Path) -> None:
    """Write the token lists as the checkpoint states them.

    The converter reads them through transformers, which drops language ids and alignment heads of a generation config that
    was saved with ``_from_model_config``; faster-whisper would then take the model for an English-only one.
    """
    heads = {"alignment_heads": [list(head) for head in checkpoint.alignment_heads]}
    config = json.loads(path.read_text(encoding="utf-8")) | _token_lists(checkpoint.generation) | heads
    missing = [name for name in ("suppress_ids", "suppress_ids_begin") if config.get(name) is None]
    if checkpoint.multilingual and not config.get("lang_ids"):
        missing.append("lang_ids")
    if missing:
        raise ExportError(f"the converted {path.name} lacks {', '.join(missing)}.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _token_lists(generation: dict[str, Any]) -> dict[str, list[Any]]:
    return {
        "suppress_ids": generation.get("suppress_tokens") or [],
        "suppress_ids_begin": generation.get("begin_suppress_tokens") or [],
        "lang_ids": sorted((generation.get("lang_to_id") or {}).values()),
    }


def _complete_vocabulary(checkpoint: Checkpoint, path: Path) -> None:
    """Check every token's place, and make a multilingual model known as one.

    CTranslate2 finds its special tokens by their place in this file, so a hole would shift them unseen. It takes a model for
    multilingual where the vocabulary has an empty token, as OpenAI's has before the special ones; a vocabulary without one
    lends it the place of a token that Whisper never learned to use. Clients read texts from tokenizer.json.
    """
    tokens = json.loads(path.read_text(encoding="utf-8"))
    places = load_tokenizer(checkpoint.path).get_vocab()
    wrong = [token for token, index in places.items() if index >= len(tokens) or tokens[index] != token]
    if wrong:
        raise ExportError(f"{path.name} has {len(wrong)} tokens in the wrong place, {min(wrong)!r} among them.")
    if checkpoint.multilingual and "" not in tokens:
        if LENT not in tokens:
            raise ExportError(f"{path.name} has no {LENT} to mark the model as multilingual.")
        tokens[tokens.index(LENT)] = ""
        path.write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8")


def _tensors(dims: Dims) -> list[TensorSpec]:
    """What CTranslate2's Python interface takes and gives; its decoder shows no tensors."""
    return [
        TensorSpec(
            graph="encode",
            role="input",
            name="features",
            dtype="float32",
            shape=["batch", dims.n_mels, 2 * dims.n_audio_ctx],
        ),
        TensorSpec(
            graph="encode",
            role="output",
            name="encoder_output",
            dtype="float32",
            shape=["batch", dims.n_audio_ctx, dims.d_model],
        ),
    ]
