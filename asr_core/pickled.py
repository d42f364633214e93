"""Weights in PyTorch's pickle format: only tensors are taken out of them, never code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core import folder as layout
from asr_core.dims import EMBEDDING, HEAD
from asr_core.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    import torch


def load(path: Path) -> Any:
    """What a ``.pt`` or ``.bin`` file holds, tensors mapped from the file; raises :class:`CheckpointError`.

    A pickle may name any function to call. PyTorch's weights-only reader builds tensors and plain containers and refuses the
    rest before it runs.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "nsupported" not in str(error):
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path} holds more than tensors: loading it could run code of whoever made it. Nothing of it was run. "
            f"Ask for safetensors. ({_named(error)})"
        ) from error
    except Exception as error:  # a damaged archive fails wherever its reader happens to be
        raise _damaged(path, error) from error


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that holds nothing but tensors by name; raises :class:`CheckpointError`."""
    import torch

    loaded = load(path)
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} holds no weights (tensors by name).")
    return loaded


def to_safetensors(files: list[Path], folder: Path) -> None:
    """Write pickled weights, whole or sharded, as safetensors of the same tensors, one shard in memory at a time."""
    if len(files) == 1:
        save(tensors(files[0]), folder / layout.SINGLE)
        return
    places: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        places |= dict.fromkeys(save(tensors(file), folder / name), name)
    content = json.dumps({"metadata": {}, "weight_map": places}, indent=2)
    (folder / layout.INDEX).write_text(content + "\n", encoding="utf-8")


def save(weights: dict[str, torch.Tensor], file: Path) -> list[str]:
    """Write tensors as safetensors and return their names; a head that is the embedding itself is left out."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if HEAD in weights and EMBEDDING in weights and torch.equal(weights[HEAD], weights[EMBEDDING]):
        weights = {name: tensor for name, tensor in weights.items() if name != HEAD}
    seen: set[int] = set()
    whole = {}
    for name, tensor in weights.items():
        own = tensor.detach().contiguous()
        # safetensors refuses two names for one memory.
        whole[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    try:
        save_file(whole, str(file), metadata={"format": "pt"})
    except SafetensorError as error:  # its name for whatever the file system refused
        raise StorageError(f"{file} could not be written: {error}.") from error
    return list(whole)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a complete PyTorch file ({_named(error)}). Download or copy it again.")


def _named(error: Exception) -> str:
    """The telling line of a PyTorch error, which spreads over many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "nsupported" in line]
    return (telling or lines or [type(error).__name__])[0][:200]
