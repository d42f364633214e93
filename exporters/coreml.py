"""Core ML programs: an encoder and a decoder step of one token, each an ``.mlpackage``.

Two kinds of decoder, told apart by the precision's name. The plain ones run from iOS 16 and macOS 13 on: they return the new
K/V rows, and the host owns the cache. The ``-stateful`` ones keep it in states of the runtime, which are always float16 and
need iOS 18 or macOS 15. All sizes are fixed, one window at a time; cross-attention K/V leave the encoder in the form in which
the decoder takes them.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core import registry
from asr_core.artifact import TensorSpec
from asr_core.capacity import Cost
from asr_core.checkpoint import Checkpoint
from asr_core.dims import Dims, expected_shapes
from asr_core.errors import ExportError
from asr_core.graph_weights import FEW_BITS
from asr_core.integers import stored
from asr_core.isolate import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from asr_core.graph_weights import GraphWeights

STATEFUL = "-stateful"
# Four bits need the finer palettes that only the newer runtimes have: one palette a tensor costs the carried checkpoint five
# points of word errors.
PRECISIONS = ("fp32", "fp16", "int8", "int4", "palette8", "palette6", "fp16-stateful", "int8-stateful", "palette4-stateful")
CARRIES = dict.fromkeys(PRECISIONS, ("factors", "heads")) | {
    "int4": ("factors", "heads", "int8", "int4"),
    "palette8": ("factors", "heads", "palettes4", "palettes6", "palettes8"),
    "palette6": ("factors", "heads", "palettes4", "palettes6"),
    "palette4-stateful": ("factors", "heads", "palettes4", "row palettes4"),
}
PALETTE_BITS = {"palette8": 8, "palette6": 6, "palette4": 4}
# Of the larger half: in float32, traced, and as the program that is made of it. On disk, packages are written twice.
COST = dict.fromkeys(PRECISIONS, Cost(1500, 12, 4)) | {"fp32": Cost(1000, 10, 8)}
# Rows (columns, where their number doesn't divide) of a weight that share a palette, on runtimes that can do that.
GROUP = 16
# Adjacent float16 values that get one palette entry together: a fifth of the time, for an error greater by less than 1e-4 of it.
NEIGHBOURING = 8
# Of the convolutions' palettes beside grouped ones: they weigh little, and their error goes into all that follows.
STEM_BITS = 8
MATRIX = 2  # axes
HALVED = "_to_fp16"  # what the converter puts behind a weight's name
# Smaller tensors (biases, norms) stay as they are: they weigh nothing.
LEAST_COMPRESSED = 2048
MOST_ELEMENTS = 2**31 - 1  # of one tensor: Core ML indexes with int32
LARGEST_FP16 = 65504.0
# What coremltools imports wherever it finds it, and what nothing here needs.
NEIGHBOURS = ("executorch", "sklearn", "tensorflow", "torchao", "torchvision", "transformers", "xgboost")
# What the converter remarks on without consequences for these graphs; anything else that it warns of fails the export.
HARMLESS = re.compile(
    r"Tuple detected at graph output"
    r"|`torch\.jit\.\w+` is (deprecated|not supported)"
    r"|Torch var past_[kv]_\d+ is added again"  # a state is read and written under one name
    r"|Saving value type of int64 into a builtin type of int32"  # positions and token ids are small
    r"|invalid value encountered in (divide|cast)"  # int8 rows of zeros, as padding's: their scale is zero too
)
HOUSEKEEPING = (DeprecationWarning, PendingDeprecationWarning, ResourceWarning)

Ports = dict[str, tuple[int, ...]]


@dataclass
class Traceable:
    """A module with the shapes of its inputs, outputs and states, by name.

    ``integers`` names the inputs that are int32, ``float32`` the other tensors that stay float32 whatever the precision: what
    the host computes or reads itself.
    """

    module: Any
    inputs: Ports
    outputs: Ports
    states: Ports = field(default_factory=dict)
    integers: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()

    def dtype(self, name: str, weights: str) -> str:
        """A tensor's numpy dtype at a precision."""
        if name in self.integers:
            return "int32"
        return "float32" if weights == "fp32" or name in self.float32 else "float16"


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Write ``encoder.mlpackage`` and ``decoder.mlpackage``; returns their inputs and outputs (states are neither).

    Raises :class:`ExportError` where Core ML cannot hold the checkpoint, with every reason, and where a conversion isn't clean.
    """
    reasons = problems(checkpoint, precision)
    if reasons:
        raise ExportError(f"Core ML cannot hold {checkpoint.name} as {precision}:\n" + "\n".join(f"  - {r}" for r in reasons))
    registry.import_alone("coremltools.optimize.coreml", without=NEIGHBOURS)
    weights, stateful = precision.removesuffix(STATEFUL), precision.endswith(STATEFUL)
    specs: list[TensorSpec] = []
    for name, describe in (("encoder", _encoder), ("decoder", _stateful_step if stateful else _stateless_step)):
        progress(name)
        specs += package(name, describe, checkpoint, folder, weights, progress, stateful=stateful)
    return specs


def package(
    name: str,
    describe: Callable[[Checkpoint], Traceable],
    checkpoint: Checkpoint,
    folder: Path,
    weights: str,
    progress: Progress,
    *,
    stateful: bool = False,
) -> list[TensorSpec]:
    """Convert one graph and write ``<name>.mlpackage``; returns its inputs and outputs."""
    traceable, palettes = describe(checkpoint), _recorded_palettes(checkpoint, weights)
    if stateful and weights in PALETTE_BITS:
        _set_sizes_apart(traceable.module, palettes)
    with _clean_conversion(name):
        model = _convert(traceable, weights, checkpoint.graph_weights, stateful=stateful)
        _check_states(model, traceable)
        specs = _specs(name, traceable, weights)
        traceable.module = None  # its weights are in the model now
        progress(f"{name} weights")
        _compress(model, weights, palettes, grouped=stateful).save(str(folder / f"{name}.mlpackage"))
    return specs


def _recorded_palettes(checkpoint: Checkpoint, weights: str) -> dict[str, int]:
    """The weights of a compressed checkpoint whose palettes the precision holds as they are, and how many each has (1 or N).

    Keys are as a converted program's constants are named.
    """
    found = {}
    for name in checkpoint.graph_weights.names if weights in PALETTE_BITS else ():
        palette = checkpoint.graph_weights.palette(name)
        if palette is not None and palette.centroids.shape[1] <= 2 ** PALETTE_BITS[weights]:
            found[name.removeprefix("model.").replace(".", "_")] = len(palette.centroids)
    return found


def problems(checkpoint: Checkpoint, precision: str) -> list[str]:
    """Why Core ML cannot hold a checkpoint, as sentences."""
    dims = checkpoint.dims
    shapes = expected_shapes(dims) | {
        "the encoder's attention": (dims.encoder_heads, dims.n_audio_ctx, dims.n_audio_ctx),
        "the cross-attention's keys": (dims.decoder_heads, dims.n_audio_ctx, dims.head_dim),
    }
    found = [
        f"{name} {list(shape)} has more than {MOST_ELEMENTS} elements"
        for name, shape in shapes.items()
        if math.prod(shape) > MOST_ELEMENTS
    ]
    if precision.startswith("palette") and precision.endswith(STATEFUL):
        found += [
            f"{name} {list(shape)} cannot be grouped by {GROUP}: neither rows nor columns divide"
            for name, shape in expected_shapes(dims).items()
            if len(shape) == MATRIX and _group_axis(shape) is None
        ]
    if not precision.startswith("fp32"):
        found += _beyond_half(checkpoint)
    return found


def _beyond_half(checkpoint: Checkpoint) -> Iterator[str]:
    for name in checkpoint.graph_weights.names:
        largest = float(checkpoint.graph_weights.read(name).abs().max())
        if largest > LARGEST_FP16:
            yield f"{name} reaches {largest:.3g}, float16 ends at {LARGEST_FP16:g}: use fp32"


# --- graphs


def _encoder(checkpoint: Checkpoint) -> Traceable:
    """``mel`` [1, n_mels, 3000] → ``encoder_states`` [1, 1500, D] and every decoder layer's cross-attention K and V."""
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    with torch.device("meta"):
        module = graph.EncodeWithCross(graph.encoder(checkpoint), graph.decoder(checkpoint))
    load_weights(module.encoder, "model.encoder.", checkpoint)
    load_weights(module.decoder, "model.decoder.", checkpoint, r"encoder_attn\.[kv]_proj")
    return Traceable(
        module=module,
        inputs={"mel": (1, dims.n_mels, 2 * dims.n_audio_ctx)},
        outputs={"encoder_states": (1, dims.n_audio_ctx, dims.d_model), **_keys_values("cross", dims.n_audio_ctx, dims)},
        float32=("mel",),
    )


def _stateless_step(checkpoint: Checkpoint) -> Traceable:
    """The step that returns its new K/V rows: the host writes them into the cache that it passes the next time."""
    import torch
    from torch import Tensor, nn

    from asr_core import graph

    dims = checkpoint.dims
    decoder = _decoder(checkpoint)

    class Step(nn.Module):
        """One token, int32 [1, 1], at ``position``, int32 [1]; cache rows from ``position`` on are not looked at."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, token: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
            past, cross = caches[: 2 * dims.decoder_layers], caches[2 * dims.decoder_layers :]
            mask = (torch.arange(dims.n_text_ctx) >= position).float() * graph.MASKED
            x = decoder.embed(token, position)
            new: list[Tensor] = []
            queries: list[Tensor] = []
            for i, layer in enumerate(decoder.blocks):
                attn, h = layer.self_attn, layer.self_attn_layer_norm(x)
                q, (k, v) = attn.query(h), attn.keys_values(h)
                scores = torch.cat([q @ past[2 * i].transpose(-1, -2) + mask, q @ k.transpose(-1, -2)], -1).softmax(-1)
                old, own = scores.split([dims.n_text_ctx, 1], -1)
                x = x + attn.output(old @ past[2 * i + 1] + own @ v)
                x, q = layer.cross_and_ffn(x, cross[2 * i], cross[2 * i + 1])
                queries.append(q)
                new += [k, v]
            return (_logits(decoder, x), decoder.choose_heads(queries, checkpoint.alignment_heads), *new)

    return Traceable(
        module=Step(),
        inputs={**_scalars(), **_keys_values("past", dims.n_text_ctx, dims), **_keys_values("cross", dims.n_audio_ctx, dims)},
        outputs={**_shown(checkpoint), **_keys_values("new", 1, dims)},
        integers=tuple(_scalars()),
        float32=tuple(_shown(checkpoint)),
    )


def _stateful_step(checkpoint: Checkpoint) -> Traceable:
    """The step whose cache lives in the runtime's states."""
    import torch
    from torch import Tensor, nn

    from asr_core import graph

    dims = checkpoint.dims
    decoder = _decoder(checkpoint)
    states = _keys_values("past", dims.n_text_ctx, dims)

    class Step(nn.Module):
        """One token, int32 [1, 1], at ``position``, int32 [1]; cache rows after it are not looked at."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder
            for name, shape in states.items():
                self.register_buffer(name, torch.zeros(shape))

        def forward(self, token: Tensor, position: Tensor, *cross: Tensor) -> tuple[Tensor, Tensor]:
            slots = torch.arange(dims.n_text_ctx)
            mask = (slots > position).float() * graph.MASKED
            x = decoder.embed(token, position)
            queries: list[Tensor] = []
            for i, layer in enumerate(decoder.blocks):
                attn, h = layer.self_attn, layer.self_attn_layer_norm(x)
                past = (getattr(self, f"past_k_{i}"), getattr(self, f"past_v_{i}"))
                k, v = (_remember(old, row, slots, position) for old, row in zip(past, attn.keys_values(h), strict=True))
                x = x + attn.output(graph.attend(attn.query(h), k, v, mask))
                x, q = layer.cross_and_ffn(x, cross[2 * i], cross[2 * i + 1])
                queries.append(q)
            return _logits(decoder, x), decoder.choose_heads(queries, checkpoint.alignment_heads)

    return Traceable(
        module=Step(),
        inputs={**_scalars(), **_keys_values("cross", dims.n_audio_ctx, dims)},
        outputs=_shown(checkpoint),
        states=states,
        integers=tuple(_scalars()),
        float32=tuple(_shown(checkpoint)),
    )


def _remember(past: torch.Tensor, row: torch.Tensor, slots: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Put a row [1, H, 1, E] into a state [1, H, 448, E] at ``position`` among ``slots``, 0 to 447.

    The state is written as a whole: the converter drops an assignment at an index without a word, and all that leads to it.
    """
    import torch

    past[:] = torch.where((slots == position)[:, None], row, past)
    return past


def _shown(checkpoint: Checkpoint) -> Ports:
    """What a step tells of its token: logits, and the queries of the alignment heads."""
    from asr_core import graph

    dims = checkpoint.dims
    queries = (1, len(checkpoint.alignment_heads), 1, dims.head_dim)
    return {"logits": (1, 1, dims.vocab), graph.ALIGNMENT_QUERIES: queries}


def _scalars() -> Ports:
    return {"token": (1, 1), "position": (1,)}


def _keys_values(what: str, rows: int, dims: Dims) -> Ports:
    """Names and shapes [1, H, rows, E] of the K and V of every layer."""
    shape = (1, dims.decoder_heads, rows, dims.head_dim)
    return {f"{what}_{kind}_{layer}": shape for layer in range(dims.decoder_layers) for kind in "kv"}


def _logits(decoder: Any, x: torch.Tensor) -> torch.Tensor:
    """The head as a linear layer over the embedding itself: transposed, it would be stored a second time."""
    from torch.nn import functional as F

    embedding = decoder.embed_tokens
    return F.linear(decoder.layer_norm(x), embedding.weight) * getattr(embedding, "sizes", 1)


def _decoder(checkpoint: Checkpoint) -> Any:
    """All of the decoder but the projections that the encoder's graph does."""
    import torch

    from asr_core import graph

    with torch.device("meta"):
        decoder = graph.decoder(checkpoint)
    return load_weights(decoder, "model.decoder.", checkpoint, r"(?!.*encoder_attn\.[kv]_proj)")


def load_weights(module: Any, prefix: str, checkpoint: Checkpoint, wanted: str = "") -> Any:
    """Give a module without storage the tensors below ``prefix`` whose names hold the pattern; only those are read.

    The others stay without storage: a graph that uses one cannot be converted.
    """
    names = [n for n in checkpoint.graph_weights.names if n.startswith(prefix) and re.search(wanted, n[len(prefix) :])]
    own = {name[len(prefix) :]: checkpoint.graph_weights.read(name).float() for name in names}
    module.load_state_dict(own, strict=False, assign=True)
    return module


def _set_sizes_apart(module: torch.nn.Module, palettes: Collection[str]) -> None:
    """Replace every loaded matrix by one whose rows all reach 1, and their sizes: one palette then fits many rows.

    Those of ``palettes`` have been given theirs already.

    A token's embedding and its row in the head stay one matrix. coremltools' own scales will not do: it takes them along the
    other axis, or multiplies the palettes out, which are then as large as the weights.
    """
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    class Linear(nn.Module):
        def __init__(self, original: nn.Linear) -> None:
            super().__init__()
            self.weight, self.sizes = apart(original.weight)
            self.bias = original.bias

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight) * self.sizes
            return y if self.bias is None else y + self.bias

    class Embedding(nn.Module):
        def __init__(self, original: nn.Embedding) -> None:
            super().__init__()
            self.weight, self.sizes = apart(original.weight)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.embedding(tokens, self.weight) * F.embedding(tokens, self.sizes[:, None])

    def apart(weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        sizes = weight.abs().amax(1)
        sizes[sizes == 0] = 1
        return nn.Parameter(weight / sizes[:, None]), nn.Parameter(sizes)

    with torch.no_grad():
        for path, child in list(module.named_modules()):
            kind = Linear if isinstance(child, nn.Linear) else Embedding if path.endswith("embed_tokens") else None
            if kind and not child.weight.is_meta and f"{path}.weight".replace(".", "_") not in palettes:
                module.set_submodule(path, kind(child))


# --- conversion


@contextmanager
def _clean_conversion(part: str) -> Iterator[None]:
    """Turn a converter's failure, and every warning that isn't known to be harmless, into an :class:`ExportError`."""
    said = _Remarks()
    logger = logging.getLogger("coremltools")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        logger.addHandler(said)
        propagate, logger.propagate = logger.propagate, False
        try:
            yield
        except (AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ExportError(f"Core ML's converter refused the {part}: {error}") from error
        finally:
            logger.propagate = propagate
            logger.removeHandler(said)
    remarks = [*said.lines, *(str(w.message) for w in warned if not issubclass(w.category, HOUSEKEEPING))]
    harmful = [line for line in dict.fromkeys(remarks) if not HARMLESS.search(line)]
    if harmful:
        raise ExportError(f"Core ML's converter warned about the {part}:\n" + "\n".join(f"  - {line}" for line in harmful))


class _Remarks(logging.Handler):
    """Keeps what is logged at warning level and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _convert(traceable: Traceable, weights: str, graph_weights: GraphWeights, *, stateful: bool) -> Any:
    import coremltools as ct
    import numpy as np
    import torch

    def tensor(name: str, shape: tuple[int, ...] | None = None) -> Any:
        return ct.TensorType(name, shape, dtype=np.dtype(traceable.dtype(name, weights)).type)

    module = traceable.module.eval().requires_grad_(requires_grad=False)
    example = tuple(
        torch.zeros(shape, dtype=torch.int32 if name in traceable.integers else torch.float32)
        for name, shape in traceable.inputs.items()
    )
    with torch.inference_mode():
        traced = torch.jit.trace(module, example, check_trace=False)
    pipeline = ct.PassPipeline.DEFAULT
    if weights == "int4":
        pipeline.append_pass(_integer_pass(graph_weights))
    return ct.convert(
        traced,
        convert_to="mlprogram",
        inputs=[tensor(name, shape) for name, shape in traceable.inputs.items()],
        outputs=[tensor(name) for name in traceable.outputs],  # their shapes follow from the graph
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=shape, dtype=np.float16), name=name)
            for name, shape in traceable.states.items()
        ],
        pass_pipeline=pipeline,
        minimum_deployment_target=ct.target.iOS18 if stateful or weights == "int4" else ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32 if weights == "fp32" else ct.precision.FLOAT16,
        skip_model_load=True,
    )


def _integer_pass(graph_weights: GraphWeights) -> str:
    """The id of a pass over a float16 program that stores every matrix of a linear layer, and the embedding, as integers.

    coremltools can only round by itself.
    """
    import numpy as np
    from coremltools.converters.mil.mil import Builder, types
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.helper import block_context_manager
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    matrices = {
        name.removeprefix("model.") + HALVED: name
        for name in graph_weights.names
        if len(graph_weights.shape(name)) == MATRIX and "embed_positions" not in name
    }

    @register_pass(namespace="common", override=True)
    class store_integers(AbstractGraphPass):  # type: ignore[misc]  # noqa: N801 - named as coremltools names its passes
        @block_context_manager  # type: ignore[untyped-decorator]
        def _store(self, block: Any) -> None:
            for op in [op for op in block.operations if op.op_type == "const" and op.name in matrices]:
                integers = stored(graph_weights, matrices[op.name])
                dtype = types.np_int4_dtype if integers.bits == FEW_BITS else np.int8
                weight = Builder.constexpr_blockwise_shift_scale(
                    data=integers.codes.numpy().astype(dtype),
                    scale=integers.scales.numpy().astype(np.float16),
                    name=f"{op.name}_integers",
                    before_op=op,
                )
                block.replace_uses_of_var_after_op(op, op.outputs[0], weight, no_check_var_types=True)
                block.remove_ops([op])

        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                self._store(function)

    return "common::store_integers"


def _check_states(model: Any, traceable: Traceable) -> None:
    """Raise :class:`ExportError` where a state is never written: its update was lost on the way."""
    (function,) = model.get_spec().mlProgram.functions.values()
    operations = function.block_specializations[function.opset].operations
    written = {op.inputs["input"].arguments[0].name for op in operations if op.type == "write_state"}
    lost = sorted(traceable.states.keys() - written)
    if lost:
        raise ExportError(f"Core ML's converter lost the updates of the states {', '.join(lost)}.")


def _compress(model: Any, weights: str, recorded: Mapping[str, int], *, grouped: bool) -> Any:
    """The model with weights of fewer bits; one palette a tensor, or one a group of channels where the runtime can do that."""
    import coremltools.optimize.coreml as cto

    if weights == "int8":
        row_scales = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=LEAST_COMPRESSED)
        return cto.linear_quantize_weights(model, _but_positions(model, cto.OptimizationConfig(global_config=row_scales)))
    if weights in PALETTE_BITS:
        palettes = _palettes(model, PALETTE_BITS[weights], recorded, grouped=grouped)
        return cto.palettize_weights(model, _but_positions(model, palettes))
    return model


def _but_positions(model: Any, config: Any) -> Any:
    """Leave the position embeddings as they are: they weigh little, and their error goes into every layer."""
    import coremltools.optimize.coreml as cto

    for name in cto.get_weights_metadata(model, weight_threshold=LEAST_COMPRESSED):
        if "embed_positions" in name:
            config.set_op_name(name, None)
    return config


def _palettes(model: Any, bits: int, recorded: Mapping[str, int], *, grouped: bool) -> Any:
    """How every weight shares palettes; those of ``recorded`` as :func:`_recorded_palettes` found them."""
    import coremltools.optimize.coreml as cto

    def palette(axis: int | None = None, bits: int = bits, group: int = GROUP) -> Any:
        sharing = {"granularity": "per_tensor"} if axis is None else {
            "granularity": "per_grouped_channel", "group_size": group, "channel_axis": axis
        }  # fmt: skip
        return cto.OpPalettizerConfig(
            mode="custom", lut_function=lambda values: cluster(values, bits), weight_threshold=LEAST_COMPRESSED, **sharing
        )

    def fitting(name: str, shape: tuple[int, ...]) -> Any:
        if len(shape) < MATRIX:
            return None  # sizes of rows
        if len(shape) > MATRIX:
            return palette(bits=STEM_BITS)
        count = recorded.get(name.removesuffix(HALVED))
        if count is None:
            return palette(_group_axis(shape))
        return palette() if count == 1 else palette(0, group=1)

    config = cto.OptimizationConfig(global_config=palette())
    if grouped:
        for name, weight in cto.get_weights_metadata(model, weight_threshold=LEAST_COMPRESSED).items():
            config.set_op_name(name, fitting(name, weight.val.shape))
    return config


def _group_axis(shape: tuple[int, ...]) -> int | None:
    return next((axis for axis in (0, 1) if shape[axis] % GROUP == 0), None)


def cluster(values: NDArray[np.float16], bits: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """The best palette of 2**bits values, and each value's index in it (flat): k-means in one dimension has an exact solution.

    float16 has so few values that counting them by their bits beats sorting; neighbours are counted together.
    """
    import numpy as np
    from coremltools._deps import kmeans1d

    bit_patterns = np.ascontiguousarray(values).view(np.uint16).ravel()
    each = np.bincount(bit_patterns, minlength=2**16)
    # Values that are a palette's already stay apart.
    together = 1 if np.count_nonzero(each) <= 2**bits else NEIGHBOURING
    each = each.reshape(-1, together)
    possible = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64).reshape(each.shape)
    counts, sums = each.sum(1), (np.where(each, possible, 0.0) * each).sum(1)
    present = np.flatnonzero(counts)
    found = kmeans1d.cluster(sums[present] / counts[present], 2**bits, weights=counts[present])
    palette = np.zeros(2**bits, np.float16)
    palette[: len(found.centroids)] = found.centroids
    index = np.zeros(len(counts), np.uint8)
    index[present] = found.clusters
    return palette, index[bit_patterns // together]


def _specs(graph: str, traceable: Traceable, weights: str) -> list[TensorSpec]:
    sides: list[tuple[Any, Ports]] = [("input", traceable.inputs), ("output", traceable.outputs)]
    return [
        TensorSpec(graph=graph, role=role, name=name, dtype=traceable.dtype(name, weights), shape=list(shape))
        for role, ports in sides
        for name, shape in ports.items()
    ]
