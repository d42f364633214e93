"""Our ONNX graphs over the checkpoint's own weights: the .onnx files point into its safetensors, which lie beside them.

ONNX Runtime refuses symbolic links, absolute paths, and paths out of the folder. So the safetensors are hard links: files that
the artifact and the checkpoint own together, without a second copy. Nothing writes to them.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import TYPE_CHECKING

from asr_core.artifact import TensorSpec
from asr_core.capacity import Cost
from asr_core.errors import ExportError, StorageError
from asr_core.folder import weight_files
from asr_core.isolate import Progress
from exporters.onnx import clean, draft, graphs, list_ports, quiet

if TYPE_CHECKING:
    import onnx_ir as ir

    from asr_core.checkpoint import Checkpoint
    from asr_core.weights import Weights

PRECISIONS = ("fp32", "fp16")  # whichever the checkpoint is stored in
CARRIES: dict[str, tuple[str, ...]] = {}
COST = dict.fromkeys(PRECISIONS, Cost(750, 0.1, 0))


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Write ``encoder.onnx`` and ``decoder.onnx`` and link the weights; returns the graphs' inputs and outputs.

    Raises :class:`ExportError` where the weights are not stored as the graphs need them, :class:`StorageError` where they cannot
    be linked.
    """
    import onnx_ir as ir

    _check(checkpoint, precision)
    for file in weight_files(checkpoint.path):
        _link(file, folder / file.name)
    specs: list[TensorSpec] = []
    for name, describe in graphs().items():
        progress(f"{name} graph")
        model = draft(describe, checkpoint, precision, name, as_stored=True)
        with quiet():
            clean(model)
            _point(model.graph, checkpoint.weights)
            ir.save(model, folder / f"{name}.onnx")
        specs += list_ports(name, model)
        del model
        gc.collect()
    return specs


def _check(checkpoint: Checkpoint, precision: str) -> None:
    weights, wanted = checkpoint.weights, checkpoint.graph_weights
    if weights.precision != precision:
        stored = weights.precision or "neither float32 nor float16 throughout"
        raise ExportError(
            f"the weights of {checkpoint.name} are {stored}: linked, they can't be {precision}. Export without --link."
        )
    plain = set(weights.names)
    other = [name for name in wanted.names if name not in plain or wanted.shape(name) != weights.shape(name)]
    if other:
        raise ExportError(f"{checkpoint.name} is compressed ({other[0]} is not stored as such). Export without --link.")


def _link(file: Path, beside: Path) -> None:
    try:
        beside.hardlink_to(file.resolve())  # in the hub's cache, files are symbolic links
    except OSError as error:
        raise StorageError(
            f"cannot link {file} into {beside.parent.parent}: {error.strerror}. --link needs both on one file system that has "
            "hard links, and files of your own: give such a folder with --out, or export without --link."
        ) from error


def _point(graph: ir.Graph, weights: Weights) -> None:
    """Let every weight be the checkpoint's, by file and place."""
    import onnx_ir as ir

    for value in graph.initializers.values():
        place = weights.place(f"model.{value.name}")
        size = int(math.prod(place.shape) * value.dtype.itemsize)  # of a type of few bits, an item is a part of a byte
        value.const_value = ir.ExternalTensor(
            place.file.name, place.offset, size, value.dtype, shape=value.shape, name=value.name
        )
