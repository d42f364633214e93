"""What ``asr-compress`` leaves beside the weights: ``compression.json`` and its side file, for whoever ships compact forms.

The weights themselves are ordinary: the dense tensors of a compressed checkpoint are what its compact forms stand for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from asr_core.dims import Frozen
from asr_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

RECORD = "compression.json"
SIDE = "compression.safetensors"
# The tensors that a compact form of a weight [N, K] can have; in the side file each is named `<weight>/<part>`.
PARTS = {
    "codes": "int8 [N, K]: the weight is codes · scales",
    "scales": "float32 [1, 1], [N, 1] or [N, K / group]: one for the tensor, for each row, or for each group of a row",
    "mask": "bool [N, K]: where the weight may differ from zero",
    "kept_rows": "int64 [n]: the rows that may differ from zero; the others, and their biases, are zero",
    "kept_columns": "int64 [k]: the columns that may differ from zero",
    "left": "float32 [N, R]: the weight is left @ right",
    "right": "float32 [R, K]",
    "left_codes": "int8 [N, R]: left is left_codes · left_scales",
    "left_scales": "float32, as scales, of left",
    "right_codes": "int8 [R, K]: right is right_codes · right_scales",
    "right_scales": "float32, as scales, of right",
    "centroids": "float32 [1, C] or [N, C]: of the tensor, or of each row",
    "indices": "uint8 [N, K]: the weight is centroids[row, indices]",
}


class Effect(Frozen):
    """What one step did to one tensor.

    ``relative_error`` is the Frobenius norm of the change over that of the weight before the step; ``output_error`` the same
    of the layer's outputs on the calibration data, None where the step used none. ``zeros`` is the share of zero weights and
    ``bytes`` what the tensor takes up in its compact form, its scales and centroids included. A tensor that became
    smaller has no errors: there is nothing of the same shape to compare.
    """

    tensor: str
    shape: list[int]
    bits: float
    bytes: int
    zeros: float
    rank: int | None = None
    relative_error: float | None = None
    output_error: float | None = None


class Step(Frozen):
    """One method's run: its parameters in full and its effect on each tensor.

    ``parent`` is the fingerprint of the checkpoint that the run began with; the steps of one recipe share it.
    """

    method: str
    parameters: dict[str, Any]
    parent: str
    effects: list[Effect]


class Size(Frozen):
    """Parameters, and bytes in compact form; the token embedding, which is the head too, apart from all the rest."""

    body_parameters: int
    body_bytes: int
    embedding_parameters: int
    embedding_bytes: int

    @property
    def total_bytes(self) -> int:
        """Body and embedding."""
        return self.body_bytes + self.embedding_bytes


class FormEntry(Frozen):
    """The parts that a weight's compact form has in the side file; ``bits`` a code where there are codes."""

    parts: list[str]
    bits: int | None = None


class Record(Frozen):
    """``compression.json``: how a checkpoint came about from another.

    ``parent`` and ``parent_fingerprint`` name the checkpoint that the first step was given; ``before`` is its size.
    ``calibration`` lists the clips that any step has seen, by the SHA-256 of their samples, so that nobody judges on them.
    ``kl`` is the mean KL divergence to what the last run began with, in nats a token on clips that no step has seen; None where
    there were none.
    """

    schema_version: int = 1
    parent: str
    parent_fingerprint: str
    chain: list[Step]
    calibration: list[str]
    kl: float | None
    before: Size
    after: Size
    forms: dict[str, FormEntry]
    side_file: str | None = None
    side_sha256: str | None = None


def read(folder: Path) -> Record | None:
    """The record of a checkpoint folder, None where nobody compressed it; raises :class:`CheckpointError` where it is damaged."""
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        return Record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged ({error.error_count()} faults). Compress again.") from error


def read_form(folder: Path, record: Record, weight: str) -> dict[str, torch.Tensor]:
    """The parts of a weight's compact form, by part; raises :class:`CheckpointError` where the side file lacks one."""
    from safetensors import SafetensorError, safe_open

    file = folder / (record.side_file or SIDE)
    try:
        with safe_open(str(file), framework="pt") as side:
            return {part: side.get_tensor(f"{weight}/{part}") for part in record.forms[weight].parts}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is missing or damaged ({error}). Copy the whole folder again, or compress again."
        ) from error
