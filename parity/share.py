"""The place where the machines of a fleet meet: a shared folder, or whatever else fsspec has a name for.

Every file appears whole or not at all: it is written under another name first. What a machine only reads it fetches once; where
the place is a folder that it sees itself, it reads it there.
"""

from __future__ import annotations

import json
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from asr_core.errors import StorageError, UsageError


class Share:
    """A folder at an fsspec address, ``/mnt/fleet`` or ``s3://bucket/fleet``; names are relative to it, with slashes.

    ``cache`` is where this machine keeps what it fetched.
    """

    def __init__(self, address: str, cache: Path) -> None:
        self.address, self.cache = address, cache

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        try:
            filesystem, root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{self.address}: {error}") from None
        return filesystem, root

    @cached_property
    def _is_folder(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self._opened[0], LocalFileSystem)

    def _at(self, name: str) -> str:
        return posixpath.join(self._opened[1], name)

    def put(self, file: Path, name: str) -> None:
        """Store a file, whole or not at all; whoever comes second wins."""
        filesystem, part = self._opened[0], f"{self._at(name)}.{uuid.uuid4().hex}.part"
        filesystem.makedirs(posixpath.dirname(part), exist_ok=True)
        filesystem.put_file(str(file), part)
        filesystem.mv(part, self._at(name))

    def publish(self, folder: Path, name: str) -> None:
        """Store a folder for :meth:`fetch`, its list of files last; one that is there already stays."""
        if self.published(name):
            return
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for file in files:
            if self._is_folder:
                _link_or_copy(folder / file, Path(self._at(f"{name}/{file}")))
            else:
                self.put(folder / file, f"{name}/{file}")
        self.write(_listing(name), files)

    def fetch(self, name: str) -> Path:
        """A published folder as one on this machine."""
        if self._is_folder:
            return Path(self._at(name))
        whole = self.cache / name
        if not whole.exists():
            part = whole.with_name(f"{whole.name}.{uuid.uuid4().hex}.part")
            for file in self.read(_listing(name)):
                (part / file).parent.mkdir(parents=True, exist_ok=True)
                self._opened[0].get_file(self._at(f"{name}/{file}"), str(part / file))
            part.rename(whole)
        return whole

    def published(self, name: str) -> bool:
        """Whether a folder is there, with all its files."""
        return self.exists(_listing(name))

    @contextmanager
    def borrow(self, name: str) -> Iterator[Path]:
        """As :meth:`fetch`, until the context ends: what is needed once must not fill the disk."""
        folder = self.fetch(name)
        try:
            yield folder
        finally:
            if not self._is_folder:
                shutil.rmtree(folder)

    def write(self, name: str, content: Any) -> None:
        """Store JSON-able data."""
        self.cache.mkdir(parents=True, exist_ok=True)
        file = self.cache / f"{uuid.uuid4().hex}.json"
        try:
            file.write_text(json.dumps(content), encoding="utf-8")
            self.put(file, name)
        finally:
            file.unlink(missing_ok=True)

    def read(self, name: str) -> Any:
        """JSON data; raises :class:`FileNotFoundError`."""
        return json.loads(self._opened[0].cat_file(self._at(name)))

    def get(self, name: str, file: Path) -> None:
        """Copy a stored file to this machine."""
        self._opened[0].get_file(self._at(name), str(file))

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self._opened[0].exists(self._at(name)))

    def check(self) -> None:
        """Raise :class:`StorageError` where nothing can be written here."""
        name = f"{uuid.uuid4().hex}.probe"
        try:
            self.write(name, None)
            self._opened[0].rm(self._at(name))
        except OSError as error:
            raise StorageError(f"cannot write to {self.address}: {error.strerror or error}.") from error

    def remove(self) -> None:
        """Remove all of it."""
        if self._opened[0].exists(self._opened[1]):
            self._opened[0].rm(self._opened[1], recursive=True)


def _listing(name: str) -> str:
    return f"{name}.files.json"


def _link_or_copy(source: Path, target: Path) -> None:
    """On the same disk nothing needs to be copied: nobody changes what was published."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        os.link(source.resolve(), part)  # hub caches are full of links, which would lead nowhere from here
    except OSError:
        shutil.copyfile(source, part)
    part.replace(target)
