"""Random-weight checkpoints of real Whisper shapes, in the hub's file layout: for tests and benchmarks without a network.

Only sizes, special ids and file layout are real. The words mean nothing, so never judge a quantisation on them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from asr_core import languages
from asr_core.vocabulary import TIMESTAMPS, special_tokens


@dataclass(frozen=True)
class Shape:
    """Sizes of a Whisper model; ``languages`` 0 is an English-only (``.en``) vocabulary."""

    d_model: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    n_mels: int = 80
    languages: int = 99


SHAPES = {
    "tiny": Shape(384, 6, 4, 4),
    "tiny.en": Shape(384, 6, 4, 4, languages=0),
    "base": Shape(512, 8, 6, 6),
    "small": Shape(768, 12, 12, 12),
    "large-v3": Shape(1280, 20, 32, 32, n_mels=128, languages=100),
    "turbo": Shape(1280, 20, 32, 4, n_mels=128, languages=100),
    "distil-large-v3": Shape(1280, 20, 32, 2, n_mels=128, languages=100),
    # In miniature: the real shapes' proportions at a size that a test can afford.
    "mini": Shape(64, 1, 2, 2),
    "mini.en": Shape(64, 1, 2, 2, languages=0),
    "mini-distil.en": Shape(64, 1, 4, 1, languages=0),
    "mini-turbo": Shape(128, 2, 32, 4, n_mels=128, languages=100),
    "mini-large-v3": Shape(128, 2, 4, 4, n_mels=128, languages=100),
}


def write(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of a shape with seeded random weights; returns the folder."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    specials = special_tokens(shape.languages or 99)
    ids = {token: _text_tokens(shape) + i for i, token in enumerate(specials)}
    _write_tokenizer(folder, shape, specials)
    start, end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(ids) + _text_tokens(shape),
        num_mel_bins=shape.n_mels,
        d_model=shape.d_model,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=4 * shape.d_model,
        decoder_ffn_dim=4 * shape.d_model,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(seed)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(_generation(shape, ids), indent=2), encoding="utf-8")
    return folder


def _text_tokens(shape: Shape) -> int:
    return 50257 if shape.languages else 50256


def _generation(shape: Shape, ids: dict[str, int]) -> dict[str, object]:
    end = ids["<|endoftext|>"]
    forbidden = ("startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
    generation: dict[str, object] = {
        "alignment_heads": [[shape.decoder_layers - 1, head] for head in range(shape.heads)],
        "begin_suppress_tokens": [220, end],
        "bos_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "eos_token_id": end,
        "is_multilingual": bool(shape.languages),
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "pad_token_id": end,
        "prev_sot_token_id": ids["<|startofprev|>"],
        "return_timestamps": False,
        "suppress_tokens": [1, 2, 7, 8, 9, 10, 14, 25, *(ids[f"<|{name}|>"] for name in forbidden)],
    }
    if shape.languages:
        names = list(languages.NAMES)[: shape.languages]
        generation["lang_to_id"] = {f"<|{name}|>": ids[f"<|{name}|>"] for name in names}
        generation["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return generation


def _write_tokenizer(folder: Path, shape: Shape, specials: list[str]) -> None:
    """A byte-level BPE of the real size; beyond the bytes its tokens are pairs of bytes, which makes it a valid BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet][: _text_tokens(shape) - len(alphabet)]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials[:-TIMESTAMPS]])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in specials[-TIMESTAMPS:]])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")
    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "add_prefix_space": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


if __name__ == "__main__":
    write(SHAPES[sys.argv[1]], Path(sys.argv[2]))
