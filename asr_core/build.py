"""Build an artifact folder: in a process of its own, beside its final place, and under its name only once it is checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

from asr_core import artifact, capacity, isolate, processes, registry, tokens
from asr_core.artifact import MANIFEST, Artifact, Manifest, TensorSpec
from asr_core.capacity import Cost
from asr_core.checkpoint import Checkpoint
from asr_core.dims import Dims
from asr_core.errors import ArtifactError, ExportError, StorageError, UsageError
from asr_core.graph_weights import PALETTE_BITS, palettes

PARTIAL = ".partial-"
QUERIES = "alignment_queries"  # as in graph.py, which imports torch
REPLACED = ".replaced-"
FAILED = ".failed"
FAILED_REASON = "FAILED.txt"
# Sources besides the exporter's own that decide what bytes an export writes.
SHARED_SOURCES = (
    "graph.py",
    "graph_weights.py",
    "integers.py",
    "compressed.py",
    "build.py",
    "tokens.py",
    "audio.py",
    "artifact.py",
)

# Kinds of compact forms and what is said where an artifact does not carry them, of how many weights.
NOTICES = {
    "factors": "low-rank weights ({count}) are stored multiplied out, in the size and at the cost of dense ones",
    "heads": "heads that were removed from attentions ({count}) are stored and computed as zeros",
    "silent": "heads that were removed from the decoder's attentions ({count}) are stored and computed as zeros",
    "int8": "weights of 8-bit codes ({count}) are stored in the precision's own form",
    "int4": "weights of 4-bit or smaller codes ({count}) are stored in the precision's own form",
    **{
        palettes(count, 2**bits): f"clustered weights ({{count}}, indices of {bits} bits) are stored without their palettes"
        for count in (1, 2)
        for bits in PALETTE_BITS
    },
    "zeros": "the zeros of pruned weights ({count}) are stored and computed like other values",
}


class Exporter(Protocol):
    """What every module in ``exporters/`` offers.

    ``CARRIES`` lists, by precision, the kinds of compact forms (:data:`NOTICES`) that reach the artifact as they are; of a
    precision that it doesn't list, none does. ``ON_REQUEST``, where a module has it, are further precisions, which only some
    checkpoints can have. ``export`` writes only below ``folder`` and returns the tensors of its graphs; it
    never writes the manifest. The module imports its converter inside ``export``, so that listing precisions costs nothing.
    ``COST`` is what exporting takes, by precision, as far as it was measured.
    """

    PRECISIONS: tuple[str, ...]
    CARRIES: Mapping[str, Collection[str]]
    COST: Mapping[str, Cost]

    def export(self, checkpoint: Checkpoint, folder: Path, precision: str, progress: isolate.Progress) -> list[TensorSpec]:
        """Convert the checkpoint."""
        ...


def exporter(target: str) -> Exporter:
    """Load the exporter of a target."""
    return cast("Exporter", registry.load("exporters", target))


def check_precision(target: str, precision: str) -> None:
    """Raise :class:`UsageError` where the target has no such precision."""
    known = (*exporter(target).PRECISIONS, *getattr(exporter(target), "ON_REQUEST", ()))
    if precision not in known:
        raise UsageError(f"{target} has no precision {precision!r}; it has: {', '.join(known)}.")


def cost(target: str, precision: str) -> Cost | None:
    """What an export takes; None where nobody has measured it."""
    return getattr(exporter(target), "COST", {}).get(precision)


def refuse_misfit(checkpoint: Checkpoint, target: str, precision: str, out: Path) -> None:
    """Refuse what cannot be exported for its size: the format's limit, this machine's memory, its disk.

    An exporter whose format has a limit says with ``limits(dims, precision)`` what exceeds it. Raises :class:`ExportError`,
    :class:`~asr_core.errors.UnavailableError` or :class:`StorageError`.
    """
    limits: Callable[[Dims, str], list[str]] | None = getattr(exporter(target), "limits", None)
    if limits and (reasons := limits(checkpoint.dims, precision)):
        raise ExportError(f"{target}-{precision} cannot hold {checkpoint.name}: {'; '.join(reasons)}.")
    if known := cost(target, precision):
        capacity.check(f"{target}-{precision}", known, checkpoint.dims, out)


def notices(checkpoint: Checkpoint, target: str, precision: str) -> list[str]:
    """Which compact forms of a checkpoint an artifact will not carry, as sentences; none of a checkpoint without any."""
    carried = exporter(target).CARRIES.get(precision, ())
    found = checkpoint.graph_weights.kinds
    return [NOTICES[kind].format(count=found[kind]) for kind in NOTICES if found[kind] and kind not in carried]


@dataclass(frozen=True)
class Staged:
    """A sealed artifact that waits beside its final place for the verdict."""

    path: Path
    final: Path

    def publish(self) -> Artifact:
        """Move the artifact under its final name, replacing an older one and an older failure."""
        replaced = self.final.with_name(f".{self.final.name}{REPLACED}{os.getpid()}")
        if self.final.exists():
            self.final.rename(replaced)
        self.path.rename(self.final)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(self.final.with_name(self.final.name + FAILED), ignore_errors=True)
        return Artifact(self.final, artifact.read_manifest(self.final))

    def quarantine(self, reason: str) -> Path:
        """Move the artifact to ``<name>.failed`` with the reason beside it; an older good one stays as it is."""
        failed = self.final.with_name(self.final.name + FAILED)
        shutil.rmtree(failed, ignore_errors=True)
        (self.path / FAILED_REASON).write_text(reason + "\n", encoding="utf-8")
        self.path.rename(failed)
        return failed


def build_key(checkpoint: Checkpoint, target: str, precision: str) -> str:
    """SHA-256 over everything that decides the bytes: checkpoint, target, precision, our sources and the tools' versions."""
    core = Path(__file__).parent
    # A layout is made of its target's own exporter.
    own = dict.fromkeys(registry.source("exporters", name) for name in (target.partition(registry.LAYOUT)[0], target))
    sources = [*(core / name for name in SHARED_SOURCES), *own]
    inputs = {
        "fingerprint": checkpoint.fingerprint,
        "target": target,
        "precision": precision,
        "alignment_heads": checkpoint.alignment_heads,
        "sources": [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources],
        "tools": tool_versions(target),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def tool_versions(target: str) -> dict[str, str]:
    """Versions of this package and of every package that the target's export uses."""
    packages = {"asr-export", *registry.requirements("export"), *registry.requirements(target)}
    return {name: metadata.version(name) for name in sorted(packages)}


def up_to_date(checkpoint: Checkpoint, target: str, precision: str, final: Path) -> bool:
    """Whether ``final`` holds an unharmed artifact made from exactly today's inputs."""
    try:
        return Artifact.open(final).manifest.build_key == build_key(checkpoint, target, precision)
    except ArtifactError:
        return False


def stage(
    checkpoint: Checkpoint,
    target: str,
    precision: str,
    final: Path,
    progress: isolate.Progress = lambda stage: None,
    threads: int | None = None,
) -> Staged:
    """Export into a hidden folder beside ``final`` and seal it; ``threads`` bounds the numeric libraries' pools.

    Raises :class:`~asr_core.errors.UnavailableError`, :class:`~asr_core.errors.ExportError` or :class:`StorageError`; nothing
    is left behind then.
    """
    check_precision(target, precision)
    registry.require(target, "export")
    # Absolute: a converter that is a program of its own may run in another folder.
    partial = final.absolute().with_name(f".{final.name}{PARTIAL}{os.getpid()}")
    try:
        clean(final)
        partial.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"cannot write to {final.parent}: {error.strerror}.") from error
    try:
        outcome = isolate.run(
            "asr_core.build:export_in_process",
            {"checkpoint": str(checkpoint.path), "name": checkpoint.name, "target": target, "precision": precision,
             "folder": str(partial), "alignment_heads": checkpoint.alignment_heads},
            progress=progress,
            threads=threads,
        )  # fmt: skip
        isolate.result_or_raise(outcome, f"the export of {target}-{precision}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Staged(partial, final)


def clean(final: Path) -> None:
    """Remove what killed exports of this artifact left behind; bring back a good one that was being replaced."""
    for left in sorted(final.parent.glob(f".{final.name}.*-*")):
        pid = int(left.name.rpartition("-")[2])
        if pid != os.getpid() and processes.alive(pid):
            continue
        if REPLACED in left.name and not final.exists():
            left.rename(final)
        else:
            shutil.rmtree(left)


def _shows_attention(target: str, tensors: list[TensorSpec]) -> bool:
    """Whether word timestamps can be made: most other clients' forms have no place for the output that they are read from."""
    return registry.LAYOUT not in target or any(tensor.name == QUERIES for tensor in tensors)


def export_in_process(
    checkpoint: str,
    name: str,
    target: str,
    precision: str,
    folder: str,
    progress: Callable[[str], None],
    *,
    alignment_heads: list[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Export, bundle and seal; runs inside the isolated process. ``alignment_heads`` None are the checkpoint's own."""
    started = time.perf_counter()
    progress("checkpoint")
    opened = Checkpoint.open(checkpoint)
    if alignment_heads is not None:
        opened = opened.with_alignment_heads(alignment_heads)
    path = Path(folder)
    tensors = exporter(target).export(opened, path, precision, progress)
    progress("seal")
    tokens.write_bundle(opened.path, opened.dims.n_mels, opened.alignment_heads, path)
    manifest = Manifest(
        target=target,
        precision=precision,
        checkpoint=name,
        fingerprint=opened.fingerprint,
        build_key=build_key(opened, target, precision),
        dims=opened.dims,
        notices=notices(opened, target, precision),
        tokens=tokens.TokenIds.read(opened.path, opened.generation, opened.dims.n_text_ctx),
        alignment_heads=opened.alignment_heads if _shows_attention(target, tensors) else None,
        tensors=tensors,
        files=artifact.seal(path),
        tools=tool_versions(target),
        export_seconds=round(time.perf_counter() - started, 3),
        export_peak_rss_mb=round(isolate.peak_rss_mb(), 1),
    )
    (path / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return {}
