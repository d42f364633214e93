"""What ``asr-compress`` leaves beside the weights: ``compression.json`` and its side file, for whoever ships compact forms.

The weights themselves are ordinary: the dense tensors of a compressed checkpoint are what its compact forms stand for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from asr_core import folder as layout
from asr_core.dims import Frozen
from asr_core.errors import CheckpointError
from asr_core.weights import header

if TYPE_CHECKING:
    import torch

    from asr_core.weights import Weights

RECORD, SIDE = layout.COMPRESSION_FILES
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
    "input_scale": "float32 [1]: of the layer's inputs, which are (q - zero) · scale with q of 8 bits",
    "input_zero": "uint8 [1]: zero",
}
# safetensors' names of the types above.
DTYPES = {"float32": "F32", "int8": "I8", "uint8": "U8", "int64": "I64", "bool": "BOOL"}
# Parts that are nothing without each other.
TOGETHER = (
    {"codes", "scales"},
    {"left", "right"},
    {"left_codes", "left_scales", "right_codes", "right_scales"},
    {"centroids", "indices"},
    {"input_scale", "input_zero"},
)
MATRIX = 2  # axes
# Of the largest weight: products are summed in another order, and weights may have been saved as float16 since.
ROUNDING = 1e-3


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


class Forms:
    """The compact forms of a checkpoint's weights; parts are read from the side file when they are asked for.

    Empty where nobody compressed the checkpoint. ``problems`` are of files that don't fit together, as sentences.
    """

    def __init__(self, folder: Path, weights: Weights) -> None:
        self._weights = weights
        self._record = read(folder)
        self._entries = self._record.forms if self._record else {}
        self._file = folder / ((self._record and self._record.side_file) or SIDE)
        self._stored = header(self._file) if self._entries or self._file.exists() else {}

    @property
    def names(self) -> list[str]:
        """The weights that have a form, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        """Whether a weight has a form."""
        return name in self._entries

    def parts(self, name: str) -> frozenset[str]:
        """The parts of a weight's form; none where it has no form."""
        return frozenset(self._entries[name].parts) if name in self else frozenset()

    def bits(self, name: str) -> int | None:
        """The bits of a code."""
        return self._entries[name].bits

    def shape(self, name: str, part: str) -> tuple[int, ...]:
        """A part's shape, without reading it."""
        return self._stored[f"{name}/{part}"].shape

    def rank(self, name: str) -> int | None:
        """The rank of a factored weight, None for others."""
        inner = next(iter(self.parts(name) & {"right", "right_codes"}), None)
        return self.shape(name, inner)[0] if inner else None

    def part(self, name: str, part: str) -> torch.Tensor:
        """One part of a weight's form."""
        tensor: torch.Tensor = self._get(name, part, "pt")
        return tensor

    def places(self, name: str, part: str) -> list[int]:
        """The kept rows or columns, read without torch, whose fake tensors would not have values."""
        found: list[int] = self._get(name, part, "np").tolist()
        return found

    def _get(self, name: str, part: str, framework: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self._file), framework=framework) as side:
                return side.get_tensor(f"{name}/{part}")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self._file} is missing or damaged ({error}). Copy the whole folder again, or compress again."
            ) from error

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """All parts of a weight's form; raises :class:`CheckpointError` where the weight is not what they stand for."""
        parts = {part: self.part(name, part) for part in sorted(self.parts(name))}
        weight = self._weights.read(name).float()
        # In place, and extremes instead of magnitudes: an embedding is large.
        apart, largest = (
            max(-float(low), float(high)) for low, high in (_meant(parts, weight).sub_(weight).aminmax(), weight.aminmax())
        )
        if not apart <= ROUNDING * largest:
            raise CheckpointError(
                f"{self._file}: the form of {name} ({', '.join(parts)}) does not stand for its weights, which were changed "
                f"since. Compress again; or remove {RECORD} and {SIDE}, and it is a checkpoint like any other."
            )
        return parts

    def problems(self) -> list[str]:
        """What does not fit together: record, side file and weights."""
        if self._record is None:
            return [f"{self._file.name} has no {RECORD} that says what it is"] if self._stored else []
        expected = {f"{name}/{part}" for name, entry in self._entries.items() for part in entry.parts}
        found = set(self._stored)
        problems = [f"{self._file.name} lacks {key}" for key in sorted(expected - found)]
        problems += [f"{self._file.name} holds {key}, which {RECORD} does not know" for key in sorted(found - expected)]
        problems += [f"{RECORD} has a form of {name}, which is no tensor" for name in sorted(self._strange())]
        if problems:
            return problems
        problems = [fault for name in self.names for fault in self._faults(name)]
        if self._stored and self._digest() != self._record.side_sha256:
            problems.append(f"{self._file.name} was altered since it was written (checksum differs)")
        return problems

    def _strange(self) -> set[str]:
        return self._entries.keys() - set(self._weights.names)

    def _faults(self, name: str) -> Iterator[str]:
        """Unknown parts, parts without the others that they need, wrong shapes and types."""
        parts, weight = self.parts(name), self._weights.shape(name)
        if len(weight) != MATRIX:
            yield f"{RECORD} has a form of {name}, which is no matrix"
            return
        lost = sorted({part for group in TOGETHER if parts & group for part in group - parts})
        strange = sorted(parts - PARTS.keys())
        yield from (f"the form of {name} has an unknown part, {part}" for part in strange)
        yield from (f"the form of {name} lacks {part}" for part in lost)
        for part in [] if lost else sorted(parts - set(strange)):
            stored, wanted = self._stored[f"{name}/{part}"], PARTS[part].partition(":")[0]
            if stored.dtype != DTYPES[re.split(r"\W", wanted)[0]] or not self._fits(name, part, weight):
                yield f"{self._file.name}: {name}/{part} is {stored.dtype} {list(stored.shape)}, not {wanted}"

    def _fits(self, name: str, part: str, weight: tuple[int, ...]) -> bool:
        """Whether a part has the shape that its weight [N, K] gives it."""
        n, k = weight
        rank = self.rank(name)
        if part.startswith("left") and rank:
            k = rank
        elif part.startswith("right") and rank:
            n = rank
        shape = self.shape(name, part)
        if part.startswith("input"):
            return shape == (1,)
        if part.startswith("kept"):
            return len(shape) == 1 and 0 < shape[0] <= (n if part == "kept_rows" else k)
        if len(shape) != MATRIX:
            return False
        if part == "centroids":
            return shape[0] in (1, n)
        if part.endswith("scales"):
            return shape == (1, 1) or (shape[0] == n and k % shape[1] == 0)
        return shape == (n, k)

    def _digest(self) -> str:
        with self._file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def _meant(parts: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """What a form says of a weight: its values, with zeros where they must be."""
    if "left_codes" in parts or "left" in parts:
        meant = factor(parts, "left") @ factor(parts, "right")
    elif "codes" in parts:
        meant = scaled(parts["codes"], parts["scales"])
    elif "centroids" in parts:
        centroids, indices = parts["centroids"], parts["indices"].long()
        meant = centroids.expand(len(indices), -1).gather(1, indices)
    else:
        meant = weight.clone()
    if "mask" in parts:
        meant = meant * parts["mask"]
    for axis, part in enumerate(("kept_rows", "kept_columns")):
        if part in parts:
            kept = meant.new_zeros(meant.shape[axis])
            kept[parts[part]] = 1
            meant = meant * kept.unflatten(0, (-1, 1) if axis == 0 else (1, -1))
    return meant


def factor(parts: Mapping[str, torch.Tensor], side: str) -> torch.Tensor:
    """The ``left`` or ``right`` factor of a form."""
    return parts[side] if side in parts else scaled(parts[f"{side}_codes"], parts[f"{side}_scales"])


def scaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] times their scales [·, G], as float32 [N, K]."""
    return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
