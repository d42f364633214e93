"""Tensors of safetensors files, read one at a time and checked against what a Whisper model has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core.dims import EMBEDDING, HEAD, Dims, expected_shapes
from asr_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# safetensors' names of the dtypes that weights may have, and torch's.
TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PRECISIONS = {"F32": "fp32", "F16": "fp16"}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: the file, its dtype's name, its shape, and its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Weights:
    """Tensors of one or more safetensors files, read one at a time; dtypes stay as stored.

    Plain reads, not a memory map: pages of a map count as resident memory, so an export would seem to need all weights.
    """

    def __init__(self, files: list[Path]) -> None:
        self._stored: dict[str, Stored] = {}
        for file in files:
            self._stored.update(_stored_tensors(file))

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._stored)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype, in memory of its own."""
        import torch

        stored = self._stored[name]
        tensor = torch.empty(stored.shape, dtype=getattr(torch, TORCH_DTYPES[stored.dtype]))
        with stored.file.open("rb") as stream:
            stream.seek(stored.offset)
            stream.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor

    def place(self, name: str) -> Stored:
        """Where a tensor lies."""
        return self._stored[name]

    @property
    def precision(self) -> str | None:
        """``fp32`` or ``fp16``, where all tensors are of one of them."""
        (dtype, *others) = {stored.dtype for stored in self._stored.values()}
        return None if others else PRECISIONS.get(dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._stored[name].shape

    def problems(self, dims: Dims) -> list[str]:
        """Missing, misshapen, unexpected or non-finite tensors, as sentences."""
        expected = expected_shapes(dims)
        found = set(self._stored) - {HEAD}
        problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - found)]
        problems += [f"tensor {name} is not part of a Whisper model" for name in sorted(found - expected.keys())]
        for name in sorted(found & expected.keys()):
            if self.shape(name) != expected[name]:
                problems.append(f"tensor {name} has shape {self.shape(name)}, the config says {expected[name]}")
        return problems + list(self._value_problems())

    def _value_problems(self) -> Iterator[str]:
        import torch

        for name in self.names:
            tensor = self.read(name)
            # The extremes tell as much as isfinite() does, without its temporaries of several times the tensor.
            if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                yield f"tensor {name} holds NaN or infinite values"
            if name == HEAD and EMBEDDING in self._stored and not tensor.equal(self.read(EMBEDDING)):
                yield f"{HEAD} differs from {EMBEDDING}: an untied head is not a Whisper model"


def header(file: Path) -> dict[str, Stored]:
    """Where a safetensors file's tensors lie: eight bytes of length, JSON, then the tensors' bytes.

    Raises :class:`CheckpointError` where it isn't whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np"):  # validates the header and that the file is as long as it says
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}). Download or copy it again.") from error
    entries.pop("__metadata__", None)
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _stored_tensors(file: Path) -> dict[str, Stored]:
    stored = header(file)
    other = sorted({tensor.dtype for tensor in stored.values()} - TORCH_DTYPES.keys())
    if other:
        raise CheckpointError(f"{file} holds tensors of type {', '.join(other)}; Whisper weights are floating point.")
    return stored
