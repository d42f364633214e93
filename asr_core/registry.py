"""Find backends by looking into a package: a backend is one file, and nothing lists it.

``<target>.<layout>`` names a target in the form that another client loads; its file is ``_<target>_<layout>.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from asr_core.errors import UnavailableError, UsageError

DISTRIBUTION = "asr-export"
# Files of the packages that are not backends.
SHARED_MODULES = {"__init__", "base"}
LAYOUT = "."  # between a target and its layout; "@" would be a revision to Hugging Face's clients


def names(package: str) -> list[str]:
    """The backends of a package folder, sorted, without importing them."""
    found = {file.stem for file in _folder(package).glob("*.py")}
    return sorted(name for name in found - SHARED_MODULES if not name.startswith("_"))


def layouts(package: str, target: str) -> list[str]:
    """The layouts that a target has beside its own, sorted."""
    prefix = f"_{target}_"
    return sorted(file.stem.removeprefix(prefix) for file in _folder(package).glob(f"{prefix}*.py"))


def source(package: str, name: str) -> Path:
    """The file of one backend."""
    return _folder(package) / f"{_module(name)}.py"


def load(package: str, name: str) -> ModuleType:
    """Import one backend by name; raises :class:`UsageError`, listing the known ones, for an unknown name."""
    target, _, layout = name.partition(LAYOUT)
    known = names(package)
    if target not in known:
        raise UsageError(f"unknown target {name!r}; the known ones: {', '.join(known)}.")
    if layout and layout not in layouts(package, target):
        raise UsageError(_no_layout(target, layout, layouts(package, target)))
    return importlib.import_module(f"{package}.{_module(name)}")


def import_alone(name: str, *, without: Sequence[str]) -> ModuleType:
    """Import a library that imports every neighbour it knows of, as if those in ``without`` were not installed."""
    with absent(without):
        return importlib.import_module(name)


@contextmanager
def absent(packages: Sequence[str]) -> Iterator[None]:
    """Let libraries believe that packages are not installed, and keep what they log of that to themselves.

    Importing the packages would cost seconds and hundreds of megabytes, and two of them in one process can abort it.
    """
    before = {module: sys.modules[module] for module in packages if module in sys.modules}
    nothing: dict[str, Any] = dict.fromkeys(packages)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sys.modules.update(nothing)
    try:
        yield
    finally:
        for module in packages:
            del sys.modules[module]
        sys.modules.update(before)
        logging.disable(disabled)


def requirements(extra: str) -> list[str]:
    """The packages that an extra of this distribution installs (its row in ``pyproject.toml``), by name."""
    extra = extra.partition(LAYOUT)[0]
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
            f"{target} needs {', '.join(missing)}, not installed here: "
            f"pip install '{DISTRIBUTION}[{','.join(one.partition(LAYOUT)[0] for one in wanted)}]'"
        )


def _module(name: str) -> str:
    target, dot, layout = name.partition(LAYOUT)
    return f"_{target}_{layout}" if dot else target


def _no_layout(target: str, layout: str, known: list[str]) -> str:
    has = f"has these beside its own: {', '.join(known)}" if known else "has only its own"
    return f"{target} has no layout {layout!r}; it {has}."


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
