"""ONNX as sherpa-onnx loads it: ``whisper-encoder.onnx``, ``whisper-decoder.onnx`` and ``whisper-tokens.txt``.

The names, the shapes and the metadata are those of sherpa-onnx' own export script for Whisper. ``encoder_states`` is a further
output, which sherpa-onnx doesn't look at: without it the encoder could not be compared with PyTorch's.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core.artifact import TensorSpec
from asr_core.checkpoint import Checkpoint
from asr_core.errors import ExportError
from asr_core.isolate import Progress
from asr_core.tokens import TokenIds, load_tokenizer
from exporters import onnx
from exporters.onnx import Traceable, draft, ship

if TYPE_CHECKING:
    from tokenizers import Tokenizer


NAME = "whisper"  # any will do: the client is told every file
SUFFIX = {"fp32": "", "int8": ".int8"}
PRECISIONS = tuple(SUFFIX)
CARRIES = {precision: onnx.CARRIES[precision] for precision in PRECISIONS}
# GPT-2's tokenizers write the bytes that are not printable as characters from here on.
SHIFTED = 256
PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Write both graphs and the tokens; returns the graphs' inputs and outputs."""
    tokenizer = load_tokenizer(checkpoint.path)
    tokens = TokenIds.read(checkpoint.path, checkpoint.generation, checkpoint.dims.n_text_ctx)
    (folder / f"{NAME}-tokens.txt").write_text(_table(tokenizer, tokens.end), encoding="ascii")
    specs: list[TensorSpec] = []
    for name, describe in (("encoder", _encoder), ("decoder", _decoder)):
        progress(name)
        model = draft(describe, checkpoint, precision, name)
        if name == "encoder":
            metadata = _metadata(checkpoint, tokens, tokenizer)
            model.metadata_props.update({key: str(value) for key, value in metadata.items()})
        specs += ship(model, name, folder / f"{NAME}-{name}{SUFFIX[precision]}.onnx")
    return specs


def _encoder(checkpoint: Checkpoint) -> Traceable:
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    cross = (dims.decoder_layers, "n_audio", "T_2", dims.d_model)
    return Traceable(
        module=graph.EncodeShort(graph.encoder(checkpoint), graph.decoder(checkpoint)),
        arguments=(torch.zeros(2, dims.n_mels, 777),),
        # The tracer asks more of a named number of frames than it can prove of any.
        axes=({0: torch.export.Dim("batch", min=1), 2: torch.export.Dim.DYNAMIC},),
        inputs={"mel": ("n_audio", dims.n_mels, "T")},
        outputs={"n_layer_cross_k": cross, "n_layer_cross_v": cross, "encoder_states": ("n_audio", "T_2", dims.d_model)},
    )


def _decoder(checkpoint: Checkpoint) -> Traceable:
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    batch, new = (torch.export.Dim(name, min=1) for name in ("batch", "new"))
    frames = torch.export.Dim("frames", min=1, max=dims.n_audio_ctx)
    layers, width = dims.decoder_layers, dims.d_model
    cache, cross = (layers, "n_audio", dims.n_text_ctx, width), (layers, "n_audio", "T_2", width)
    names = ("tokens", "in_n_layer_self_k_cache", "in_n_layer_self_v_cache", "n_layer_cross_k", "n_layer_cross_v", "offset")
    shapes = (("n_audio", "n_tokens"), cache, cache, cross, cross, (1,))
    return Traceable(
        module=graph.FixedStep(graph.decoder(checkpoint)),
        arguments=(
            torch.zeros(2, 3, dtype=torch.int64),
            *(torch.zeros(layers, 2, dims.n_text_ctx, width) for _ in "kv"),
            *(torch.zeros(layers, 2, 7, width) for _ in "kv"),
            torch.zeros(1, dtype=torch.int64),
        ),
        axes=({0: batch, 1: new}, {1: batch}, {1: batch}, {1: batch, 2: frames}, {1: batch, 2: frames}, None),
        inputs=dict(zip(names, shapes, strict=True)),
        outputs={
            "logits": ("n_audio", "n_tokens", dims.vocab),
            "out_n_layer_self_k_cache": cache,
            "out_n_layer_self_v_cache": cache,
        },
    )


def _metadata(checkpoint: Checkpoint, tokens: TokenIds, tokenizer: Tokenizer) -> dict[str, Any]:
    """What sherpa-onnx reads from the encoder, by its names; -1 for a token that the vocabulary does not have."""
    dims = checkpoint.dims
    languages = sorted(tokens.languages.items(), key=lambda item: item[1])
    sequence = tokens.prompt(languages[0][0] if languages and "en" not in tokens.languages else "en")[:-1]

    def special(name: str) -> int:
        index = tokenizer.token_to_id(f"<|{name}|>")
        return -1 if index is None else index

    return {
        "model_type": f"whisper-{checkpoint.name}",
        "version": "1",
        "maintainer": "asr-export",
        "n_mels": dims.n_mels,
        "n_audio_ctx": dims.n_audio_ctx,
        "n_audio_state": dims.d_model,
        "n_audio_head": dims.encoder_heads,
        "n_audio_layer": dims.encoder_layers,
        "n_vocab": dims.vocab,
        "n_text_ctx": dims.n_text_ctx,
        "n_text_state": dims.d_model,
        "n_text_head": dims.decoder_heads,
        "n_text_layer": dims.decoder_layers,
        "sot_sequence": _listed(sequence),
        "all_language_tokens": _listed(index for _, index in languages),
        "all_language_codes": ",".join(code for code, _ in languages),
        "sot": tokens.start,
        "sot_index": 0,
        "eot": tokens.end,
        "blank_id": tokenizer.token_to_id("Ġ"),
        "is_multilingual": int(bool(languages)),
        "no_speech": -1 if tokens.no_speech is None else tokens.no_speech,
        "non_speech_tokens": _listed(tokens.suppress),
        "transcribe": tokens.tasks.get("transcribe", special("transcribe")),
        "translate": tokens.tasks.get("translate", special("translate")),
        "sot_prev": special("startofprev"),
        "sot_lm": special("startoflm"),
        "no_timestamps": tokens.no_timestamps,
    }


def _listed(numbers: Any) -> str:
    return ",".join(map(str, numbers))


def _table(tokenizer: Tokenizer, end: int) -> str:
    """One line a word piece: the base64 of its bytes, and its id; the special tokens, from ``end`` on, are none of them.

    Raises :class:`ExportError` where a piece is not made of bytes: sherpa-onnx would leave it out without a word.
    """
    characters = {chr(byte): byte for byte in PRINTABLE}
    hidden = [byte for byte in range(SHIFTED) if byte not in set(PRINTABLE)]
    characters |= {chr(SHIFTED + place): byte for place, byte in enumerate(hidden)}
    lines = []
    for piece, index in sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]):
        if index >= end:
            continue
        if not characters.keys() >= set(piece):
            raise ExportError(f"the tokenizer's piece {piece!r} ({index}) is not made of bytes, as sherpa-onnx needs it.")
        lines.append(f"{base64.b64encode(bytes(characters[one] for one in piece)).decode()} {index}\n")
    return "".join(lines)
