"""The features of a recording of any length: computed as it streams by, kept in a temporary file, read a window at a time.

openai-whisper computes its features over the whole file at once: windows see their neighbours' samples at their borders, and
the floor lies 8 below the maximum of the whole file. Both are kept here, and neither samples nor features stay in memory: the
power in every mel band goes to a temporary file (115 MB an hour at 80 bands; digital silence takes no space), the maximum is
known when the file is through, logarithm and floor are applied to the frames that are read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from asr_core.audio import HOP, N_FFT, PADDED_FRAMES, SAMPLE_RATE, AudioReader, Gap, mel_power, normalised

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_SAMPLES = 10 * SAMPLE_RATE  # transformed together; a multiple of HOP
MIRRORED = N_FFT // 2  # samples before the first
BYTES = 4  # float32


class Listener(Protocol):
    """Hears the samples as they stream by (a voice detector)."""

    def hear(self, samples: NDArray[np.float32]) -> None:
        """Float32 [n], mono, 16 kHz."""


class Recording:
    """One recording's features; use it in a ``with`` statement, which removes the temporary file.

    ``frames`` counts those that hold content (10 ms each), ``gaps`` what could not be read.
    """

    def __init__(self, path: str | Path, filters: NDArray[np.float32], listeners: Sequence[Listener] = ()) -> None:
        """Stream the file once; raises :class:`~asr_core.errors.AudioError` for one without readable audio."""
        reader = AudioReader(path)
        self.samples = 0
        self._n_mels = len(filters)
        self._stored = 0
        self._reading = Lock()  # windows may be read by several threads
        self._peak = np.float32(0)
        self._file = tempfile.TemporaryFile(prefix="asr-export-")  # noqa: SIM115 - closed by close()
        try:
            for power in _power(_of_size(self._heard(reader, listeners), BLOCK_SAMPLES), filters):
                self._keep(power)
        except BaseException:
            self.close()
            raise
        self.gaps: tuple[Gap, ...] = tuple(reader.gaps)

    @property
    def frames(self) -> int:
        """Frames of content, 100 a second."""
        return self.samples // HOP

    @property
    def duration_s(self) -> float:
        """Length in seconds, unreadable stretches included."""
        return self.samples / SAMPLE_RATE

    def features(self, start: int, stop: int) -> NDArray[np.float32]:
        """Whisper's features of frames ``start`` to ``stop``, float32 [n_mels, stop - start]; silence follows the content."""
        power = np.zeros((stop - start) * self._n_mels, np.float32)
        there = max(0, min(stop, self._stored) - start)
        with self._reading:
            self._file.seek(start * self._n_mels * BYTES)
            data = np.frombuffer(self._file.read(there * self._n_mels * BYTES), np.float32)
        power[: len(data)] = data  # silence at the end was not written
        return normalised(power.reshape(-1, self._n_mels).T, self._peak)

    @property
    def silence(self) -> float:
        """The feature of every mel band where nothing is heard."""
        return float(normalised(np.zeros((1, 1), np.float32), self._peak)[0, 0])

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _heard(self, reader: AudioReader, listeners: Sequence[Listener]) -> Iterator[NDArray[np.float32]]:
        for block in reader.blocks():
            self.samples += len(block)
            for listener in listeners:
                listener.hear(block)
            yield block

    def _keep(self, power: NDArray[np.float32]) -> None:
        """Write float32 [n_mels, n] frame by frame; silence is a hole in the file."""
        if power.any():
            self._peak = max(self._peak, power.max())
            self._file.write(np.ascontiguousarray(power.T).data)
        else:
            self._file.seek(power.size * BYTES, os.SEEK_CUR)
        self._stored += power.shape[1]


def _power(blocks: Iterable[NDArray[np.float32]], filters: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Power in the mel bands, float32 [n_mels, n] at a time: what :func:`asr_core.audio.mel_power` gives of the whole file.

    Windows are centred: the file's beginning is mirrored before it, silence comes after it.
    """
    rest: NDArray[np.float32] | None = None
    samples = frames = 0
    for block in blocks:
        if rest is None:
            rest = np.pad(block, (0, max(0, MIRRORED + 1 - len(block))))[MIRRORED:0:-1]
        samples += len(block)
        piece = np.concatenate([rest, block])
        ready = max(0, (len(piece) - N_FFT) // HOP + 1)
        yield _power_of(piece, ready, filters)
        frames, rest = frames + ready, piece[ready * HOP :]
    if rest is not None:
        last = samples // HOP + PADDED_FRAMES - frames
        yield _power_of(np.pad(rest, (0, N_FFT + last * HOP)), last, filters)


def _power_of(samples: NDArray[np.float32], frames: int, filters: NDArray[np.float32]) -> NDArray[np.float32]:
    silent = frames == 0 or not samples.any()
    return np.zeros((len(filters), frames), np.float32) if silent else mel_power(samples, frames, filters)


def _of_size(blocks: Iterable[NDArray[np.float32]], size: int) -> Iterator[NDArray[np.float32]]:
    """The same samples, so many at a time; the last ones may be fewer."""
    waiting: list[NDArray[np.float32]] = []
    count = 0
    for block in blocks:
        waiting.append(block)
        count += len(block)
        if count < size:
            continue
        joined = np.concatenate(waiting)
        whole = count // size * size
        yield from np.split(joined[:whole], whole // size)
        waiting, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(waiting)
