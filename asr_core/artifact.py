"""The artifact folder and its sealed manifest: the whole conversation between exporters and runners."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from asr_core.dims import Dims, Frozen
from asr_core.errors import ArtifactError
from asr_core.tokens import TokenIds

MANIFEST = "asr-export.json"


class TensorSpec(Frozen):
    """One input or output of one graph; names in ``shape`` are dynamic axes."""

    graph: str
    role: Literal["input", "output"]
    name: str
    dtype: str
    shape: list[int | str]


class FileEntry(Frozen):
    """One file of the artifact, as sealed."""

    path: str
    bytes: int
    sha256: str


class Manifest(Frozen):
    """Everything that a runner, or a person, needs to know about an artifact.

    ``build_key`` identifies the inputs (checkpoint, target, precision, exporter source, tool versions): an artifact with the
    key of today's inputs is up to date. ``target`` is ``<target>.<layout>`` where the files have the form that another client
    loads. ``alignment_heads`` (decoder layer, head) are those whose attention the decoder shows, in the order of its output;
    None where it shows none, so that the artifact has no word timestamps. ``notices`` say which compact forms of a compressed
    checkpoint the artifact does not carry.
    """

    schema_version: Literal[1] = 1
    target: str
    precision: str
    checkpoint: str
    fingerprint: str
    build_key: str
    dims: Dims
    tokens: TokenIds
    alignment_heads: list[tuple[int, int]] | None = None
    notices: list[str] = Field(default=[])
    tensors: list[TensorSpec]
    files: list[FileEntry]
    tools: dict[str, str]
    export_seconds: float
    export_peak_rss_mb: float

    @property
    def short_windows(self) -> bool:
        """Whether the encoder takes less than a whole window: its input has a name where others have 3000."""
        return any(isinstance(spec.shape[-1], str) for spec in self.tensors if (spec.graph, spec.role) == ("encoder", "input"))


class Artifact:
    """An artifact folder whose files are those that were sealed."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Open and verify a folder; raises :class:`ArtifactError` naming a missing, added or altered file."""
        path = Path(path)
        manifest = read_manifest(path)
        sealed = {entry.path for entry in manifest.files}
        for entry in manifest.files:
            _verify(path / entry.path, entry)
        added = sorted(set(_files(path)) - sealed)
        if added:
            raise ArtifactError(f"{path / added[0]} was not part of the export. Remove it, or export again.")
        return cls(path, manifest)

    @property
    def name(self) -> str:
        """``<target>-<precision>``."""
        return f"{self.manifest.target}-{self.manifest.precision}"

    @property
    def size_mb(self) -> float:
        """Size of all sealed files, MB (10⁶ bytes)."""
        return sum(entry.bytes for entry in self.manifest.files) / 1e6


def read_manifest(path: Path) -> Manifest:
    """Read a folder's manifest without verifying its files; raises :class:`ArtifactError`."""
    file = path / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path} is not an artifact folder: it holds no {MANIFEST}.") from None
    except ValidationError as error:
        raise ArtifactError(f"{file} is damaged ({error.error_count()} faults). Export again.") from error


def seal(path: Path) -> list[FileEntry]:
    """Checksums of every file below an artifact folder, the manifest itself excepted."""
    return [FileEntry(path=name, bytes=(path / name).stat().st_size, sha256=_sha256(path / name)) for name in _files(path)]


def _files(path: Path) -> list[str]:
    found = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in found if name != MANIFEST)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verify(file: Path, entry: FileEntry) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file} is missing. Copy the whole folder again, or export again.")
    if file.stat().st_size != entry.bytes or _sha256(file) != entry.sha256:
        raise ArtifactError(f"{file} was altered since the export (checksum differs). Export again.")
