"""Take up an interrupted run where it ended: every finished measurement stays on disk until the whole run is done.

A run's folder is named after everything that its measurements share (checkpoint, data, threads, host, measuring code, package
versions), so that nothing old is taken for new; a run that reaches its end removes it, and the next one measures anew.
Speeds are ratios to PyTorch's time in the same run. A resumed run keeps PyTorch's measurement along with the artifacts', and
says that it was resumed: its speeds are shown, but the history neither judges by them nor judges them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asr_core.artifact import MANIFEST
from asr_core.isolate import Outcome

DONE = "measured.json"
LOCK = "lock"
SHARE = "share"  # where the workers of a fleet on this machine leave finished parts of measurements
# A machine may be another one tomorrow (load, updates): a run that was left for longer is measured anew.
MAX_AGE_S = 24 * 3600.0


@dataclass
class Kept:
    """The finished measurements of one unfinished run; each lies in its own folder below ``work``.

    ``resumed`` names those that an earlier process had finished.
    """

    work: Path
    resumed: list[str] = field(default_factory=list)
    # Tokens of PyTorch force every artifact's probes: a measurement counts beside the one of PyTorch that it was made with.
    _base: str = ""

    def measured(self, folder: Path, path: Path, measure: Callable[[], Outcome]) -> Outcome:
        """The measurement of the model at ``path`` in ``folder``: the finished one, or a new one by ``measure``."""
        key = sha256(self._base, seal(path))
        record = self._read(folder, key)
        if record is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            record = {"key": key, "id": uuid.uuid4().hex, "outcome": asdict(outcome := measure())}
            if outcome.status != "ok":  # what crashed may have had bad luck
                return outcome
            _write(folder, record)
        else:
            self.resumed.append(folder.name)
        self._base = self._base or record["id"]
        return Outcome(**record["outcome"])

    def has(self, folder: Path, path: Path) -> bool:
        """Whether the measurement of the model at ``path`` is finished."""
        return self._read(folder, sha256(self._base, seal(path))) is not None

    def _read(self, folder: Path, key: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        # After a power cut a file may be shorter than what was written. Files that comparing added since don't count.
        return record if record["key"] == key and record["files"].items() <= _sizes(folder).items() else None


@contextmanager
def work_folder(parent: Path, inputs: dict[str, Any], *, fresh: bool) -> Iterator[Path]:
    """The folder of an unfinished run with these ``inputs`` (JSON-able) below ``parent``, or a new one.

    Removed at the end unless an exception interrupts; so are folders that no process uses and nobody took up in time.
    ``fresh`` drops what an earlier process left. Raises :class:`BlockingIOError` where another process is using it.
    """
    folder = parent / sha256(json.dumps(inputs, sort_keys=True))[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _same(lock.fileno(), folder / LOCK):
            raise BlockingIOError(f"{folder} was just removed by another process")
        for other in parent.iterdir():
            if other != folder:
                _remove_stale(other)
        _tidy(folder, fresh=fresh or _age(folder) > MAX_AGE_S)
        yield folder
        shutil.rmtree(folder)


def code_version() -> str:
    """SHA-256 of the sources that measure."""
    root = Path(__file__).parents[1]
    sources = (file for package in ("asr_core", "parity", "runners") for file in sorted((root / package).glob("*.py")))
    return sha256(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in sources))


def seal(path: Path) -> str:
    """What changes when an artifact changes: its manifest names every file's checksum. A checkpoint has its fingerprint."""
    manifest = path / MANIFEST
    return sha256(manifest.read_bytes()) if manifest.exists() else str(path)


def _write(folder: Path, record: dict[str, Any]) -> None:
    """Last and in one step: a measurement without this file was interrupted."""
    partial = folder / f".{DONE}.partial"
    partial.write_text(json.dumps(record | {"files": _sizes(folder)}), encoding="utf-8")
    partial.replace(folder / DONE)


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in sorted(folder.iterdir()) if not file.name.endswith((DONE, ".partial")))
    return {file.name: file.stat().st_size for file in files}


def _tidy(folder: Path, *, fresh: bool) -> None:
    """Leave only finished measurements in a folder that an earlier process may have been killed in; none where ``fresh``."""
    for entry in folder.iterdir():
        if entry.is_dir() and (fresh or not ((entry / DONE).exists() or entry.name == SHARE)):
            shutil.rmtree(entry)
        elif not entry.is_dir() and entry.name != LOCK:
            entry.unlink()


def _remove_stale(folder: Path) -> None:
    if not (folder / LOCK).exists() or _age(folder) <= MAX_AGE_S:
        return
    with suppress(OSError), (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def _same(descriptor: int, file: Path) -> bool:
    return file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())


def _age(folder: Path) -> float:
    """Seconds since the first measurement of a run was finished, or since the folder was touched where there is none."""
    finished = [file.stat().st_mtime for file in folder.glob(f"*/{DONE}")]
    return time.time() - min(finished, default=folder.stat().st_mtime)


def sha256(*parts: str | bytes) -> str:
    """Hexadecimal SHA-256 over the parts, each in its own bounds."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()
