"""Two ncnn networks, ``encoder`` and ``decoder`` (.param and .bin each), converted with pnnx from TorchScript.

ncnn has no batch axis: every tensor is that of one window. The decoder takes embedded tokens and a mask from the host and gives
the grown keys and values back, whose tensors the host hands to the next step as they are. ``decoder.bin`` ends with the head's
matrix, which is the embedding too, so the host looks tokens up there; the learned positions lie in ``positions.npy``.

Axes: T new tokens, P past rows, of which the first stands for no token (ncnn has no empty tensors) and is masked, F audio
positions (1500), D model width, H heads, E = D / H.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core.artifact import TensorSpec
from asr_core.capacity import Cost
from asr_core.checkpoint import Checkpoint
from asr_core.dims import EMBEDDING, Dims
from asr_core.errors import ExportError
from asr_core.graph_weights import GraphWeights
from asr_core.isolate import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from asr_core import graph

PRECISIONS = ("fp32", "fp16")
CARRIES = dict.fromkeys(PRECISIONS, ("factors", "heads"))
# On disk, the traced half too.
COST = {"fp32": Cost(800, 8, 8), "fp16": Cost(800, 8, 6)}
STORED_DTYPES = {"fp32": "float32", "fp16": "float16"}
POSITIONS = "positions.npy"
POSITIONS_TENSOR = "model.decoder.embed_positions.weight"
LARGEST_HALF = 65504.0
MOST_VALUES = 2**31 - 1  # a layer counts its weights in 32 bits
# Two sets of sizes to trace with: what differs between them is dynamic.
TRACED_TOKENS = (3, 2)
TRACED_PAST = (5, 7)
LOG_TAIL = 1000  # characters of pnnx's output that are kept
CHECKED_ROWS = 4096  # of the head, compared at once
# What storing may change: nothing, or the last bit of a half; pnnx makes 0 of what is below a half's smallest normal number.
ROUNDING = {"fp32": (0.0, 0.0), "fp16": (2**-10, 2**-14)}  # relative, absolute

Shape = list[int | str]
Shapes = dict[str, Shape]


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Convert encoder and decoder; raises :class:`ExportError` where the format can't hold the weights or pnnx fails.

    One half of the model is in memory at a time, and none while pnnx, a process of its own, holds it.
    """
    import numpy as np

    dims, weights = checkpoint.dims, checkpoint.graph_weights
    _check_values(weights, precision)
    tensors: list[TensorSpec] = []
    heads = checkpoint.alignment_heads
    for part, build, network in (
        ("encoder", _encoder, _encoder_network(dims)),
        ("decoder", _decoder, _decoder_network(dims, heads)),
    ):
        progress(part)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            traced = Path(scratch) / "traced.pt"
            with _refusals(part):
                _trace(build(checkpoint), network, traced)
            gc.collect()
            convert(part, network, traced, folder, precision)
        tensors += network.specs(part)
    _check_head(folder / "decoder.bin", weights.read(EMBEDDING), precision)
    np.save(folder / POSITIONS, weights.read(POSITIONS_TENSOR).float().numpy())
    return tensors


def _check_values(weights: GraphWeights, precision: str) -> None:
    """Refuse, with every reason at once, tensors that ncnn cannot count or half precision cannot hold."""
    reasons = [
        f"{name} has {math.prod(weights.shape(name))} values, of which a layer counts at most {MOST_VALUES}"
        for name in weights.names
        if math.prod(weights.shape(name)) > MOST_VALUES
    ]
    if precision == "fp16":
        for name in weights.names:
            largest = max(abs(float(extreme)) for extreme in weights.read(name).aminmax())
            if largest > LARGEST_HALF:
                reasons.append(f"{name} holds {largest:.6g}, beyond float16's {LARGEST_HALF:.0f}")
    if reasons:
        raise ExportError("ncnn cannot hold this checkpoint:\n" + "\n".join(f"  - {reason}" for reason in reasons))


@contextmanager
def _refusals(part: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"torch could not trace the {part}: {error}") from error


# --- inputs and outputs


@dataclass(frozen=True)
class Network:
    """Inputs and outputs of one network in order, by name; names in shapes are dynamic axes."""

    inputs: Shapes
    outputs: Shapes

    def traced(self, which: int) -> list[list[int]]:
        """The input shapes of the first or second tracing, with the batch axis that torch has and ncnn drops."""
        tokens, past = TRACED_TOKENS[which], TRACED_PAST[which]
        sizes = {"tokens": tokens, "past": past, "rows": past + tokens}
        return [[1, *(size if isinstance(size, int) else sizes[size] for size in shape)] for shape in self.inputs.values()]

    def specs(self, part: str) -> list[TensorSpec]:
        """As the manifest has them."""
        inputs = [
            TensorSpec(graph=part, role="input", name=name, dtype="float32", shape=shape) for name, shape in self.inputs.items()
        ]
        outputs = [
            TensorSpec(graph=part, role="output", name=name, dtype="float32", shape=shape) for name, shape in self.outputs.items()
        ]
        return inputs + outputs


def _encoder_network(dims: Dims) -> Network:
    states: Shapes = {"encoder_states": [dims.n_audio_ctx, dims.d_model]}
    return Network({"mel": [dims.n_mels, 2 * dims.n_audio_ctx]}, states | _keys_values("cross", dims.n_audio_ctx, dims))


def _decoder_network(dims: Dims, heads: list[tuple[int, int]]) -> Network:
    embedded: Shapes = {"embedded": ["tokens", dims.d_model], "mask": [1, "tokens", "rows"]}
    caches = _keys_values("past", "past", dims) | _keys_values("cross", dims.n_audio_ctx, dims)
    shown: Shapes = {"logits": ["tokens", dims.vocab], "alignment_queries": [len(heads), "tokens", dims.head_dim]}
    return Network(embedded | caches, shown | _keys_values("present", "rows", dims))


def _keys_values(name: str, rows: int | str, dims: Dims) -> Shapes:
    shape: Shape = [dims.decoder_heads, rows, dims.head_dim]
    return {f"{name}_{kind}_{layer}": shape for layer in range(dims.decoder_layers) for kind in "kv"}


# --- the graphs


def _load(module: nn.Module, prefix: str, weights: GraphWeights) -> None:
    """Give a module without storage the checkpoint's tensors below ``prefix``."""
    own = {name: weights.read(prefix + name).float() for name in module.state_dict()}
    module.load_state_dict(own, assign=True)
    module.eval().requires_grad_(requires_grad=False)


def _attend(attn: graph.Attention, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention from [1, T, D] over [1, H, S, E], as the one operator that ncnn computes without a matrix of scores."""
    from torch.nn.functional import scaled_dot_product_attention

    return attn.output(scaled_dot_product_attention(_queries(attn, x), k, v, mask))


def _queries(attn: graph.Attention, x: Tensor) -> Tensor:
    """Unscaled queries [1, H, T, E]."""
    from asr_core.graph import split_heads

    return split_heads(attn.q_proj(x), attn.heads)


def _encoder(checkpoint: Checkpoint) -> nn.Module:
    """Mel [1, n_mels, 2F] → states [1, F, D], and K and V [1, H, F, E] of every decoder layer's cross-attention."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from asr_core import graph

    class Encode(nn.Module):
        """Holds the projections of the decoder that belong to encoding, and no other part of it."""

        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.encoder: Any = graph.encoder(checkpoint)
                self.cross: Any = nn.ModuleList(layer.encoder_attn for layer in graph.decoder(checkpoint).blocks)
            _load(self.encoder, graph.ENCODER, checkpoint.graph_weights)
            for i, attn in enumerate(self.cross):
                del attn.q_proj, attn.out_proj
                _load(attn, f"{graph.DECODER}layers.{i}.encoder_attn.", checkpoint.graph_weights)

        def forward(self, mel: Tensor) -> tuple[Tensor, ...]:
            encoder = self.encoder
            x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2) + encoder.embed_positions.weight
            for layer in encoder.layers:
                h = layer.self_attn_layer_norm(x)
                x = x + _attend(layer.self_attn, h, *layer.self_attn.keys_values(h))
                x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
            states = encoder.layer_norm(x)
            return (states, *(tensor for attn in self.cross for tensor in attn.keys_values(states)))

    return Encode().eval()


def _decoder(checkpoint: Checkpoint) -> nn.Module:
    """Embedded tokens [1, T, D], mask [1, 1, T, P + T], past and cross K/V → logits [1, T, vocab] and the grown past.

    And the queries [1, heads, T, E] of the alignment heads, which ncnn computes only for who asks.
    The past grows inside, and not in a buffer of the host: attention wants it in one piece, so that it is copied anyway.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    from asr_core import graph

    class Step(nn.Module):
        """Holds the embedding as the head only: pnnx would turn a head that shares its tensor into a wrong layer."""

        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.decoder: Any = graph.decoder(checkpoint)
                self.decoder.add_module("embed_tokens", nn.Linear(checkpoint.dims.d_model, checkpoint.dims.vocab, bias=False))
            del self.decoder.embed_positions
            for layer in self.decoder.blocks:
                del layer.encoder_attn.k_proj, layer.encoder_attn.v_proj
            _load(self.decoder, graph.DECODER, checkpoint.graph_weights)

        def forward(self, x: Tensor, mask: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
            half = len(caches) // 2
            past, cross = caches[:half], caches[half:]
            present: list[Tensor] = []
            queries: list[Tensor] = []
            for i, layer in enumerate(self.decoder.blocks):
                h = layer.self_attn_layer_norm(x)
                pairs = zip(past[2 * i : 2 * i + 2], layer.self_attn.keys_values(h), strict=True)
                k, v = (torch.cat(pair, 2) for pair in pairs)
                x = x + _attend(layer.self_attn, h, k, v, mask)
                attn, q = layer.encoder_attn, _queries(layer.encoder_attn, layer.encoder_attn_layer_norm(x))
                queries.append(q * attn.scale)
                x = x + attn.output(F.scaled_dot_product_attention(q, cross[2 * i], cross[2 * i + 1]))
                x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
                present += [k, v]
            logits = self.decoder.embed_tokens(self.decoder.layer_norm(x))
            return (logits, self.decoder.choose_heads(queries, checkpoint.alignment_heads), *present)

    return Step().eval()


def _trace(module: nn.Module, network: Network, file: Path) -> None:
    import torch

    example = tuple(torch.zeros(shape) for shape in network.traced(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but what pnnx reads
        torch.jit.trace(module, example, check_trace=False).save(str(file))


# --- pnnx and what comes out of it


def convert(part: str, network: Network, traced: Path, folder: Path, precision: str) -> None:
    """TorchScript → ``<part>.param`` and ``<part>.bin`` in ``folder``; raises :class:`ExportError`.

    pnnx ends with exit code 0 whatever it left unconverted, so the network is looked through.
    """
    import pnnx

    param = traced.with_suffix(".param")
    unwanted = dict.fromkeys(("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy"), os.devnull)
    options = unwanted | {
        "ncnnparam": str(param),
        "ncnnbin": str(folder / f"{part}.bin"),
        "fp16": str(int(precision == "fp16")),
        "inputshape": _written(network.traced(0)),
        "inputshape2": _written(network.traced(1)),
    }
    command = [pnnx.EXEC_PATH, str(traced), *(f"{key}={value}" for key, value in options.items())]
    # In the scratch folder, should it write what it was not told to.
    done = subprocess.run(
        command, cwd=traced.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode or not param.exists() or not (folder / f"{part}.bin").exists():
        last_words = done.stdout.strip()[-LOG_TAIL:]
        raise ExportError(f"pnnx could not convert the {part} (exit code {done.returncode}); its last words: {last_words}")
    layers = [Layer.read(line) for line in param.read_text(encoding="utf-8").splitlines()[2:]]
    _check_layers(part, layers)
    (folder / f"{part}.param").write_text(_named(part, layers, network), encoding="utf-8")


def _written(shapes: list[list[int]]) -> str:
    return ",".join(f"[{','.join(map(str, shape))}]f32" for shape in shapes)


@dataclass(frozen=True)
class Layer:
    """One line of a .param file."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    parameters: list[str]

    @classmethod
    def read(cls, line: str) -> Layer:
        """Take a line apart: type, name, two counts, blobs, parameters."""
        kind, name, count_in, count_out, *rest = line.split()
        inputs, outputs = int(count_in), int(count_in) + int(count_out)
        return cls(kind, name, rest[:inputs], rest[inputs:outputs], rest[outputs:])

    def write(self, names: dict[str, str]) -> str:
        """The line, with blobs renamed."""
        blobs = [names.get(blob, blob) for blob in self.inputs + self.outputs]
        counts = [str(len(self.inputs)), str(len(self.outputs))]
        return " ".join([self.kind, self.name, *counts, *blobs, *self.parameters])


def _check_layers(part: str, layers: list[Layer]) -> None:
    """Raise :class:`ExportError` for every layer that this ncnn does not have."""
    import ncnn

    left = [f"{layer.kind} at {layer.name}, the layer of {layer.outputs[0]}" for layer in layers if not _known(ncnn, layer.kind)]
    if left:
        raise ExportError(f"pnnx left operators of the {part} that ncnn does not have: {'; '.join(left)}.")


def _known(ncnn: Any, kind: str) -> bool:
    return bool(ncnn.layer_to_index(kind) >= 0)


def _named(part: str, layers: list[Layer], network: Network) -> str:
    """The .param file with our names in place of pnnx's in0, in1, …, out0, …; raises :class:`ExportError` if one is not there."""
    names = {f"in{i}": name for i, name in enumerate(network.inputs)} | {
        f"out{i}": name for i, name in enumerate(network.outputs)
    }
    blobs = {blob for layer in layers for blob in layer.outputs}
    lost = [name for blob, name in names.items() if blob not in blobs]
    if lost:
        raise ExportError(f"pnnx dropped inputs or outputs of the {part}: {', '.join(lost)}.")
    counts = f"{len(layers)} {len(blobs)}"
    return "\n".join(["7767517", counts, *(layer.write(names) for layer in layers), ""])


def _check_head(file: Path, embedding: torch.Tensor, precision: str) -> None:
    """Raise :class:`ExportError` unless the file ends with the embedding, which is where the host looks tokens up."""
    import numpy as np

    dtype = np.dtype(STORED_DTYPES[precision])
    relative, absolute = ROUNDING[precision]
    start = file.stat().st_size - embedding.numel() * dtype.itemsize
    found = start >= 0
    if found:
        head = np.memmap(file, dtype, "r", start, tuple(embedding.shape))
        blocks = (slice(row, row + CHECKED_ROWS) for row in range(0, len(head), CHECKED_ROWS))
        found = all(
            np.allclose(head[rows].astype(np.float32), embedding[rows].float().numpy(), relative, absolute) for rows in blocks
        )
    if not found:
        raise ExportError(f"{file.name} does not end with the head's matrix.")
