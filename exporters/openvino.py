"""OpenVINO IR in the layout that ``openvino_genai.WhisperPipeline`` loads as it is.

The encoder is a plain graph. The decoder is stateful: self-attention keys and values grow inside the runtime and follow
``beam_idx``; cross-attention keys and values are states too, whose initialiser is their projection of the encoder states, so
that they are computed once after each reset and no branch is needed.
"""

from __future__ import annotations

import gc
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from asr_core.artifact import TensorSpec
from asr_core.capacity import Cost
from asr_core.checkpoint import Checkpoint
from asr_core.dims import Dims
from asr_core.errors import ExportError
from asr_core.graph_weights import FEW_BITS, MOST_BITS
from asr_core.integers import by_values, nearest, packed
from asr_core.isolate import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from asr_core.graph_weights import GraphWeights, Integers

PRECISIONS = ("fp32", "fp16", "int8", "int4")
CARRIES = dict.fromkeys(PRECISIONS, ("factors", "heads")) | {"int4": ("factors", "heads", "int8", "int4")}
# One half of the model in float32, and what is made of it.
COST = {"fp32": Cost(850, 3.5, 4), "fp16": Cost(850, 3.5, 2), "int8": Cost(850, 3.5, 1.1), "int4": Cost(850, 3.5, 0.7)}
ENCODER = "openvino_encoder_model"
DECODER = "openvino_decoder_model"
TOKENIZER = "openvino_tokenizer"
DETOKENIZER = "openvino_detokenizer"
ENCODER_PREFIX = "model.encoder."
DECODER_PREFIX = "model.decoder."
# Any sizes above one will do to capture the graph with, as long as they differ: torch takes 1 for a constant.
TRACED_BATCH = 2
TRACED_TOKENS = 3
TRACED_PAST = 5
TRACED_FRAMES = 778
LEAST_HALVED = 1024  # values, beside integers: smaller constants stay as they are
# Names of the dynamic axes, where they are more than the batch.
AXES = {
    "input_features": ("batch", "mels", "frames"),
    "last_hidden_state": ("batch", "positions"),
    "input_ids": ("batch", "tokens"),
    "encoder_hidden_states": ("batch", "positions"),
    "logits": ("batch", "tokens"),
    "alignment_queries": ("batch", "heads", "tokens"),
}


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Convert encoder, decoder and tokenizer; raises :class:`ExportError` where OpenVINO refuses one.

    One half of the model is in memory at a time.
    """
    tensors = []
    for part, file, convert in (("encoder", ENCODER, _encoder), ("decoder", DECODER, _decoder)):
        progress(part)
        with _refusals(part), _quiet():
            model = convert(checkpoint)
            tensors += _specs(model, part)
            if precision == "int4":
                _to_integers(model, checkpoint.graph_weights)
            _save(model, folder / f"{file}.xml", precision)
            del model
        gc.collect()  # what was captured is full of cycles, and would stay beside the other half
    progress("tokenizer")
    with _refusals("tokenizer"), _quiet():
        _save_tokenizers(checkpoint.path, folder)
    shutil.copyfile(checkpoint.path / "config.json", folder / "config.json")
    return tensors


@contextmanager
def _refusals(part: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"OpenVINO could not convert the {part}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing and compression report what is normal here in hundreds of lines."""
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _load(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> nn.Module:
    """Give a module without storage the checkpoint's tensors below ``prefix``, and only those are read."""
    names = [name for name in checkpoint.graph_weights.names if name.startswith(prefix)]
    own = {name[len(prefix) :]: checkpoint.graph_weights.read(name).float() for name in names}
    module.load_state_dict(own, strict=True, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def _encoder(checkpoint: Checkpoint) -> Any:
    """``input_features`` [?, n_mels, ?] (up to 3000) → ``last_hidden_state`` [?, ?, D], half as many."""
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    with torch.device("meta"):
        encoder = graph.encoder(checkpoint)
    mel = torch.zeros(TRACED_BATCH, dims.n_mels, TRACED_FRAMES)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    model = _convert(_load(encoder, ENCODER_PREFIX, checkpoint), (mel,), (dynamic,))
    _name(model.inputs, ["input_features"])
    _name(model.outputs, ["last_hidden_state"])
    return model


def _decoder(checkpoint: Checkpoint) -> Any:
    """The stateful decoder.

    ``input_ids`` i64 [?, ?], ``encoder_hidden_states`` f32 [?, ?, D], ``beam_idx`` i32 [?] → ``logits`` [?, ?, vocab] and
    ``alignment_queries`` [?, heads, ?, E].
    """
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    with torch.device("meta"):
        decoder = graph.decoder(checkpoint)
    step = _stateless_step(_load(decoder, DECODER_PREFIX, checkpoint), checkpoint.alignment_heads)
    count, window = 2 * dims.decoder_layers, (dims.n_audio_ctx, dims.head_dim)
    example = (
        torch.zeros(TRACED_BATCH, TRACED_TOKENS, dtype=torch.int64),
        torch.zeros(TRACED_BATCH, dims.n_audio_ctx, dims.d_model),
        torch.arange(TRACED_BATCH, dtype=torch.int32),
        # Tensors of their own: capturing takes one that is passed twice for one input.
        [torch.zeros(TRACED_BATCH, dims.decoder_heads, TRACED_PAST, dims.head_dim) for _ in range(count)],
        [
            torch.zeros(TRACED_BATCH, dims.decoder_heads, *sizes)
            for _ in range(dims.decoder_layers)
            for sizes in (window[::-1], window)
        ],
    )
    size = torch.export.Dim.DYNAMIC
    cross = [{0: size, 3: size}, {0: size, 2: size}] * dims.decoder_layers
    dynamic = ({0: size, 1: size}, {0: size, 1: size}, {0: size}, [{0: size, 2: size}] * count, cross)
    model = _stateful(_convert(step, example, dynamic), dims)
    _name(model.inputs, ["input_ids", "encoder_hidden_states", "beam_idx"])
    _name(model.outputs, ["logits", graph.ALIGNMENT_QUERIES])
    _name_attention(model)
    return model


def _convert(module: nn.Module, example: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Any:
    """Capture a module (under fake tensors: nothing is computed) and convert it; ``dynamic`` marks its axes of any size."""
    import openvino as ov
    import torch

    model = ov.convert_model(torch.export.export(module, example, dynamic_shapes=dynamic, strict=False))
    # OpenVINO takes every axis for dynamic then; known sizes make for a simpler graph.
    pairs = zip(_flat(example), _flat(dynamic), strict=True)
    shapes = [[-1 if axis in free else size for axis, size in enumerate(tensor.shape)] for tensor, free in pairs]
    model.reshape({index: ov.PartialShape(shape) for index, shape in enumerate(shapes)})
    return model


def _flat(items: Iterable[Any]) -> list[Any]:
    return [leaf for item in items for leaf in (item if isinstance(item, list) else [item])]


def _stateless_step(decoder: Any, alignment_heads: list[tuple[int, int]]) -> Any:
    """The decoder step with every state as an input and an output, ready for :func:`_stateful`."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from asr_core import graph

    class Step(nn.Module):
        """Past self and stored cross K/V come in; grown self and freshly projected cross K/V go out.

        All are [B, H, S, E] but the cross K, [B, H, E, S]: in that order a step multiplies with them in two thirds of the time.
        """

        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(
            self, tokens: Tensor, encoded: Tensor, beam_idx: Tensor, past: list[Tensor], cross: list[Tensor]
        ) -> tuple[Tensor, ...]:
            p, t = past[0].shape[2], tokens.shape[1]
            positions = torch.arange(p, p + t)
            mask = (torch.arange(p + t)[None, :] > positions[:, None]) * graph.MASKED
            x = decoder.embed(tokens, positions)
            grown: list[Tensor] = []
            queries: list[Tensor] = []
            for i, layer in enumerate(decoder.layers):
                attn, h = layer.self_attn, layer.self_attn_layer_norm(x)
                pairs = zip(past[2 * i : 2 * i + 2], attn.keys_values(h), strict=True)
                k, v = (torch.cat([old.index_select(0, beam_idx), new], 2) for old, new in pairs)
                x = x + attn.output(attend(attn.query(h), k, v, mask))
                attn = layer.encoder_attn
                q = attn.query(layer.encoder_attn_layer_norm(x))
                queries.append(q)
                x = x + attn.output(attend(q, cross[2 * i].mT, cross[2 * i + 1]))
                x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
                grown += [k, v]
            projected = decoder.cross_keys_values(encoded)
            projected[::2] = [keys.mT for keys in projected[::2]]
            return (decoder.logits(x), decoder.choose_heads(queries, alignment_heads), *grown, *projected)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention as the one operator that the runtime fuses with its cache.

        The scale is in ``q`` already: given to the operator, the runtime would apply it to all 1500 keys at every step.
        """
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)

    return Step()


def _stateful(model: Any, dims: Dims) -> Any:
    """Turn the state inputs and outputs of a converted :func:`_stateless_step` into states of the runtime."""
    import openvino as ov
    from openvino import opset13 as op

    inputs = [port.get_node() for port in model.inputs]
    updates = [port.get_node().input_value(0).get_node() for port in model.outputs[2:]]
    count = 2 * dims.decoder_layers
    names = [f"{kind}.{i // 2}.{'kv'[i % 2]}" for kind in ("self", "cross") for i in range(count)]
    initials = [_no_rows(inputs[0], dims)] * count + updates[count:]
    sinks = []
    for name, parameter, initial, update in zip(names, inputs[3:], initials, updates, strict=True):
        read = op.read_value(initial, name, ov.Type.f32, parameter.get_partial_shape())
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(read.output(0))
        sinks.append(op.assign(read if initial is update else update, name))
    return ov.Model([port.get_node() for port in model.outputs[:2]], sinks, inputs[:3], "decoder")


def _name_attention(model: Any) -> None:
    """Call the attention operators as Optimum does: openvino_genai finds those of its own word timestamps by these names."""
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    for i, node in enumerate(found):  # each layer's own, then its cross-attention
        node.set_friendly_name(f"model.decoder.layers.{i // 2}.{('self_attn', 'encoder_attn')[i % 2]}/{node.get_type_name()}")


def _no_rows(tokens: Any, dims: Dims) -> Any:
    """Keys or values of no past token, [B, H, 0, E] for the batch of the new tokens."""
    import numpy as np
    from openvino import opset13 as op

    first, axis = op.constant([0], np.int64), op.constant(0, np.int64)
    batch = op.gather(op.shape_of(tokens), first, axis)
    shape = op.concat([batch, op.constant([dims.decoder_heads, 0, dims.head_dim], np.int64)], 0)
    return op.broadcast(op.constant(0.0, np.float32), shape)


def _save(model: Any, file: Path, precision: str) -> None:
    import openvino as ov

    if precision == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    ov.save_model(model, file, compress_to_fp16=precision == "fp16")


def _to_integers(model: Any, weights: GraphWeights) -> None:
    """Store every matrix that is multiplied with or looked up as integers, convolutions in 8 bits, other large constants in 16.

    The plugin keeps integers as they are in memory, too, where they come as nncf writes them: converted, scaled, reshaped.
    nncf itself can't be given codes.
    """
    import openvino as ov
    import torch

    integers = by_values(weights)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
            continue
        targets, values = node.output(0).get_target_inputs(), node.data
        weighs = {target.get_node().get_type_name() for target in targets if target.get_index() == 1}
        if "MatMul" in weighs:
            replaced = _dequantised(integers(values), values.shape)
        elif "Convolution" in weighs:
            replaced = _dequantised(nearest(torch.tensor(values).flatten(1), MOST_BITS), values.shape)
        elif values.size >= LEAST_HALVED:
            replaced = _in_halves(values)
        else:
            continue
        for target in targets:
            target.replace_source_output(replaced.output(0))


def _dequantised(integers: Integers, to: tuple[int, ...]) -> Any:
    """Codes of 4 or 8 bits as float32 weights of a shape."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    shape = [*integers.scales.shape, -1]
    if integers.bits == FEW_BITS:
        codes = ov.Tensor(ov.Type.i4, integers.codes.reshape(shape).shape)
        codes.data[:] = packed(integers.codes).view(codes.data.dtype)
    else:
        codes = integers.codes.reshape(shape).numpy()
    scales = _in_halves(integers.scales[..., None].numpy(), exactly=True)
    weight = op.multiply(op.convert(op.constant(codes), np.float32), scales)
    return op.reshape(weight, np.array(to), special_zero=False)


def _in_halves(values: NDArray[np.float32], *, exactly: bool = False) -> Any:
    """Values kept in half precision; as they are where they are beyond it, or would change though they must not."""
    import numpy as np
    from openvino import opset13 as op

    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    fits = (halves == values).all() if exactly else np.isfinite(halves).all()
    return op.convert(op.constant(halves), np.float32) if fits else op.constant(values)


def _save_tokenizers(checkpoint: Path, folder: Path) -> None:
    """The tokenizer and detokenizer as graphs, which the client cannot do without."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint, local_files_only=True)
    for name, model in zip(
        (TOKENIZER, DETOKENIZER),
        convert_tokenizer(tokenizer, with_detokenizer=True, skip_special_tokens=True),
        strict=True,
    ):
        ov.save_model(model, folder / f"{name}.xml")


def _name(ports: Sequence[Any], names: Sequence[str]) -> None:
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().set_names({name})


def _specs(model: Any, graph: str) -> list[TensorSpec]:
    """The model's inputs and outputs under their real names."""
    return [_spec(graph, "input", port) for port in model.inputs] + [_spec(graph, "output", port) for port in model.outputs]


def _spec(graph: str, role: Literal["input", "output"], port: Any) -> TensorSpec:
    axes = AXES.get(port.any_name, ("batch",))
    shape = [axes[i] if size.is_dynamic else size.get_length() for i, size in enumerate(port.partial_shape)]
    return TensorSpec(graph=graph, role=role, name=port.any_name, dtype=port.element_type.to_dtype().name, shape=shape)
