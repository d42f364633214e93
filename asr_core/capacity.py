"""What an export takes and what this machine has: what can't fit is refused by name before anything starts."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from asr_core.dims import Dims, expected_shapes
from asr_core.errors import StorageError, UnavailableError

CGROUP = Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")
BYTES = 4  # of a float32
ACTIVATIONS = 5  # times the attention scores of an encoder layer and the decoder's keys and values of the sound
RUNTIME = 2  # times a model's files: the weights once more in the order in which the runtime reads them
SMALL_FILES = 20e6  # bytes of an artifact that are not weights: tokenizers, graphs


@dataclass(frozen=True)
class Cost:
    """What exporting takes: memory in MB (10⁶ bytes) whatever the model, and bytes a weight of memory and of disk.

    Disk counts what lies there at the same time, files on the way included.
    """

    memory_mb: float
    memory: float
    disk: float

    def memory_of(self, dims: Dims) -> float:
        """Peak memory in MB."""
        return self.memory_mb + self.memory * parameters(dims) / 1e6


def parameters(dims: Dims) -> int:
    """How many weights a model of these sizes has."""
    return sum(math.prod(shape) for shape in expected_shapes(dims).values())


def check(name: str, cost: Cost, dims: Dims, out: Path) -> None:
    """Refuse an export that this machine has no memory or no disk for.

    Raises :class:`UnavailableError` or :class:`StorageError`, with what is needed, what is there, and what to do.
    """
    needed, free = cost.memory_of(dims), available_mb()
    if needed > free:
        raise UnavailableError(
            f"{name} would take about {needed / 1e3:.1f} GB of memory, of which {free / 1e3:.1f} GB are free. "
            "End other programs, export on a larger machine, or take target onnx, which never holds the model."
        )
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    room, files = shutil.disk_usage(place).free, cost.disk * parameters(dims) + SMALL_FILES
    if files > room:
        raise StorageError(
            f"{name} would write {files / 1e9:.1f} GB below {out}, where {room / 1e9:.1f} GB are free. "
            "Make room there, or give another folder with --out."
        )


def copies(model_mb: float, dims: Dims, batch_size: int, most: int) -> int:
    """How many copies of a model memory has room for, each with a batch of its own: at least one, at most ``most``.

    ``model_mb`` is the size of its files. A window's share is that of the hungriest runtime measured (OpenVINO).
    """
    frames = dims.n_audio_ctx
    keys_and_values = 2 * dims.decoder_layers * frames * dims.d_model
    window_mb = ACTIVATIONS * BYTES * (keys_and_values + dims.encoder_heads * frames**2) / 1e6
    return max(1, min(most, int(available_mb() / (RUNTIME * model_mb + batch_size * window_mb))))


def available_mb() -> float:
    """Memory that this process can have without swapping, in MB; all that the machine has where it doesn't tell.

    A container's limit counts where there is one.
    """
    free = [_machine_mb()]
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        # Files that were read count as used, but give way.
        held = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free.append((int(limit.read_text()) - int(used.read_text()) + int(held.get("inactive_file", 0))) / 1e6)
    return min(free)


def _machine_mb() -> float:
    if MEMORY.exists():
        line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024 / 1e6
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
