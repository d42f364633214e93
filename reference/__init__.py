"""The carried Whisper: a small trained checkpoint, its clips and the recipe that made them."""

from pathlib import Path

__all__ = ["checkpoint_path", "manifest_path"]

_ROOT = Path(__file__).resolve().parent


def checkpoint_path() -> Path:
    """Return the folder of the trained checkpoint, in the hub's file layout."""
    return _ROOT / "checkpoint"


def manifest_path() -> Path:
    """Return the NeMo manifest of the carried clips; its audio paths are relative to it."""
    return _ROOT / "clips" / "manifest.jsonl"
