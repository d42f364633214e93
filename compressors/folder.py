"""A compressed model as an ordinary checkpoint folder, with its record and side file, under its name only once it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from asr_core import build, compressed
from asr_core.checkpoint import Checkpoint
from asr_core.compressed import FormEntry, Record, Step
from asr_core.errors import StorageError, UsageError
from asr_core.folder import TOKENIZER_FILES
from compressors.model import Model


def check_free(folder: Path) -> None:
    """Raise :class:`UsageError` where something already has the folder's name: nothing is ever overwritten."""
    if folder.exists():
        raise UsageError(f"{folder} exists already. Choose another --out, or remove it.")


def write(
    folder: Path, source: Checkpoint, model: Model, steps: list[Step], seen: list[str], kl: float | None
) -> tuple[Checkpoint, Record]:
    """Write the folder; returns it opened, with every tensor checked against the config, and its record.

    ``source`` is what was compressed by ``steps``; ``seen`` and ``kl`` are as in :class:`Record`. Raises :class:`UsageError`
    where the folder exists, :class:`StorageError` where it cannot be written; nothing is left behind then.
    """
    check_free(folder)
    partial = folder.absolute().with_name(f".{folder.name}{build.PARTIAL}{os.getpid()}")
    try:
        build.clean(folder)
        partial.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder.parent}: {error.strerror}.") from error
    try:
        record = _fill(partial, source, model, _record(source, model, steps, seen, kl))
        Checkpoint.open(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Checkpoint.open(folder), record


def _record(source: Checkpoint, model: Model, steps: list[Step], seen: list[str], kl: float | None) -> Record:
    """The record of the whole chain, without the side file."""
    before = compressed.read(source.path)
    return Record(
        parent=before.parent if before else source.name,
        parent_fingerprint=before.parent_fingerprint if before else source.fingerprint,
        chain=[*(before.chain if before else []), *steps],
        calibration=seen,
        kl=kl,
        before=before.before if before else Model.open(source).size,
        after=model.size,
        forms={name: FormEntry(parts=sorted(form.parts), bits=form.bits) for name, form in model.forms.items()},
    )


def _fill(folder: Path, source: Checkpoint, model: Model, record: Record) -> Record:
    """Write every file; returns the record as written."""
    for name in TOKENIZER_FILES:
        if (source.path / name).exists():
            shutil.copyfile(source.path / name, folder / name)
    _write_json(folder / "config.json", model.config | {"dtype": "float32"})
    _write_json(folder / "generation_config.json", model.generation)
    save_file(_contiguous(model.tensors), folder / "model.safetensors", metadata={"format": "pt"})
    side = {f"{weight}/{part}": tensor for weight, form in model.forms.items() for part, tensor in form.parts.items()}
    if side:
        save_file(_contiguous(side), folder / compressed.SIDE)
        record = record.model_copy(update={"side_file": compressed.SIDE, "side_sha256": _sha256(folder / compressed.SIDE)})
    (folder / compressed.RECORD).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return record


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with memory of their own, as safetensors wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
