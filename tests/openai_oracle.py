"""openai-whisper over one of our checkpoints: the same weights and vocabulary, none of our code."""

import json
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiktoken
import torch
from tokenizers.pre_tokenizers import ByteLevel
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import Tokenizer

from asr_core.checkpoint import Checkpoint

# Hugging Face's names, in the order of replacing, and openai's.
RENAMED = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "embed_tokens": "token_embedding",
    "encoder.layer_norm": "encoder.ln_post",
    "decoder.layer_norm": "decoder.ln",
    ".layers.": ".blocks.",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "self_attn_layer_norm": "attn_ln",
    "final_layer_norm": "mlp_ln",
    "encoder_attn": "cross_attn",
    "self_attn": "attn",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
}

# How GPT-2, and openai-whisper after it, splits text before merging.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def model(checkpoint: Checkpoint, heads: list[tuple[int, int]]) -> Whisper:
    """openai's model with the checkpoint's weights; ``heads`` are the alignment heads."""
    dims = checkpoint.dims
    whisper = Whisper(
        ModelDimensions(
            dims.n_mels,
            dims.n_audio_ctx,
            dims.d_model,
            dims.encoder_heads,
            dims.encoder_layers,
            dims.vocab,
            dims.n_text_ctx,
            dims.d_model,
            dims.decoder_heads,
            dims.decoder_layers,
        )
    )
    whisper.load_state_dict({_renamed(name): tensor for name, tensor in checkpoint.state_dict().items()})
    mask = torch.zeros(dims.decoder_layers, dims.decoder_heads, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    whisper.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return whisper.eval()


def _renamed(name: str) -> str:
    name = name.removeprefix("model.")
    for theirs, openai in RENAMED.items():
        name = name.replace(theirs, openai)
    return name


def tokenizer(folder: Path, language: str | None = "en", task: str | None = "transcribe") -> Tokenizer:
    """openai's tokenizer over the folder's vocabulary; language and task None for an English-only model."""
    content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = {token: index for token, index in content["model"]["vocab"].items() if token not in special}
    encoding = tiktoken.Encoding("oracle", pat_str=PATTERN, mergeable_ranks=_as_bytes(vocab), special_tokens=special)
    return Tokenizer(encoding, num_languages=99, language=language, task=task)


def _as_bytes(vocab: dict[str, int]) -> dict[bytes, int]:
    """A byte-level vocabulary as the bytes that it stands for: printable ones are themselves, the others shifted beyond 255."""
    shifted = sorted(char for char in ByteLevel.alphabet() if ord(char) > 255)
    printable = {ord(char): char for char in ByteLevel.alphabet() if ord(char) <= 255}
    rest = (byte for byte in range(256) if byte not in printable)
    byte_of = {char: byte for byte, char in printable.items()} | dict(zip(shifted, rest, strict=True))
    return {bytes(byte_of[char] for char in token): index for token, index in vocab.items()}


def transcribe(checkpoint: Checkpoint, whisper: Whisper, audio: Any, **options: Any) -> dict[str, Any]:
    """openai's ``transcribe()`` on the checkpoint's vocabulary: segments, text and language."""

    def ours(*_: Any, language: str | None = None, task: str | None = None, **__: Any) -> Tokenizer:
        return tokenizer(checkpoint.path, language or "en", task or "transcribe")

    modules = [import_module("whisper.transcribe"), import_module("whisper.decoding")]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "get_tokenizer", ours))
        # openai knows a multilingual model by the size of its vocabulary.
        stack.enter_context(patch.object(Whisper, "is_multilingual", checkpoint.multilingual))
        result: dict[str, Any] = modules[0].transcribe(whisper, audio, fp16=False, **options)
    return result
