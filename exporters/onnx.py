"""ONNX for ONNX Runtime: an encoder graph and a decoder-step graph, each with its weights in one external file.

The graphs are traced without weights; the weights are then streamed from the checkpoint into the external data, one tensor
at a time and quantised on the way. An export's memory is that of the tools and of the largest tensor, whatever the model weighs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from asr_core import conversions
from asr_core.artifact import TensorSpec
from asr_core.capacity import Cost
from asr_core.errors import ExportError
from asr_core.graph_weights import Integers
from asr_core.integers import GROUP, nearest, packed
from asr_core.isolate import Progress

if TYPE_CHECKING:
    from types import FunctionType

    import numpy as np
    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

    from asr_core.checkpoint import Checkpoint
    from asr_core.dims import Dims
    from asr_core.graph_weights import GraphWeights

PRECISIONS = ("fp32", "fp16", "int8", "int4")
# With ranges of activations that the checkpoint's record must have; only the encoder's are used.
STATIC = "int8-static"
ON_REQUEST = (STATIC,)
INTEGERS = {"int8": ("int8",), STATIC: ("int8",), "int4": ("int8", "int4")}
CARRIES = {precision: ("factors", "heads", *INTEGERS.get(precision, ())) for precision in (*PRECISIONS, *ON_REQUEST)}
# Of libraries and the largest tensor; the data files are the model.
COST = dict.fromkeys((*PRECISIONS, *ON_REQUEST), Cost(750, 0.3, 1.1)) | {"fp32": Cost(750, 0.4, 4), "fp16": Cost(750, 0.3, 2)}

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
LOGITS_AT = "logits_at"  # the new tokens whose logits are wanted: of a prompt, few are
HEAD = "decoder.embed_tokens.weight"  # the embedding, which is the tied head too
# Weights that share a scale in MatMulNBits. Large blocks are the fastest, and per-row scales are already accurate at 8 bits.
BLOCKS = (128, 64, 32, 16)
# What computes with them. With activations of 8 bits (level 4) one row is multiplied the fastest; with as many rows as an encoder
# has, they cost accuracy and gain nothing.
ACCURACY_LEVEL = {"encoder": 0, "decoder": 4}
# Float32 for the caller in every precision, by the names of all layouts.
FLOAT_INPUTS = {"mel", "input_features", "encoder_hidden_states"}
FLOAT_OUTPUTS = {"encoder_states", "last_hidden_state"}
ROWS = 512  # rows that are quantised at once: bounds the temporaries
LARGEST_Q8 = 127  # of signed 8-bit weights
# Weights of the encoder's graph whose inputs are rounded by range; a left factor's are what the right one made.
AUDIO_LINEAR = re.compile(r"model\.(encoder\..*(_proj|fc[12])|decoder\..*encoder_attn\.[kv]_proj)(\.right)?\.weight$")
SIGNS = {8: 0x80, 4: 0x88}  # that MatMulNBits' unsigned weights have the other way round, of each byte
BYTE, FEW = 8, 4  # bits of a code

TRACED = "traced.onnx"  # in the cache
TRACERS = ("onnx-ir", "onnxscript", "torch")  # packages that decide what a traced graph is

Shape = Sequence[int | str]


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Write ``encoder.onnx`` and ``decoder.onnx`` with their data files; returns their inputs and outputs.

    Raises :class:`ExportError` where the precision needs ranges of activations that the checkpoint does not have.
    """
    if precision == STATIC:
        _check_ranges(checkpoint.graph_weights)
    specs: list[TensorSpec] = []
    for name, describe in graphs().items():
        progress(f"{name} graph")
        model = draft(describe, checkpoint, precision, name)
        progress(f"{name} weights")
        specs += ship(model, name, folder / f"{name}.onnx")
        del model
        gc.collect()  # graphs are full of cycles
    return specs


def _check_ranges(weights: GraphWeights) -> None:
    """Raise where any linear layer that reads audio, other than a second factor, has no range of its inputs."""
    lacking = [name for name in weights.names if AUDIO_LINEAR.search(name) and weights.inputs(name) is None]
    if lacking:
        raise ExportError(
            f"{STATIC} needs the ranges of the encoder's activations, and this checkpoint has none of {lacking[0]} "
            f"({len(lacking)} layers). Find them: asr-compress --method static --out FOLDER, and export that."
        )


def graphs() -> dict[str, Callable[[Checkpoint], Traceable]]:
    """What the two graphs are traced from, by their names."""
    return {"encoder": _encoder, "decoder": _decoder}


def draft(
    describe: Callable[[Checkpoint], Traceable], checkpoint: Checkpoint, precision: str, kind: str, *, as_stored: bool = False
) -> ir.Model:
    """A graph in its shipped form whose weights have not been read; ``kind`` is what it is like, ``encoder`` or ``decoder``.

    ``as_stored`` leaves each weight, of a float precision, the tensor that the checkpoint has.
    """
    with quiet():
        model = _traced(describe, checkpoint, precision)
        _Rewriter(model.graph, checkpoint.graph_weights, precision, as_stored=as_stored).run(kind)
    return model


def ship(model: ir.Model, name: str, path: Path, data_suffix: str = ".data") -> list[TensorSpec]:
    """Tidy a draft and write it, its weights streamed into a file beside it; returns its inputs and outputs."""
    import onnx_ir as ir

    with quiet():
        clean(model)
        ir.save(model, path, external_data=path.name + data_suffix)
    return list_ports(name, model)


# --- tracing without weights


@dataclass(frozen=True)
class Traceable:
    """A module with what tracing it needs: example arguments, their dynamic axes, names and shapes of inputs and outputs."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    axes: tuple[Any, ...]
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


def _encoder(checkpoint: Checkpoint) -> Traceable:
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    return Traceable(
        module=graph.EncodeWithCross(graph.encoder(checkpoint), graph.decoder(checkpoint)),
        arguments=(torch.zeros(2, dims.n_mels, 778),),
        # The tracer asks more of a named number of frames than it can prove of any.
        axes=({0: torch.export.Dim("batch", min=1), 2: torch.export.Dim.DYNAMIC},),
        inputs={"mel": ("batch", dims.n_mels, "frames")},
        outputs={"encoder_states": ("batch", "positions", dims.d_model), **_keys_values("cross", dims)},
    )


def _decoder(checkpoint: Checkpoint) -> Traceable:
    import torch

    from asr_core import graph

    dims, alignment_heads = checkpoint.dims, checkpoint.alignment_heads
    # Bounds that only keep 0 and 1 from being specialised; the examples differ from each other and from both.
    batch, new = (torch.export.Dim(name, min=1) for name in ("batch", "new"))
    past = torch.export.Dim("past", min=0, max=dims.n_text_ctx - 1)
    wanted, positions = torch.export.Dim("wanted", min=1), torch.export.Dim("positions", min=1, max=dims.n_audio_ctx)
    tensors = 2 * dims.decoder_layers
    heads, width = dims.decoder_heads, dims.head_dim
    return Traceable(
        module=graph.DynamicStep(graph.decoder(checkpoint), alignment_heads),
        arguments=(
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(4, dtype=torch.int64),
            [torch.zeros(5, 2, heads, width) for _ in range(tensors)],
            [torch.zeros(2, heads, 7, width) for _ in range(tensors)],
        ),
        axes=({0: batch, 1: new}, {0: wanted}, [{0: past, 1: batch}] * tensors, [{0: batch, 2: positions}] * tensors),
        inputs={"tokens": ("batch", "new"), LOGITS_AT: ("wanted",), **_keys_values("past", dims), **_keys_values("cross", dims)},
        outputs={
            "logits": ("batch", "wanted", dims.vocab),
            graph.ALIGNMENT_QUERIES: ("batch", len(alignment_heads), "new", width),
            **_keys_values("new", dims),
        },
    )


def _keys_values(what: str, dims: Dims) -> dict[str, Shape]:
    """Names and shapes of the K and V of every layer: ``cross`` [B, H, F, E], ``past`` and ``new`` [P or T, B, H, E]."""
    heads, width = dims.decoder_heads, dims.head_dim
    shape: Shape = ("batch", heads, "positions", width) if what == "cross" else (what, "batch", heads, width)
    return {f"{what}_{kind}_{layer}": shape for layer in range(dims.decoder_layers) for kind in "kv"}


def _traced(describe: Callable[[Checkpoint], Traceable], checkpoint: Checkpoint, precision: str) -> ir.Model:
    """What :func:`_trace` makes, from the cache where any precision or checkpoint of this shape was traced before.

    ``describe`` may depend on the checkpoint's shape alone, never on its values.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    from asr_core import graph

    def write(folder: Path) -> list[str]:
        model = _trace(describe, checkpoint, dtype)
        passes.ClearMetadataAndDocStringPass()(model)
        for value in model.graph.initializers.values():
            # Nothing is there to be read: each is bound to the checkpoint's tensor after loading.
            value.const_value = ir.ExternalTensor("unbound", None, None, value.dtype, shape=value.shape, name=value.name)
        ir.save(model, folder / TRACED)
        return []

    dtype = "float16" if precision == "fp16" else "float32"
    weights, code = checkpoint.graph_weights, cast("FunctionType", describe).__code__
    inputs = {
        "graph": [Path(code.co_filename).name, code.co_qualname],
        "dtype": dtype,
        "dims": checkpoint.dims.model_dump(),
        "alignment_heads": checkpoint.alignment_heads,
        "shapes": {name: weights.shape(name) for name in weights.names},
        "sources": [conversions.sha256(Path(file)) for file in (graph.__file__, __file__, code.co_filename)],
        "tools": {name: metadata.version(name) for name in TRACERS},
    }
    folder, _ = conversions.kept("graphs", code.co_name.strip("_"), inputs, write)
    return ir.load(folder / TRACED)


def _trace(describe: Callable[[Checkpoint], Traceable], checkpoint: Checkpoint, dtype: str) -> ir.Model:
    """The ONNX model of a module whose parameters have shapes and types but no memory."""
    import onnx_ir as ir
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            traceable = describe(checkpoint)
            program = torch.export.export(
                traceable.module.eval(), traceable.arguments, dynamic_shapes=traceable.axes, strict=False
            )
            # torch's own optimiser stumbles on parameters without memory; the rewriter does what is needed.
            converted = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    finally:
        torch.set_default_dtype(default)
    model: ir.Model = cast("torch.onnx.ONNXProgram", converted).model
    for values, named in ((model.graph.inputs, traceable.inputs), (model.graph.outputs, traceable.outputs)):
        for value, (name, shape) in zip(values, named.items(), strict=True):
            value.name, value.shape = name, ir.Shape(shape)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the converters: they remark on operators and features that Whisper does not use."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- rewriting the graph for speed, with weights that are read when they are written


class _Rewriter:
    """Turns the traced graph into the shipped one, and its initializers into lazy readers of the checkpoint."""

    def __init__(self, graph: ir.Graph, weights: GraphWeights, precision: str, *, as_stored: bool) -> None:
        self.graph = graph
        self.weights = weights
        self.precision = precision
        self.as_stored = as_stored
        self._rounding: dict[tuple[ir.Value, float, int], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def run(self, name: str) -> None:
        """Rewrite in place; ``name`` is ``encoder`` or ``decoder``."""
        for initializer in list(self.graph.initializers.values()):
            self._bind(initializer)
        for node in self._nodes("Reshape"):
            self._simplify_reshape(node)
        if name == "encoder":
            # Flash attention. The decoder's single queries are faster with plain matrix products.
            for node in self._nodes("Softmax"):
                self._fuse_attention(node)
        for node in self._nodes("MatMul"):
            self._rewrite_linear(node, name)
        if self.precision == "fp16":
            self._float_boundary()
        if self.precision == "int4":
            self._narrow_others()

    def _nodes(self, op_type: str) -> list[ir.Node]:
        return [node for node in self.graph if node.op_type == op_type]

    def _bind(self, initializer: ir.Value) -> None:
        """Let a traced parameter read its tensor from the checkpoint."""
        name = initializer.name
        initializer.const_value = _lazy(name, initializer.dtype, initializer.shape, lambda: self._read(name))

    def _read(self, name: str) -> NDArray[Any]:
        import torch

        dtype = torch.float16 if self.precision == "fp16" else torch.float32
        array: NDArray[Any] = self.weights.read(f"model.{name}").to(dtype).numpy()
        return array

    def _initializer(self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], NDArray[Any]]) -> ir.Value:
        """A further initializer, or the one that already has this name."""
        import onnx_ir as ir

        if name not in self.graph.initializers:
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            value.const_value = _lazy(name, dtype, value.shape, read)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _insert(
        self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output; returns the output."""
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes, domain=domain)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _simplify_reshape(self, node: ir.Node) -> None:
        """Splitting or merging heads keeps the first two axes: a constant shape instead of one computed at every step."""
        import onnx_ir as ir

        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or after is None or list(before[:2]) != list(after[:2]) or not after.is_static(len(after) - 1):
            return
        node.replace_input_with(1, self._insert(node, "Constant", [], value_ints=[0, 0, *after[2:]]))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)

    def _fuse_attention(self, softmax: ir.Node) -> None:
        """Softmax(q · s · kᵀ) · v with its splitting and merging of heads → one MultiHeadAttention over [B, F, D]."""
        scores = softmax.inputs[0].producer()
        queries, transposed_keys = (value.producer() for value in scores.inputs)
        scaled = queries.inputs[0].producer().inputs[0].producer()
        keys = transposed_keys.inputs[0].producer()
        (product,) = _consumers(softmax)
        values = product.inputs[1].producer()
        (transposed,) = _consumers(product)
        (merged,) = _consumers(transposed)
        # The operator scales by itself, so it takes what the scaling took.
        whole = [scaled.inputs[0], *(heads.inputs[0].producer().inputs[0] for heads in (keys, values))]
        heads = queries.inputs[0].shape[2]
        _replace(merged.outputs[0], self._insert(merged, "MultiHeadAttention", whole, CONTRIB, num_heads=heads))

    def _rewrite_linear(self, node: ir.Node, graph_name: str) -> None:
        """MatMul(x, Transpose(weight)) (+ bias) → the form that the runtime runs fastest."""
        transpose = node.inputs[1].producer()
        if transpose is None or not transpose.inputs[0].is_initializer():
            return
        weight = transpose.inputs[0]
        n, k = weight.shape
        if self.precision in INTEGERS:
            self._quantise_linear(node, weight, graph_name)
        elif weight.name == HEAD:
            # Stored once: the runtime folds the transposition when it loads the model.
            if self.precision == "fp16":
                self._float_head(node)
        elif not self.as_stored:
            name = weight.name
            columns = self._initializer(f"{name}.T", weight.dtype, (k, n), lambda: self._read(name).T)
            node.replace_input_with(1, columns)

    def _narrow_others(self) -> None:
        """Store convolutions and positions as float16, which the runtime widens when it loads the model."""
        import onnx_ir as ir

        for value in [one for one in self.graph.initializers.values() if one.dtype == ir.DataType.FLOAT and len(one.shape) > 1]:
            readers = list(value.uses())
            if not readers or value.name.endswith(".scales"):
                continue
            halves = self._initializer(
                f"{value.name}.float16", ir.DataType.FLOAT16, value.shape, partial(self._halves, value.name)
            )
            widened = self._insert(self.graph[0], "Cast", [halves], to=ir.DataType.FLOAT)
            for node, index in readers:
                node.replace_input_with(index, widened)

    def _halves(self, name: str) -> NDArray[np.float16]:
        return self._read(name).astype("float16")

    def _float_head(self, node: ir.Node) -> None:
        """Logits in float32: float16 resolves numbers above 16 only to 1/64, which makes equals of close candidates."""
        import onnx_ir as ir

        inputs = [self._insert(node, "Cast", [value], to=ir.DataType.FLOAT) for value in node.inputs]
        _replace(node.outputs[0], self._insert(node, "MatMul", inputs), dtype=ir.DataType.FLOAT)

    def _quantise_linear(self, node: ir.Node, weight: ir.Value, graph_name: str) -> None:
        last, bias = node, None
        (consumer, *others) = [*_consumers(node), None]
        if consumer is not None and others == [None] and consumer.op_type == "Add" and consumer.inputs[1].is_initializer():
            last, bias = consumer, consumer.inputs[1]
        packing = self._packing(weight, graph_name)
        if graph_name == "encoder" and packing.bits == BYTE and packing.groups == 1:
            product = self._int8(last, node.inputs[0], weight, packing, bias)
        else:
            product = self._blockwise(last, node.inputs[0], weight, packing, bias, ACCURACY_LEVEL[graph_name])
        _replace(last.outputs[0], product)
        if weight.name == HEAD:
            self._quantise_embedding(weight, packing)

    def _packing(self, weight: ir.Value, graph_name: str) -> Packing:
        """How a weight is stored: as the integers that the checkpoint's record has, where the runtime has a form for them."""
        k = weight.shape[1]
        recorded = self.weights.integers(f"model.{weight.name}")
        if recorded is not None and (recorded.bits == BYTE or self.precision == "int4"):
            groups = recorded.scales.shape[1]
            if groups == 1 or _block(k // groups):
                halves = recorded.scales.half().float().equal(recorded.scales)
                return Packing(max(recorded.bits, FEW), _block(k // groups) or BLOCKS[-1], groups, halves=halves, recorded=True)
        if self.precision == "int4":
            return Packing(FEW, BLOCKS[-1] if k % GROUP else GROUP, 1 if k % GROUP else k // GROUP, halves=True)
        block = _block(k)
        return Packing(BYTE, block or BLOCKS[-1], k // block if block and graph_name == "decoder" else 1)

    def _int8(self, before: ir.Node, x: ir.Value, weight: ir.Value, packing: Packing, bias: ir.Value | None) -> ir.Value:
        """8-bit activations and weights, one scale a column: the fastest for many rows at once.

        Activations are rounded to their own range each time, or to the one that was calibrated.
        """
        import onnx_ir as ir

        (n, k), name = weight.shape, weight.name

        def codes() -> NDArray[np.int8]:
            return self._integers(name, packing).codes.T.numpy()

        def scales() -> NDArray[np.float32]:
            return self._integers(name, packing).scales[:, 0].numpy()

        q8 = self._initializer(f"{name}.T_int8", ir.DataType.INT8, (k, n), codes)
        scale = self._initializer(f"{name}.scale", ir.DataType.FLOAT, (n,), scales)
        inputs = self.weights.inputs(f"model.{name}") if self.precision == STATIC else None
        if inputs is None:
            return self._insert(before, "DynamicQuantizeMatMul", [x, q8, scale, None, bias], CONTRIB)
        x8, x_scale, x_zero = self._rounded(before, x, *inputs)
        return self._insert(before, "MatMulIntegerToFloat", [x8, q8, x_scale, scale, x_zero, None, bias], CONTRIB)

    def _rounded(self, before: ir.Node, x: ir.Value, scale: float, zero: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """A value in unsigned 8 bits, its scale and its zero: one of each for all layers that read it."""
        import numpy as np
        import onnx_ir as ir

        key = (x, scale, zero)
        if key not in self._rounding:
            constants = [
                self._insert(before, "Constant", [], value=ir.tensor(number)) for number in (np.float32(scale), np.uint8(zero))
            ]
            self._rounding[key] = (self._insert(before, "QuantizeLinear", [x, *constants]), constants[0], constants[1])
        return self._rounding[key]

    def _blockwise(
        self, before: ir.Node, x: ir.Value, weight: ir.Value, packing: Packing, bias: ir.Value | None, accuracy_level: int
    ) -> ir.Value:
        """Weights of 8 or 4 bits with a scale a block."""
        n, k = weight.shape
        packed, scales = self._blocks(before, weight, packing)
        attributes = {"N": n, "K": k, "bits": packing.bits, "block_size": packing.block, "accuracy_level": accuracy_level}
        return self._insert(before, "MatMulNBits", [x, packed, scales, None, None, bias], CONTRIB, **attributes)

    def _quantise_embedding(self, weight: ir.Value, packing: Packing) -> None:
        """Look tokens up in the head's own table."""
        if weight.shape[1] % packing.block:
            raise ExportError(f"model.{weight.name} has rows of {weight.shape[1]}; the runtime needs a multiple of {BLOCKS[-1]}.")
        gather = next(node for node in weight.consumers() if node.op_type == "Gather")
        packed, scales = self._blocks(gather, weight, packing)
        shape = [weight.shape[0], weight.shape[1] * packing.bits // BYTE]
        table = self._insert(gather, "Reshape", [packed, self._insert(gather, "Constant", [], value_ints=shape)])
        attributes = {"bits": packing.bits, "block_size": packing.block, "gather_axis": 0, "quantize_axis": 1}
        inputs = [table, gather.inputs[1], scales]
        _replace(gather.outputs[0], self._insert(gather, "GatherBlockQuantized", inputs, CONTRIB, **attributes))

    def _blocks(self, before: ir.Node, weight: ir.Value, packing: Packing) -> tuple[ir.Value, ir.Value]:
        """Unsigned weight [N, blocks, bytes of a block], filled up with zeros, and its scales [N, blocks]."""
        import onnx_ir as ir
        from torch.nn import functional as F

        (n, k), name, block = weight.shape, weight.name, packing.block
        count = -(-k // block)
        shape = (n, count, block * packing.bits // BYTE)

        def unsigned() -> NDArray[np.uint8]:
            codes = self._integers(name, packing).codes
            if k < count * block:
                codes = F.pad(codes, (0, count * block - k))
            made: NDArray[np.uint8] = packed(codes) if packing.bits == FEW else codes.numpy().view("uint8")
            made ^= made.dtype.type(SIGNS[packing.bits])
            return made.reshape(shape)

        def scales() -> NDArray[np.floating[Any]]:
            spread = self._integers(name, packing).scales.repeat_interleave(count // packing.groups, 1)
            return (spread.half() if packing.halves else spread).numpy()

        quantised = self._initializer(f"{name}.uint{packing.bits}", ir.DataType.UINT8, shape, unsigned)
        dtype = ir.DataType.FLOAT16 if packing.halves else ir.DataType.FLOAT
        stored = self._initializer(f"{name}.scales", dtype, (n, count), scales)
        return quantised, self._insert(before, "Cast", [stored], to=ir.DataType.FLOAT) if packing.halves else stored

    def _integers(self, name: str, packing: Packing) -> Integers:
        """A weight as integers: the record's, or rounded to the nearest."""
        import torch

        full = f"model.{name}"
        if packing.recorded and (recorded := self.weights.integers(full)):
            return recorded
        rounded = nearest if packing.bits == FEW else partial(nearest_int8, groups=packing.groups)
        weight = self.weights.read(full)
        codes, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), packing.groups)
        for start in range(0, len(weight), ROWS):  # in one piece, the largest would need several times its size
            # Small results that stayed in memory between the temporaries would keep these from being given back.
            made = rounded(weight[start : start + ROWS].float())
            codes[start : start + ROWS], scales[start : start + ROWS] = made.codes, made.scales
        return Integers(codes, scales, packing.bits)

    def _float_boundary(self) -> None:
        """Spectrogram, states and logits stay float32 for the caller; the caches are float16, as the graph is."""
        import onnx_ir as ir

        for value in self.graph.inputs:
            if value.name in FLOAT_INPUTS:
                readers = list(value.consumers())
                narrow = self._insert(self.graph[0], "Cast", [value], to=ir.DataType.FLOAT16)
                for reader in readers:
                    reader.replace_input_with(0, narrow)
                value.dtype = ir.DataType.FLOAT
        for index, value in enumerate(self.graph.outputs):
            if value.name in FLOAT_OUTPUTS:
                widen = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
                self.graph.append(widen)
                states = widen.outputs[0]
                states.name, value.name = value.name, f"{value.name}.float16"
                states.shape, states.dtype = value.shape, ir.DataType.FLOAT
                self.graph.outputs[index] = states


@dataclass(frozen=True)
class Packing:
    """How a linear layer's weight is stored: bits of a code, neighbours in a row that the runtime gives a scale, scales of a row.

    Where there are fewer scales than blocks, blocks repeat them. ``halves``: float16 holds the scales. ``recorded``: codes and
    scales are those of the checkpoint's record, else they are made here.
    """

    bits: int
    block: int
    groups: int
    halves: bool = False
    recorded: bool = False


def _block(group: int) -> int | None:
    """The largest block that divides a group."""
    return next((block for block in BLOCKS if group % block == 0), None)


def nearest_int8(weight: torch.Tensor, groups: int) -> Integers:
    """Round float32 [N, K] to codes of 8 bits, with so many scales a row."""
    import torch

    values = weight.reshape(len(weight), groups, -1)
    scales = (values.abs().amax(2) / LARGEST_Q8).clamp(min=torch.finfo(torch.float32).tiny)
    return Integers((values / scales[..., None]).round().char().reshape(weight.shape), scales, BYTE)


def _lazy(name: str, dtype: ir.DataType, shape: ir.Shape, read: Callable[[], NDArray[Any]]) -> ir.LazyTensor:
    """A tensor that is read when it is written, and forgotten again."""
    import numpy as np
    import onnx_ir as ir

    return ir.LazyTensor(lambda: ir.Tensor(np.ascontiguousarray(read())), dtype=dtype, shape=shape, name=name)


def _consumers(node: ir.Node) -> list[ir.Node]:
    return list(node.outputs[0].consumers())


def _replace(old: ir.Value, new: ir.Value, dtype: ir.DataType | None = None) -> None:
    """Let ``new`` take the place, shape, type and name of ``old``."""
    import onnx_ir as ir

    new.shape, new.type = old.shape, ir.TensorType(dtype or old.dtype)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None


def clean(model: ir.Model) -> None:
    """Drop what the rewriting left over, and the tracer's notes: sizes of traced examples, paths of source files."""
    import onnx_ir.passes.common as passes

    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)
    for node in model.graph.all_nodes():
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = output.type = None
    model.opset_imports[CONTRIB] = 1


def list_ports(graph: str, model: ir.Model) -> list[TensorSpec]:
    """A graph's inputs and outputs."""

    def spec(role: Literal["input", "output"], value: ir.Value) -> TensorSpec:
        shape = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
        return TensorSpec(graph=graph, role=role, name=value.name, dtype=value.dtype.numpy().name, shape=shape)

    inputs = [spec("input", value) for value in model.graph.inputs]
    return inputs + [spec("output", value) for value in model.graph.outputs]
