"""Find backends by looking into a package: a backend is one file, and nothing lists it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from asr_core.errors import UnavailableError, UsageError

DISTRIBUTION = "asr-export"
# Files of the packages that are not backends.
SHARED_MODULES = {"__init__", "base"}


def names(package: str) -> list[str]:
    """The backends of a package folder, sorted, without importing them."""
    found = {file.stem for file in _folder(package).glob("*.py")}
    return sorted(name for name in found - SHARED_MODULES if not name.startswith("_"))


def source(package: str, name: str) -> Path:
    """The file of one backend."""
    return _folder(package) / f"{name}.py"


def load(package: str, name: str) -> ModuleType:
    """Import one backend by name; raises :class:`UsageError`, listing the known ones, for an unknown name."""
    known = names(package)
    if name not in known:
        raise UsageError(f"unknown target {name!r}; the known ones: {', '.join(known)}.")
    return importlib.import_module(f"{package}.{name}")


def import_alone(name: str, *, without: Sequence[str]) -> ModuleType:
    """Import a library that imports every neighbour it knows of, as if those in ``without`` were not installed.

    They would cost seconds and hundreds of megabytes, and two of them in one process can abort it. What the library logs of
    their absence is silenced.
    """
    before = {module: sys.modules[module] for module in without if module in sys.modules}
    absent: dict[str, Any] = dict.fromkeys(without)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sys.modules.update(absent)
    try:
        return importlib.import_module(name)
    finally:
        for module in without:
            del sys.modules[module]
        sys.modules.update(before)
        logging.disable(disabled)


def requirements(extra: str) -> list[str]:
    """The packages that an extra of this distribution installs (its row in ``pyproject.toml``), by name."""
    marker = re.compile(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""")
    rows = (row.partition(";") for row in metadata.requires(DISTRIBUTION) or [])
    return sorted(re.split(r"[\s\[<>=!~(]", package, maxsplit=1)[0] for package, _, when in rows if marker.search(when))


def require(target: str, *extras: str) -> None:
    """Raise :class:`UnavailableError`, with the line that installs them, where packages of a target's extras are missing."""
    wanted = (target, *extras)
    needed = dict.fromkeys(package for extra in wanted for package in requirements(extra))
    missing = [package for package in needed if not _installed(package)]
    if missing:
        raise UnavailableError(
            f"{target} needs {', '.join(missing)}, not installed here: pip install '{DISTRIBUTION}[{','.join(wanted)}]'"
        )


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not an installed package")
    return Path(spec.origin).parent
