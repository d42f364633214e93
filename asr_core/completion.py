"""Complete a Hugging Face folder that older tools or fine-tuning left without a file that every export needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asr_core import conversions, generation, pickled
from asr_core import folder as layout
from asr_core.errors import CheckpointError
from asr_core.tokens import load_tokenizer

SLOW_TOKENIZER = ("vocab.json", "merges.txt")


def complete(path: Path, config: dict[str, Any]) -> tuple[Path, tuple[str, ...]]:
    """The folder itself where nothing is missing, else a complete one in the cache, and remarks on what was done.

    Pickled weights become safetensors, a slow tokenizer's files ``tokenizer.json``, lost generation settings are rebuilt; all
    else is linked. What can't be made is left for :class:`~asr_core.checkpoint.Checkpoint` to list.
    """
    pickles = layout.pickle_files(path)
    slow = not (path / layout.TOKENIZER).exists() and all((path / name).exists() for name in SLOW_TOKENIZER)
    if not pickles and not slow and not _lost_settings(path, config):
        return path, ()
    files = [*layout.small_files(path), *(pickles or layout.weight_files(path)), *layout.compression_files(path)]
    inputs = {"folder": str(path), "files": layout.fingerprint(files)}

    def write(folder: Path) -> list[str]:
        _link(path, folder)
        remarks = []
        if pickles:
            pickled.to_safetensors(pickles, folder)
            remarks.append(f"{pickles[0].name} converted to safetensors")
        if slow:
            _write_fast_tokenizer(path, folder)
            remarks.append(f"{layout.TOKENIZER} made from {' and '.join(SLOW_TOKENIZER)}")
        return remarks + _write_generation(folder, config)

    return conversions.converted(path.name, inputs, write)


def _lost_settings(path: Path, config: dict[str, Any]) -> bool:
    if not (path / layout.TOKENIZER).exists():
        return False
    found = _generation(path)
    return generation.complete(found, config, load_tokenizer(path))[0] != found


def _generation(path: Path) -> dict[str, Any]:
    return layout.read_json(path / layout.GENERATION) if (path / layout.GENERATION).exists() else {}


def _link(path: Path, folder: Path) -> None:
    """Link what the folder has into the new one: gigabytes need no second copy."""
    weights = [file for pattern in layout.WEIGHT_FILES for file in path.glob(pattern)]
    for file in [*layout.small_files(path), *weights, *layout.compression_files(path)]:
        (folder / file.name).symlink_to(file.resolve())


def _write_fast_tokenizer(path: Path, folder: Path) -> None:
    from transformers.models.whisper.tokenization_whisper import WhisperTokenizer

    try:
        tokenizer = WhisperTokenizer.from_pretrained(path, local_files_only=True)
        tokenizer.backend_tokenizer.save(str(folder / layout.TOKENIZER))
    except Exception as error:  # transformers passes on whatever its parsers raise
        raise CheckpointError(f"{path}: no {layout.TOKENIZER} can be made of {', '.join(SLOW_TOKENIZER)} ({error}).") from error


def _write_generation(folder: Path, config: dict[str, Any]) -> list[str]:
    if not (folder / layout.TOKENIZER).exists():
        return []
    found = _generation(folder)
    whole, remarks = generation.complete(found, config, load_tokenizer(folder))
    if whole != found:
        (folder / layout.GENERATION).unlink(missing_ok=True)  # a link: its target belongs to the user
        layout.write_json(folder / layout.GENERATION, whole)
    return remarks
