"""Random-weight checkpoints of real Whisper shapes, in the hub's file layout: for tests and benchmarks without a network.

Only sizes, special ids and file layout are real. The words mean nothing, so never judge a quantisation on them.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asr_core import folder as layout
from asr_core import languages
from asr_core.dims import Dims, expected_shapes
from asr_core.vocabulary import TIMESTAMPS, special_tokens

if TYPE_CHECKING:
    import torch
    from transformers import WhisperConfig

DTYPES = {"float32": 4, "float16": 2}  # bytes
SHARD_MB = 1000  # MB (10⁶ bytes) of weights in a file
SPREAD = 0.02  # standard deviation of the weights, as transformers draws them


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
    """Write a checkpoint of a shape with seeded random float32 weights in one file; returns the folder."""
    import torch
    from transformers import WhisperForConditionalGeneration

    config = _write_small_files(shape, folder)
    torch.manual_seed(seed)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    _write_generation(shape, folder)  # transformers has written its own
    return folder


def write_sharded(shape: Shape, folder: Path, dtype: str = "float32", shard_mb: float = SHARD_MB, seed: int = 0) -> Path:
    """The same in files of about ``shard_mb`` with an index, one of them in memory at a time; returns the folder.

    Large models are shipped so. Each tensor is drawn from its own seed: the values don't depend on the shards.
    """
    from safetensors.torch import save_file

    config = _write_small_files(shape, folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    _write_generation(shape, folder)
    shapes = expected_shapes(Dims.from_config(config.to_dict()))
    shards = list(_shards(shapes, shard_mb * 1e6 / DTYPES[dtype]))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _random(name, shapes[name], dtype, seed) for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    total = sum(math.prod(size) for size in shapes.values()) * DTYPES[dtype]
    layout.write_json(folder / layout.INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return folder


def _shards(shapes: dict[str, tuple[int, ...]], elements: float) -> Iterator[list[str]]:
    """Names in groups of at most so many elements, where a tensor has no more."""
    names: list[str] = []
    for name, shape in shapes.items():
        if names and sum(math.prod(shapes[one]) for one in names) + math.prod(shape) > elements:
            yield names
            names = []
        names.append(name)
    yield names


def _random(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """A tensor as transformers begins with it: normal weights, norms of one, biases of zero, the encoder's sine positions."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=kind)
    if "norm" in name:
        return torch.ones(shape, dtype=kind)
    if name == "model.encoder.embed_positions.weight":
        from transformers.models.whisper.modeling_whisper import sinusoids

        positions: torch.Tensor = sinusoids(*shape)
        return positions.to(kind)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).normal_(0, SPREAD, generator=generator).to(kind)


def _write_small_files(shape: Shape, folder: Path) -> WhisperConfig:
    """Write the tokenizer; returns the config, which is not written yet."""
    from transformers import WhisperConfig

    folder.mkdir(parents=True, exist_ok=True)
    specials = special_tokens(shape.languages or 99)
    ids = _ids(shape)
    _write_tokenizer(folder, shape, specials)
    start, end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
    return WhisperConfig(
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


def _ids(shape: Shape) -> dict[str, int]:
    return {token: _text_tokens(shape) + i for i, token in enumerate(special_tokens(shape.languages or 99))}


def _write_generation(shape: Shape, folder: Path) -> None:
    (folder / layout.GENERATION).write_text(json.dumps(_generation(shape, _ids(shape)), indent=2), encoding="utf-8")


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


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--shard-mb", type=float, help="Write files of this many MB, one in memory at a time.")
    options = parser.parse_args()
    if options.shard_mb or options.dtype != "float32":
        write_sharded(SHAPES[options.shape], options.folder, options.dtype, options.shard_mb or SHARD_MB)
    else:
        write(SHAPES[options.shape], options.folder)


if __name__ == "__main__":
    _main()
