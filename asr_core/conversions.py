"""The cache of converted checkpoints: a source that is no complete checkpoint folder becomes one here, once.

A conversion is named after everything that decides its bytes, written beside its place and renamed when it is whole; sources
are never changed. Deleting the cache costs nothing but the time to convert again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from asr_core import processes
from asr_core.errors import StorageError

CACHE_VARIABLE = "ASR_EXPORT_CACHE"
REMARKS = "remarks.json"
# The converting code: other code, another conversion.
SOURCES = ("adapters.py", "completion.py", "generation.py", "openai_pt.py", "pickled.py", "vocabulary.py")
PARTIAL = ".partial-"


def cache_root() -> Path:
    """Where conversions are kept: ``$ASR_EXPORT_CACHE``, else ``asr-export`` in the user's cache folder."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "asr-export"


def converted(name: str, inputs: Mapping[str, Any], write: Callable[[Path], list[str]]) -> tuple[Path, tuple[str, ...]]:
    """The folder that ``write`` makes of ``inputs`` (JSON-able), from the cache where it is there, and its remarks.

    ``write`` fills an empty folder and returns what a user should know about it.
    """
    code = [hashlib.sha256((Path(__file__).parent / source).read_bytes()).hexdigest() for source in SOURCES]
    key = hashlib.sha256(json.dumps([inputs, code], sort_keys=True).encode()).hexdigest()
    final = cache_root() / "checkpoints" / f"{name}-{key[:16]}"
    if not (final / REMARKS).exists():
        shutil.rmtree(final, ignore_errors=True)  # somebody's half-removed copy
        _make(final, write)
    remarks = json.loads((final / REMARKS).read_text(encoding="utf-8"))
    return final, tuple(remarks)


def _make(final: Path, write: Callable[[Path], list[str]]) -> None:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clean(final.parent)
        partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{os.getpid()}-", dir=final.parent))
    except OSError as error:
        message = f"cannot write converted checkpoints to {final.parent}: {error.strerror}. Set {CACHE_VARIABLE} to a folder."
        raise StorageError(message) from error
    try:
        remarks = write(partial)
        (partial / REMARKS).write_text(json.dumps(remarks, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp's folders are their owner's alone
        try:
            partial.rename(final)
        except OSError:
            if not (final / REMARKS).exists():  # else another process has just made the same one
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what killed conversions left behind."""
    for left in folder.glob(f"{PARTIAL}*-*"):
        if not processes.alive(int(left.name.removeprefix(PARTIAL).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
