"""The files of a checkpoint folder, in the hub's layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from asr_core.errors import CheckpointError

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
CONFIG_FILES = (CONFIG, GENERATION)
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (SINGLE, INDEX, "model-*.safetensors")
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_FILES = (PICKLE, PICKLE_INDEX, "pytorch_model-*.bin")
ADAPTER_CONFIG = "adapter_config.json"
# What compressing leaves beside the weights: its record and the compact forms.
COMPRESSION_FILES = ("compression.json", "compression.safetensors")
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, one or sharded; raises :class:`CheckpointError` where there are none."""
    found = _parts(path, SINGLE, INDEX)
    if not found:
        raise CheckpointError(f"{path} holds no {SINGLE}. Point --model at a complete checkpoint folder.")
    return found


def pickle_files(path: Path) -> list[Path]:
    """The ``.bin`` files of a folder that has no safetensors, one or sharded; empty where they are not needed."""
    return [] if _parts(path, SINGLE, INDEX) else _parts(path, PICKLE, PICKLE_INDEX)


def small_files(path: Path) -> list[Path]:
    """Config and tokenizer files that a folder has."""
    return [path / name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (path / name).exists()]


def compression_files(path: Path) -> list[Path]:
    """Record and compact forms of a compressed checkpoint; none of others."""
    return [path / name for name in COMPRESSION_FILES if (path / name).exists()]


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the names and the bytes of files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; raises :class:`CheckpointError`."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}: not a Whisper checkpoint folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return loaded


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as the hub's files are written."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _parts(path: Path, single: str, index: str) -> list[Path]:
    if (path / index).exists():
        names = sorted(set(read_json(path / index).get("weight_map", {}).values()))
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise CheckpointError(f"{path}: the shards {', '.join(missing)} named in {index} are missing.")
        return [path / name for name in names]
    return [path / single] if (path / single).exists() else []
