"""One ``.tflite`` file for LiteRT, its weights shared by three signatures of fixed shapes: decode, prefill and encode.

The host owns the key/value cache (448 rows, of which a mask hides those not yet written); a step reads it and returns only the
new rows. ``decode`` takes one token, ``prefill_8`` up to eight, so that a prompt does not cost a step for each of its tokens.

Axes: T new tokens, F audio positions (1500), D model width, H heads, E = D / H.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from asr_core.artifact import TensorSpec
from asr_core.capacity import Cost, parameters
from asr_core.checkpoint import Checkpoint
from asr_core.dims import Dims
from asr_core.errors import ExportError
from asr_core.graph_weights import FEW_BITS, MOST_BITS
from asr_core.integers import by_values, nearest
from asr_core.isolate import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from asr_core import graph
    from asr_core.graph_weights import Integers

PRECISIONS = ("fp32", "fp16", "int8", "int4")
CARRIES = dict.fromkeys(PRECISIONS, ("factors", "heads"))
# On disk, the float32 file that every conversion begins with too.
COST = {"fp32": Cost(1500, 12, 4), "fp16": Cost(1500, 12, 6), "int8": Cost(1500, 12, 5.1), "int4": Cost(1500, 12, 4.7)}
MODEL = "model.tflite"
FLOAT_MODEL = "float32.tflite"
BYTES_A_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 0.5625}
BLOCKS = (32, 64, 128, 256)  # neighbours in a row that may share a scale, if not all of a row do
LARGEST_FILE = 2**31 - 1  # bytes: offsets in a flatbuffer have 32 bits, one of them for the sign
# The signatures of the decoder and their new tokens. The first one becomes the file's main graph, whose tensors a host can
# write in place. The runtime packs the weights anew for every signature, so a second prefill size would cost their size in
# memory again; larger than 8 makes the usual prompt of four slower, smaller the long ones.
STEPS = {"decode": 1, "prefill_8": 8}

Tensors = dict[str, "Tensor"]


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Write ``model.tflite``; raises :class:`ExportError` where the model is too large or the converter leaves something out."""
    dims = checkpoint.dims
    if reasons := limits(dims, precision):
        raise ExportError("; ".join(reasons) + ".")
    model, converted = folder / MODEL, folder / FLOAT_MODEL
    progress("convert")
    with _refusals("convert"):
        _convert(checkpoint, converted)
    if precision == "fp32":
        converted.rename(model)
    else:
        progress("quantize")
        with _refusals("quantize"), _quiet():
            _quantize(converted, model, precision, checkpoint)
        converted.unlink()
    progress("verify")
    _check_graphs(model)
    specs = _specs(model)
    _check_inputs(specs, dims)
    return specs


def limits(dims: Dims, precision: str) -> list[str]:
    """What of a model does not fit into a file, as clauses."""
    weights = parameters(dims)
    needed: dict[str, float] = {"the float32 file that every conversion begins with": 4 * weights}
    if precision != "fp32":
        needed[f"the {precision} file"] = BYTES_A_WEIGHT[precision] * weights
    return [
        f"{what} would take {size / 1e9:.2f} GB, and offsets in a .tflite file end at {LARGEST_FILE / 1e9:.2f} GB"
        for what, size in needed.items()
        if size > LARGEST_FILE
    ]


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"LiteRT's tools could not {what} the model: {error}") from error


# --- the graphs


def _convert(checkpoint: Checkpoint, file: Path) -> None:
    """Convert all signatures at once, so that they share their weights."""
    with _quiet():
        import litert_torch
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    with torch.device("meta"):
        encoder, decoder = graph.encoder(checkpoint), graph.decoder(checkpoint)
    _load(encoder, "model.encoder.", checkpoint)
    _load(decoder, "model.decoder.", checkpoint)
    modules = {name: _step(decoder, count, checkpoint.alignment_heads) for name, count in STEPS.items()}
    modules["encode"] = _encode(encoder, decoder)
    converter: Any = litert_torch  # the first signature makes a converter, which then takes the others
    for name, inputs in _inputs(dims).items():
        converter = converter.signature(name, modules[name], sample_kwargs=inputs)
    with _heeding_warnings():
        # Lightweight: large constants stay where torch has them until the file is written, instead of in copies on the way.
        converter.convert(lightweight_conversion=True).export(str(file))


def _load(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Give a module without storage the checkpoint's tensors below ``prefix``."""
    names = [name for name in checkpoint.graph_weights.names if name.startswith(prefix)]
    own = {name[len(prefix) :]: checkpoint.graph_weights.read(name).float() for name in names}
    module.load_state_dict(own, strict=True, assign=True)
    module.eval().requires_grad_(requires_grad=False)


def _inputs(dims: Dims) -> dict[str, Tensors]:
    """Example inputs of every signature, by name."""
    import torch

    mel = torch.zeros(1, dims.n_mels, 2 * dims.n_audio_ctx)
    return {name: _step_inputs(dims, count) for name, count in STEPS.items()} | {"encode": {"mel": mel}}


def _step_inputs(dims: Dims, count: int) -> Tensors:
    """Tokens [1, T], position [1], and of every layer keys [1, H, E, rows] and values [1, H, rows, E], past and cross."""
    import torch

    inputs = {"tokens": torch.zeros(1, count, dtype=torch.int32), "position": torch.zeros(1, dtype=torch.int32)}
    for what, rows in (("past", dims.n_text_ctx), ("cross", dims.n_audio_ctx)):
        for layer in range(dims.decoder_layers):
            inputs[f"{what}_k_{layer}"] = torch.zeros(1, dims.decoder_heads, dims.head_dim, rows)
            inputs[f"{what}_v_{layer}"] = torch.zeros(1, dims.decoder_heads, rows, dims.head_dim)
    return inputs


def _encode(encoder: graph.Encoder, decoder: graph.Decoder) -> nn.Module:
    """Mel [1, n_mels, 2F] → states [1, F, D] and each layer's cross-attention keys [1, H, E, F] and values [1, H, F, E]."""
    from torch import nn

    class Encode(nn.Module):
        """Outputs are named by the dictionary's keys."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder
            self.decoder = decoder

        def forward(self, mel: Tensor) -> Tensors:
            states = self.encoder(mel)
            outputs = {"encoder_states": states}
            for i, layer in enumerate(self.decoder.blocks):
                k, v = layer.encoder_attn.keys_values(states)
                outputs |= {f"cross_k_{i}": k.transpose(2, 3), f"cross_v_{i}": v}
            return outputs

    return Encode().eval()


def _step(decoder: graph.Decoder, count: int, alignment_heads: list[tuple[int, int]]) -> nn.Module:
    """Tokens int32 [1, T], position int32 [1], past and cross K/V → logits [1, T, vocab] and the new rows of the cache.

    And the queries of the alignment heads, [1, heads, T, E].

    Keys lie as [1, H, E, rows], as the product with the queries wants them: otherwise the runtime would transpose all 1500
    keys of every layer at every step.
    """
    import torch
    from torch import nn

    from asr_core.graph import ALIGNMENT_QUERIES, MASKED

    rows = decoder.dims.n_text_ctx

    class Step(nn.Module):
        """Outputs are named by the dictionary's keys."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, tokens: Tensor, position: Tensor, **cache: Tensor) -> Tensors:
            x = self.decoder.embed(tokens, positions(position))
            unwritten = (torch.arange(rows, dtype=torch.int32) >= position).float() * MASKED
            outputs: Tensors = {}
            queries: list[Tensor] = []
            for i, layer in enumerate(self.decoder.blocks):
                attn, h = layer.self_attn, layer.self_attn_layer_norm(x)
                k, v = attn.keys_values(h)
                k = k.transpose(2, 3)
                q = attn.query(h)
                scores = torch.cat([q @ cache[f"past_k_{i}"] + unwritten, among_new(q, k)], -1)
                weights = scores.softmax(-1)
                x = x + attn.output(weights[..., :rows] @ cache[f"past_v_{i}"] + weights[..., rows:] @ v)
                x, q = layer.cross_and_ffn(x, cache[f"cross_k_{i}"].transpose(2, 3), cache[f"cross_v_{i}"])
                queries.append(q)
                outputs |= {f"new_k_{i}": k, f"new_v_{i}": v}
            return {
                "logits": self.decoder.logits(x),
                ALIGNMENT_QUERIES: self.decoder.choose_heads(queries, alignment_heads),
                **outputs,
            }

    def positions(first: Tensor) -> Tensor:
        """Of every new token; those that only pad a prefill may lie beyond the last."""
        if count == 1:
            return first
        return torch.clamp(first + torch.arange(count, dtype=torch.int32), max=rows - 1)

    def among_new(q: Tensor, k: Tensor) -> Tensor:
        """Scores [1, H, T, T] of the new tokens among themselves, later ones hidden."""
        if count == 1:
            return q @ k
        return q @ k + torch.full((count, count), MASKED).triu(1)

    return Step().eval()


# --- quantising


def _quantize(source: Path, target: Path, precision: str, checkpoint: Checkpoint) -> None:
    from ai_edge_quantizer import quantizer, recipe

    if precision == "fp16":
        run = quantizer.Quantizer(str(source))
        _store_halves(run)
    else:
        run = quantizer.Quantizer(str(source), recipe.dynamic_wi8_afp32())
        if precision == "int4":
            _store_integers(run, checkpoint)
    run.quantize().export_model(str(target))


def _store_integers(run: Any, checkpoint: Checkpoint) -> None:
    """Ask for the matrices of linear layers, and the embedding, as integers of this project's choice.

    The quantiser's own algorithms would change recorded codes: they choose scales from a weight's largest value, or guess them
    from the values that occur. The guessing one, which nothing else here uses, is replaced: no new one can be named. Codes of
    weights that the converter multiplied with a norm's gain before (it does where nothing else reads the norm) are lost.
    """
    from ai_edge_quantizer import algorithm_manager as manager
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import common_quantize
    from ai_edge_quantizer.algorithms.uniform_quantize import naive_min_max_quantize as rounding

    dims = checkpoint.dims
    integers = by_values(checkpoint.graph_weights, dims.head_dim**-0.5)
    parameters = functools.partial(_parameters, integers, dims.n_text_ctx)
    materialize = {
        qtyping.TFLOperationName.FULLY_CONNECTED: common_quantize.materialize_fc_conv,
        qtyping.TFLOperationName.EMBEDDING_LOOKUP: common_quantize.materialize_embedding_lookup,
    }
    key = manager.AlgorithmName.DEQUANTIZED_WEIGHT_RECOVERY
    for operation, function in materialize.items():
        materialized = functools.partial(function, parameters)
        manager.register_quantized_op(key, operation, rounding.init_qsvs, rounding.min_max_calibrate, materialized)
        run.update_quantization_recipe(
            regex=".*",
            operation_name=operation,
            op_config=qtyping.OpQuantizationConfig(
                weight_tensor_config=qtyping.TensorQuantizationConfig(
                    num_bits=4, granularity=qtyping.QuantGranularity.BLOCKWISE_32
                ),
                compute_precision=qtyping.ComputePrecision.INTEGER,
            ),
            algorithm_key=key,
        )


def _parameters(
    integers: Callable[[NDArray[np.float32]], Integers],
    positions: int,
    operation: Any,
    _config: Any,
    content: NDArray[np.float32],
    _observed: Any = None,
) -> Any:
    """How the quantiser stores a weight ``content`` [N, K]; position embeddings in 8 bits, as their error goes everywhere.

    Scales of blocks are rounded to 8 bits: the file format's kernels want it so.
    """
    import numpy as np
    import torch
    from ai_edge_quantizer import qtyping

    looked_up = operation.op_name == qtyping.TFLOperationName.EMBEDDING_LOOKUP
    made = nearest(torch.tensor(content), MOST_BITS) if looked_up and len(content) == positions else integers(content)
    if made.scales.shape[1] > 1 and (made.bits > FEW_BITS or content.shape[1] // made.scales.shape[1] not in BLOCKS):
        made = nearest(torch.tensor(content), made.bits)  # the file format has no such blocks
    block = content.shape[1] // made.scales.shape[1] if made.scales.shape[1] > 1 else 0
    return qtyping.UniformQuantParams(
        num_bits=made.bits,
        quantized_dimension=1 if block else 0,
        scale=made.scales.numpy(),
        zero_point=np.zeros(made.scales.shape, np.int32),
        symmetric=True,
        quantized_data=made.codes.numpy(),
        block_size=block,
    )


def _store_halves(run: Any) -> None:
    """Ask for weights in half precision that are widened before use: activations stay float32."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.quantizer import AlgorithmName

    run.update_quantization_recipe(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        algorithm_key=AlgorithmName.FLOAT_CASTING,
    )


# --- what came out


def _check_graphs(model: Path) -> None:
    """Raise :class:`ExportError` for operators that the converter left as they were, and for signatures out of order."""
    from ai_edge_litert import schema_py_generated as schema

    with model.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        root = schema.Model.GetRootAsModel(content, 0)
        codes = [root.OperatorCodes(i) for i in range(root.OperatorCodesLength())]
        names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.startswith("STABLEHLO_")}
        left = {code.CustomCode().decode() for code in codes if code.BuiltinCode() == schema.BuiltinOperator.CUSTOM}
        left |= {names[code.BuiltinCode()] for code in codes if code.BuiltinCode() in names}
        signatures = [root.SignatureDefs(i) for i in range(root.SignatureDefsLength())]
        main = [signature.SignatureKey().decode() for signature in signatures if signature.SubgraphIndex() == 0]
    if left:
        raise ExportError(f"the converter left operators as they were: {', '.join(sorted(left))}.")
    if main != ["decode"]:
        raise ExportError(f"the file's main graph is {main}, not decode.")


def _specs(model: Path) -> list[TensorSpec]:
    """The inputs and outputs of every signature, as the file itself names them."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # Without the delegate, which would pack all the weights.
    interpreter = Interpreter(str(model), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    specs = []
    for name in interpreter.get_signature_list():
        signature = interpreter.get_signature_runner(name)
        specs += [_spec(name, "input", *item) for item in signature.get_input_details().items()]
        specs += [_spec(name, "output", *item) for item in signature.get_output_details().items()]
    return specs


def _check_inputs(specs: list[TensorSpec], dims: Dims) -> None:
    """Raise :class:`ExportError` where the file does not take what was converted: an input without a use would be dropped."""
    wanted = {
        (name, key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, inputs in _inputs(dims).items()
        for key, tensor in inputs.items()
    }
    found = {(spec.graph, spec.name, spec.dtype, tuple(spec.shape)) for spec in specs if spec.role == "input"}
    wrong = sorted({f"{name}/{key}" for name, key, *_ in wanted ^ found})
    if wrong:
        raise ExportError(f"inputs of the converted file differ from those of the graph: {', '.join(wrong)}.")


def _spec(graph: str, role: Literal["input", "output"], name: str, details: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(graph=graph, role=role, name=name, dtype=details["dtype"].__name__, shape=details["shape"].tolist())


# --- the tools' remarks


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence importing and quantising: optional libraries that are missing, progress bars, statistics, shared buffers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class _Collector(logging.Handler):
    """Keeps the root logger's own warnings, which is where the converter's come from."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        if record.name == "root":
            self.texts.append(record.getMessage())


@contextlib.contextmanager
def _heeding_warnings() -> Iterator[None]:
    """Make an error of whatever the converter warns of: types it changed, weights it could not share, a module in training.

    Python's own warnings in it are about its use of torch, which a user cannot change.
    """
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    collector = _Collector()
    logging.getLogger().addHandler(collector)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(collector)
    if collector.texts:
        raise ExportError(f"LiteRT's converter warns: {'; '.join(collector.texts)}")
