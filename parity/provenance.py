"""Where, when and of what a report's figures were measured: what makes two reports comparable, or not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from asr_core import registry
from parity.data import Utterance

# What makes a machine the same machine. Its name is no part of it: hosted runners have a new one every night, and two
# machines of one kind may share their past, because speeds are ratios to PyTorch on the machine itself.
IDENTITY = ("system", "machine", "processor", "cores")


def stamp(document: Mapping[str, Any], utterances: list[Utterance]) -> dict[str, Any]:
    """The report with what history and merging need beside the figures.

    Adds ``created`` (UTC) and ``versions`` where the report has none, and ``commit``, ``data.digest``, ``host.identity``.
    """
    host, data = document["host"], document["data"]
    return {
        "created": now(),
        "versions": versions(),
        **document,
        "commit": commit(),
        "host": {**host, "identity": identity(host)},
        "data": {**data, "digest": digest(utterances)},
    }


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def identity(host: Mapping[str, Any]) -> str:
    """SHA-256 of what makes a machine the same machine, from a report's ``host``."""
    return hashlib.sha256(json.dumps([host.get(key) for key in IDENTITY]).encode()).hexdigest()


def readable(host: Mapping[str, Any]) -> str:
    """A machine as people name it: ``Linux x86_64, AMD EPYC, 2 cores, 1 thread``."""
    processor = str(host.get("processor") or "").strip()
    parts = [
        f"{host['system']} {host['machine']}",
        processor if processor != host["machine"] else "",
        _count(host, "cores", "core"),
    ]
    return ", ".join(part for part in [*parts, _count(host, "threads", "thread")] if part)


def digest(utterances: list[Utterance]) -> str:
    """SHA-256 over every utterance's name, transcript and audio file, in their order."""
    total = hashlib.sha256()
    for utterance in utterances:
        with utterance.path.open("rb") as stream:
            audio = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(json.dumps([utterance.id, utterance.text, audio]).encode())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of every package that its extras name, where installed."""
    extras = ("export", *registry.names("runners"))
    packages = {"asr-export", "numpy", *(package for extra in extras for package in registry.requirements(extra))}
    found = {}
    for name in sorted(packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that isn't installed
    return found


def commit() -> str | None:
    """The commit that this code was checked out at, ``-dirty`` after it where files differ; None where it was installed."""
    here = Path(__file__).parent
    git = shutil.which("git")
    # A virtual environment may lie inside somebody else's checkout: only one that tracks this very file counts.
    if git is None or _git(git, here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(git, here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(git: str, folder: Path, *arguments: str) -> str | None:
    done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _count(host: Mapping[str, Any], key: str, unit: str) -> str:
    number = host.get(key)
    return "" if number is None else f"{number} {unit}{'' if number == 1 else 's'}"
