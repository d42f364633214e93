"""Where someone speaks: silero-vad's network, as faster-whisper packages it, through ONNX Runtime.

silero-vad's own package brings PyTorch; faster-whisper's brings the same network as a file, kept up with silero's releases. Of
faster-whisper nothing is imported.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asr_core.audio import SAMPLE_RATE, WINDOW_SECONDS
from asr_core.errors import UnavailableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 512  # samples that get one probability: 32 ms
CONTEXT = 64  # samples before them that the network sees too
CHUNKS_A_RUN = 256  # 8 s at a time
STATE = (1, 1, 128)

# silero's rule, with the values that faster-whisper uses for batches; in samples.
SPEECH, SILENCE = 0.5, 0.35  # probabilities: above the one speech begins, below the other it may end
PAD = SAMPLE_RATE * 400 // 1000  # kept on both sides of speech
MIN_SILENCE = SAMPLE_RATE * 160 // 1000  # a shorter one is part of the speech
MIN_PAUSE = SAMPLE_RATE * 98 // 1000  # speech that fills a window may be cut in a silence this short
LONGEST = WINDOW_SECONDS * SAMPLE_RATE
LONGEST_UNPADDED = LONGEST - CHUNK - 2 * PAD


class VoiceDetector:
    """Hears a recording as it streams by (:class:`asr_core.recording.Listener`); raises :class:`UnavailableError`."""

    def __init__(self, threads: int = 1) -> None:
        self._session = _session(threads)
        self._samples = 0
        self._waiting = np.zeros(CONTEXT, np.float32)  # the context, then what has not been heard yet
        self._state = [np.zeros(STATE, np.float32), np.zeros(STATE, np.float32)]
        self._probabilities: list[NDArray[np.float32]] = []
        self._beside = ThreadPoolExecutor(1)  # the network listens while the next samples are read
        self._listening: Future[None] | None = None

    def hear(self, samples: NDArray[np.float32]) -> None:
        """Take in float32 [n], mono, 16 kHz."""
        self._samples += len(samples)
        self._waiting = np.concatenate([self._waiting, samples])
        while len(self._waiting) >= CONTEXT + CHUNK * CHUNKS_A_RUN:
            self._listen(CHUNKS_A_RUN)

    def clips(self) -> list[tuple[float, float]]:
        """Stretches that hold all speech, each at most 30 s; start and end in seconds. Call it once, when all was heard."""
        rest = len(self._waiting) - CONTEXT
        if rest:
            chunks = -(-rest // CHUNK)
            self._waiting = np.pad(self._waiting, (0, chunks * CHUNK - rest))
            self._listen(chunks)
        if self._listening:
            self._listening.result()
        self._beside.shutdown()
        spoken = speech(np.concatenate([np.zeros(0, np.float32), *self._probabilities]), self._samples)
        return [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in merged(spoken)]

    def _listen(self, chunks: int) -> None:
        """Hand so many chunks to the network, once it is through with those before: no more than two lots are in memory."""
        if self._listening:
            self._listening.result()
        views = np.lib.stride_tricks.sliding_window_view(self._waiting, CONTEXT + CHUNK)[: chunks * CHUNK : CHUNK]
        self._listening = self._beside.submit(self._run, np.ascontiguousarray(views))
        self._waiting = self._waiting[chunks * CHUNK :]

    def _run(self, chunks: NDArray[np.float32]) -> None:
        found, *self._state = self._session.run(None, {"input": chunks, "h": self._state[0], "c": self._state[1]})
        self._probabilities.append(found.reshape(-1))


def speech(probabilities: NDArray[np.float32], samples: int) -> list[tuple[int, int]]:
    """Stretches of speech by silero's rule, in samples, from the probability of each 32 ms.

    Speech begins above one probability and ends where a silence below another lasts; what would not fit a window is cut at its
    last pause, or else where the window is full. Stretches are padded, at most to the middle of the silence between two.
    """
    found = list(_stretches(probabilities.tolist(), samples))
    if not found:
        return []
    starts, ends = [start for start, _ in found], [end for _, end in found]
    starts[0] = max(0, starts[0] - PAD)
    for i, (end, start) in enumerate(zip(ends[:-1], starts[1:], strict=True)):
        room = min(PAD, (start - end) // 2)
        ends[i], starts[i + 1] = end + room, start - room
    ends[-1] = min(samples, ends[-1] + PAD)
    return list(zip(starts, ends, strict=True))


def _stretches(probabilities: Sequence[float], samples: int) -> Iterator[tuple[int, int]]:
    state = _Speaking()
    for at, probability in zip(itertools.count(0, CHUNK), probabilities, strict=False):
        if probability >= SPEECH:
            if state.start is None:
                state.start = at
                continue
            state.go_on(at)
        if state.start is not None and at - state.start > LONGEST_UNPADDED:
            yield state.cut(at)
        if state.start is not None and probability < SILENCE:
            end = state.fall_silent(at)
            if end is not None:
                yield state.start, end
                state = _Speaking()
    if state.start is not None and samples > state.start:
        yield state.start, samples


@dataclass
class _Speaking:
    """A stretch of speech that is not over; all in samples.

    ``quiet`` is since when it has been silent, ``pause`` the last silence that is long enough to cut in, ``onward`` where speech
    went on after it.
    """

    start: int | None = None
    quiet: int | None = None
    pause: int | None = None
    onward: int | None = None

    def go_on(self, at: int) -> None:
        """Take in a chunk of speech."""
        if self.quiet is not None and self.pause is not None and self.onward is None:
            self.onward = at
        self.quiet = None

    def cut(self, at: int) -> tuple[int, int]:
        """End a stretch that has become too long; what follows its last pause goes on."""
        start = self.start or 0
        ended = (start, at if self.pause is None else self.pause)
        self.start = None if self.pause is None else self.onward
        self.quiet = self.pause = self.onward = None
        return ended

    def fall_silent(self, at: int) -> int | None:
        """Take in a chunk of silence; returns where speech ended once the silence has lasted."""
        self.quiet = at if self.quiet is None else self.quiet
        if at - self.quiet > MIN_PAUSE:
            self.pause, self.onward = self.quiet, None
        return self.quiet if at - self.quiet >= MIN_SILENCE else None


def merged(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbours, with the silence between them, as long as they fit one window."""
    joined: list[tuple[int, int]] = []
    for start, end in stretches:
        if joined and end - joined[-1][0] <= LONGEST:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _session(threads: int) -> Any:
    package = importlib.util.find_spec("faster_whisper")
    if package is None or package.origin is None or importlib.util.find_spec("onnxruntime") is None:
        raise UnavailableError("voice detection needs faster-whisper and onnxruntime: pip install 'asr-export[vad]'")
    import onnxruntime

    model = next(Path(package.origin).parent.glob("assets/silero_vad*.onnx"))
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads, options.intra_op_num_threads = 1, threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the features are computed in between
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
