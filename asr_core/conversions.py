"""The cache: what is made once and used often, as checkpoint folders of sources that are none, or traced graphs.

A conversion is named after everything that decides its bytes, written beside its place and renamed when it is whole; sources
are never changed. Deleting the cache costs nothing but the time to convert again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    """The checkpoint folder that ``write`` makes of ``inputs`` (JSON-able), from the cache where it is there, and its remarks.

    ``write`` fills an empty folder and returns what a user should know about it.
    """
    code = [sha256(Path(__file__).parent / source) for source in SOURCES]
    return kept("checkpoints", name, [inputs, code], write)


def kept(kind: str, name: str, inputs: Any, write: Callable[[Path], list[str]]) -> tuple[Path, tuple[str, ...]]:
    """The same for any kind of folder; ``inputs`` (JSON-able) are all that decides what ``write`` makes."""
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    final = cache_root() / kind / f"{name}-{key[:16]}"
    if not (final / REMARKS).exists():
        with _alone(final):
            if not (final / REMARKS).exists():  # else another process has made it while we waited
                shutil.rmtree(final, ignore_errors=True)  # somebody's half-removed copy
                _make(final, write)
    remarks = json.loads((final / REMARKS).read_text(encoding="utf-8"))
    return final, tuple(remarks)


def sha256(file: Path) -> str:
    """Of a source file, for keys."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def _alone(final: Path) -> Iterator[None]:
    """Let one process at a time make a folder: others that want it wait instead of doing the same work beside it."""
    lock = final.parent / f".{final.name}.lock"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("w")
    except OSError as error:
        raise _refused(final, error) from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _make(final: Path, write: Callable[[Path], list[str]]) -> None:
    try:
        _clean(final.parent)
        partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{os.getpid()}-", dir=final.parent))
    except OSError as error:
        raise _refused(final, error) from error
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


def _refused(final: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write converted checkpoints to {final.parent}: {error.strerror}. Set {CACHE_VARIABLE} to a folder."
    )


def _clean(folder: Path) -> None:
    """Remove what killed conversions left behind."""
    for left in folder.glob(f"{PARTIAL}*-*"):
        if not processes.alive(int(left.name.removeprefix(PARTIAL).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
