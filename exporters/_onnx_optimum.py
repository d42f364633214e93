"""ONNX as Optimum and transformers.js load it: ``onnx/encoder_model.onnx`` and ``onnx/decoder_model_merged.onnx``.

The merged decoder holds its body once. ``use_cache_branch`` chooses only where the cross-attention's keys and values come from,
projected or passed, and cuts the past to nothing in the first pass, whose callers must pass one all the same. The names, their
order (by position, clients zip them with their caches) and the suffixes of precisions are Optimum's and transformers.js' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core.artifact import TensorSpec
from asr_core.checkpoint import Checkpoint
from asr_core.folder import small_files
from asr_core.isolate import Progress
from exporters import onnx
from exporters.onnx import Shape, Traceable, draft, ship

if TYPE_CHECKING:
    import onnx_ir as ir

    from asr_core.dims import Dims

SUFFIX = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
PRECISIONS = tuple(SUFFIX)
CARRIES = {precision: onnx.CARRIES[precision] for precision in PRECISIONS}
DATA = "_data"  # the ending of the weights' file that transformers.js looks for


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Write the two graphs below ``onnx/`` and the configuration beside it; returns their inputs and outputs."""
    (folder / "onnx").mkdir()
    specs: list[TensorSpec] = []
    graphs = (("encoder_model", _encoder(checkpoint, precision)), ("decoder_model_merged", _merged(checkpoint, precision)))
    for name, model in graphs:
        progress(name)
        specs += ship(model, name, folder / "onnx" / f"{name}{SUFFIX[precision]}.onnx", DATA)
    _write_configuration(checkpoint, folder)
    return specs


def _write_configuration(checkpoint: Checkpoint, folder: Path) -> None:
    for file in small_files(checkpoint.path):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Weights lie in files of their own, which transformers.js looks for only when told.
    config["transformers.js_config"] = {"use_external_data_format": True, "kv_cache_dtype": {"fp16": "float16"}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _encoder(checkpoint: Checkpoint, precision: str) -> ir.Model:
    def describe(checkpoint: Checkpoint) -> Traceable:
        import torch
        from torch import Tensor, nn

        from asr_core import graph

        dims = checkpoint.dims

        class Encode(nn.Module):
            """The encoder under the name that its weights go by."""

            def __init__(self) -> None:
                super().__init__()
                self.encoder = graph.encoder(checkpoint)

            def forward(self, mel: Tensor) -> Tensor:
                states: Tensor = self.encoder(mel)
                return states

        return Traceable(
            module=Encode(),
            arguments=(torch.zeros(2, dims.n_mels, 2 * dims.n_audio_ctx),),
            axes=({0: torch.export.Dim("batch", min=1)},),
            inputs={"input_features": ("batch_size", dims.n_mels, 2 * dims.n_audio_ctx)},
            outputs={"last_hidden_state": ("batch_size", dims.n_audio_ctx, dims.d_model)},
        )

    return draft(describe, checkpoint, precision, "encoder")


def _merged(checkpoint: Checkpoint, precision: str) -> ir.Model:
    """The decoder's body, its cross-attention K/V out of an ``If`` that holds the graph which projects them."""
    import onnx_ir as ir

    model = draft(_body, checkpoint, precision, "decoder")
    projection = draft(_projection, checkpoint, precision, "encoder").graph
    graph, tensors = model.graph, 2 * checkpoint.dims.decoder_layers
    tokens, *caches = graph.inputs
    past, cross = caches[:tensors], caches[tensors:]
    branch = ir.Value(name="use_cache_branch", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    _cut(graph, past, branch)
    logits, *present = graph.outputs
    chosen = _choose(graph, cross, projection, branch)
    (states,) = projection.inputs
    projection.inputs.clear()
    graph.inputs[:] = [tokens, states, *_by_layer(past, cross), branch]
    graph.outputs[:] = [logits, *_by_layer(present, chosen)]
    return model


def _body(checkpoint: Checkpoint) -> Traceable:
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    batch, new = (torch.export.Dim(name, min=1) for name in ("batch", "new"))
    past = torch.export.Dim("past", min=0, max=dims.n_text_ctx - 1)
    tensors = 2 * dims.decoder_layers
    heads, width = dims.decoder_heads, dims.head_dim
    return Traceable(
        module=graph.GrowingStep(graph.decoder(checkpoint)),
        arguments=(
            torch.zeros(2, 3, dtype=torch.int64),
            [torch.zeros(2, heads, 5, width) for _ in range(tensors)],
            [torch.zeros(2, heads, dims.n_audio_ctx, width) for _ in range(tensors)],
        ),
        axes=({0: batch, 1: new}, [{0: batch, 2: past}] * tensors, [{0: batch}] * tensors),
        inputs={
            "input_ids": ("batch_size", "decoder_sequence_length"),
            **_caches("past_key_values", "decoder", "past_decoder_sequence_length", dims),
            # Symbolic, as in Optimum's: the first pass is called with none of them.
            **_caches("past_key_values", "encoder", "encoder_sequence_length_out", dims),
        },
        outputs={
            "logits": ("batch_size", "decoder_sequence_length", dims.vocab),
            **_caches("present", "decoder", "past_decoder_sequence_length + decoder_sequence_length", dims),
        },
    )


def _projection(checkpoint: Checkpoint) -> Traceable:
    import torch

    from asr_core import graph

    dims = checkpoint.dims
    return Traceable(
        module=graph.CrossKeysValues(graph.decoder(checkpoint)),
        arguments=(torch.zeros(2, dims.n_audio_ctx, dims.d_model),),
        axes=({0: torch.export.Dim("batch", min=1)},),
        inputs={"encoder_hidden_states": ("batch_size", dims.n_audio_ctx, dims.d_model)},
        outputs=_caches("present", "encoder", dims.n_audio_ctx, dims),
    )


def _caches(what: str, side: str, rows: int | str, dims: Dims) -> dict[str, Shape]:
    """Names and shapes [B, H, rows, E] of the K and V of every layer."""
    shape = ("batch_size", dims.decoder_heads, rows, dims.head_dim)
    return {f"{what}.{layer}.{side}.{kind}": shape for layer in range(dims.decoder_layers) for kind in ("key", "value")}


def _by_layer(own: Sequence[ir.Value], cross: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """[k0, v0, k1, …] of both attentions → per layer decoder.key, decoder.value, encoder.key, encoder.value."""
    for i in range(0, len(own), 2):
        yield from (*own[i : i + 2], *cross[i : i + 2])


def _cut(graph: ir.Graph, past: Sequence[ir.Value], branch: ir.Value) -> None:
    """Let the body read nothing of the past where ``branch`` is false."""
    import onnx_ir as ir

    first = graph[0]
    readers = [list(value.uses()) for value in past]

    def insert(op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        graph.insert_before(first, node)
        return node.outputs[0]

    rows = insert("Shape", [past[0]], start=2, end=3)
    end = insert("Mul", [rows, insert("Cast", [branch], to=ir.DataType.INT64)])
    begin, axis = (insert("Constant", [], value_ints=[number]) for number in (0, 2))
    for value, uses in zip(past, readers, strict=True):
        kept = insert("Slice", [value, begin, end, axis])
        for node, index in uses:
            node.replace_input_with(index, kept)


def _choose(graph: ir.Graph, passed: Sequence[ir.Value], projection: ir.Graph, branch: ir.Value) -> list[ir.Value]:
    """Let the body read what was ``passed`` where ``branch`` is true, else what the projection makes, which moves into an If."""
    import onnx_ir as ir

    names = [value.name for value in projection.outputs]
    for value in [value for value in graph.initializers.values() if not value.uses()]:
        del graph.initializers[value.name]
    for value in list(projection.initializers.values()):
        del projection.initializers[value.name]
        graph.register_initializer(value)
    made, nodes = list(projection.outputs), list(projection)
    projection.outputs.clear()
    projection.remove(nodes)
    same = [ir.node("Identity", [value]) for value in passed]
    for index, value in enumerate(output for node in (*same, *nodes) for output in node.outputs):
        value.name = f"branch_{index}"  # another than any in the graph around it
    uses = [[(node, index) for node, index in value.uses() if node not in same] for value in passed]
    branches = {
        "then_branch": ir.Graph([], [node.outputs[0] for node in same], nodes=same, name="passed"),
        "else_branch": ir.Graph([], made, nodes=nodes, name="projected"),
    }
    chosen = ir.node("If", [branch], branches, num_outputs=len(passed))
    graph.insert_before(graph[0], chosen)
    for output, name, value, readers in zip(chosen.outputs, names, passed, uses, strict=True):
        output.name, output.shape, output.type = name, value.shape, value.type
        for node, index in readers:
            node.replace_input_with(index, output)
    return list(chosen.outputs)
