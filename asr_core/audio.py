"""Decode any audio file to mono 16 kHz and turn it into Whisper's log-mel features, in numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asr_core.errors import AudioError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_RATE = 16_000  # Hz
N_FFT = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
WINDOW_SECONDS = 30
WINDOW_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE
WINDOW_FRAMES = WINDOW_SAMPLES // HOP
PADDED_FRAMES = 3  # frames beyond n samples // HOP that still see one of them: windows are centred, 25 ms wide
MEL_FLOOR = 1e-10  # power, before the logarithm
FRAMES_A_PRODUCT = 10  # few enough that BLAS starts no threads, which would take longer to wait for than all the work
DYNAMIC_RANGE = 8.0  # log10 units below the maximum that survive
SLACK_SECONDS = 0.1  # time stamps are rounded, to a millisecond or a frame; only larger jumps are missing audio
LENGTH_SLACK_SECONDS = 1.0
PACKED = "flt"  # channels side by side: reading more than 8 planes crashes PyAV
MAX_FAILURES = 100  # of the container in a row
LENGTH_IN_HEADER = {"flac", "mov", "matroska", "caf", "aiff", "asf", "avi"}  # FFmpeg's names; of others it may be a guess


@dataclass(frozen=True)
class Gap:
    """A stretch of a file, in seconds from its first sample, that could not be read."""

    start: float
    end: float


class AudioReader:
    """Decodes one file of any container, rate and channel count piece by piece to mono 16 kHz.

    What cannot be decoded becomes silence of the same length, so that all times stay the file's; ``gaps`` lists it once
    :meth:`blocks` is through. Raises :class:`AudioError` where the file is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.gaps: list[Gap] = []
        if not self.path.exists():
            raise AudioError(f"{path}: no such file.")

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Samples in -1…1, float32 [n] at a time; raises :class:`AudioError` for what is not audio, empty, or holds NaN."""
        import av

        self.gaps.clear()
        empty = True
        try:
            with av.open(str(self.path), metadata_errors="ignore") as container:
                if not container.streams.audio:
                    raise AudioError(f"{self.path} holds no audio stream.")
                for block in self._decode(container):
                    if not np.isfinite(block).all():
                        raise AudioError(f"{self.path} holds NaN or infinite samples.")
                    empty = empty and not len(block)
                    yield block
        except (av.FFmpegError, OSError) as error:
            raise AudioError(f"{self.path} is not audio that can be decoded ({error.strerror}).") from error
        if empty:
            raise AudioError(f"{self.path} is empty: it holds no audio samples.")

    def _decode(self, container: Any) -> Iterator[NDArray[np.float32]]:
        clock, mono = _Clock(container), _Mono()
        failure: Exception | None = None
        for frame in _frames(container):
            if isinstance(frame, Exception):
                failure = frame
                continue
            start, end = clock.advance(frame, damaged=failure is not None)
            if failure or end - start > SLACK_SECONDS:
                self._note(start, end)
                yield mono.flush()
                yield np.zeros(max(0, round(end * SAMPLE_RATE) - mono.written), np.float32)
                mono.written = max(mono.written, round(end * SAMPLE_RATE))
            failure = None
            yield mono.push(frame)
        if failure and not mono.written:
            raise failure
        yield mono.flush()
        if clock.missing_end(damaged=bool(failure or self.gaps)):
            self._note(clock.now, clock.length)

    def _note(self, start: float, end: float) -> None:
        """List a gap; one that begins where the last one ended makes it longer."""
        if self.gaps and start - self.gaps[-1].end <= SLACK_SECONDS:
            start = self.gaps.pop().start
        self.gaps.append(Gap(start, end))


def load_audio(path: str | Path) -> NDArray[np.float32]:
    """All samples of a file, float32 [n] in -1…1, mono, 16 kHz.

    Raises :class:`AudioError` where the file is missing, empty, not audio, damaged, or holds NaN.
    """
    reader = AudioReader(path)
    samples: NDArray[np.float32] = np.concatenate(list(reader.blocks()))
    if reader.gaps:
        raise AudioError(f"{path} is damaged: {gaps_in_words(reader.gaps)} cannot be decoded.")
    return samples


def gaps_in_words(gaps: Sequence[Gap]) -> str:
    """``12.0–15.3 s, 40.0–41.0 s``."""
    return ", ".join(f"{gap.start:.1f}–{gap.end:.1f} s" for gap in gaps)


class _Clock:
    """Where in the file decoding is, in seconds, by the container's own time stamps."""

    def __init__(self, container: Any) -> None:
        self.now = 0.0
        self.length = 0.0 if container.duration is None else container.duration / 1e6
        self.states_length = bool(LENGTH_IN_HEADER & set(container.format.name.split(",")))
        self.container_start = (container.start_time or 0) / 1e6
        self.origin: float | None = None

    def advance(self, frame: Any, *, damaged: bool) -> tuple[float, float]:
        """Take a frame in; returns the stretch before it that nothing was decoded of, empty where nothing is missing."""
        before = self.now
        if self.origin is None:
            self.origin = self.container_start if damaged or frame.time is None else frame.time
        start = before if frame.time is None else frame.time - self.origin
        if not before <= start <= self.length + SLACK_SECONDS:  # a stamp that goes back or out of the file tells nothing
            self.origin += start - before
            start = before
        elif start - before <= SLACK_SECONDS and not damaged:
            start = before
        self.now = start + frame.samples / frame.sample_rate
        return before, start

    def missing_end(self, *, damaged: bool) -> bool:
        """Whether the file is shorter than it says; a length guessed from the bit rate counts only in a damaged file."""
        return (self.states_length or damaged) and self.length - self.now > LENGTH_SLACK_SECONDS


class _Mono:
    """Resamples frames to 16 kHz, starting anew where the stream changes its kind, and averages their channels.

    FFmpeg's own mix to mono is √2 louder than the channels' mean in float samples.
    """

    def __init__(self) -> None:
        self.written = 0
        self._kind: tuple[str, str, int] | None = None
        self._resampler: Any = None

    def push(self, frame: Any) -> NDArray[np.float32]:
        """One frame in; as many samples out as are ready."""
        import av

        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        rest = np.zeros(0, np.float32) if kind == self._kind else self.flush()
        if self._resampler is None:
            self._kind, self._resampler = kind, av.AudioResampler(format=PACKED, rate=SAMPLE_RATE)
        return np.concatenate([rest, self._take(frame)])

    def flush(self) -> NDArray[np.float32]:
        """What the resampler still holds."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        rest = self._take(None)
        self._kind = self._resampler = None
        return rest

    def _take(self, frame: Any) -> NDArray[np.float32]:
        frames = self._resampler.resample(frame)
        blocks = [out.to_ndarray().reshape(-1, out.layout.nb_channels).mean(axis=1) for out in frames]
        self.written += sum(map(len, blocks))
        return np.concatenate([np.zeros(0, np.float32), *blocks])


def _frames(container: Any) -> Iterator[Any]:
    """The decoded frames of the first audio stream, and the error in the place of each packet that cannot be decoded."""
    import av

    stream = container.streams.audio[0]
    packets, failures = container.demux(stream), 0
    while failures < MAX_FAILURES:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            failures += 1
            packets = container.demux(stream)  # goes on behind the damage
            yield error
            continue
        if packet is None:
            return
        failures = 0
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            yield error
        else:
            yield from frames


def mel_filters(n_mels: int) -> NDArray[np.float32]:
    """The Slaney-normalised triangular filter bank, float32 [n_mels, 201], 0…8 kHz (Slaney 1998, Auditory Toolbox)."""
    frequencies = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    edges = _mel_to_hz(np.linspace(0, _hz_to_mel(SAMPLE_RATE / 2), n_mels + 2))
    widths = np.diff(edges)
    ramps = edges[:, None] - frequencies[None, :]
    rising = -ramps[:-2] / widths[:-1, None]
    falling = ramps[2:] / widths[1:, None]
    area = 2.0 / (edges[2:] - edges[:-2])
    return (np.maximum(0, np.minimum(rising, falling)) * area[:, None]).astype(np.float32)


# The Slaney mel scale: linear below 1 kHz (200/3 Hz a mel), logarithmic above (a factor of 6.4 in 27 mels).
_LINEAR_HZ = 200.0 / 3
_KNEE_HZ = 1000.0
_KNEE_MEL = _KNEE_HZ / _LINEAR_HZ
_LOG_STEP = np.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    return float(_KNEE_MEL + np.log(hz / _KNEE_HZ) / _LOG_STEP) if hz >= _KNEE_HZ else hz / _LINEAR_HZ


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    hz: NDArray[np.float64] = np.where(mel >= _KNEE_MEL, _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_MEL)), mel * _LINEAR_HZ)
    return hz


def log_mel(samples: NDArray[np.float32], filters: NDArray[np.float32]) -> NDArray[np.float32]:
    """Whisper's features of one 30 s window (``whisper/audio.py``): padded with silence, normalised to about -1…1.

    ``samples`` float32 [n], n ≤ 480 000, 16 kHz; ``filters`` [n_mels, 201]. Returns float32 [n_mels, 3000]. Raises
    :class:`AudioError` for longer audio.
    """
    if len(samples) > WINDOW_SAMPLES:
        raise AudioError(f"the audio lasts {len(samples) / SAMPLE_RATE:.1f} s; one window holds {WINDOW_SECONDS} s.")
    # Frames that lie wholly in the padding have no power; only the others need a transform.
    voiced = min(WINDOW_FRAMES, len(samples) // HOP + PADDED_FRAMES)
    padded = np.zeros(WINDOW_SAMPLES, np.float32)
    padded[: len(samples)] = samples
    power = np.zeros((len(filters), WINDOW_FRAMES), np.float32)
    power[:, :voiced] = mel_power(np.pad(padded, N_FFT // 2, mode="reflect"), voiced, filters)
    return normalised(power, power.max())


def mel_power(samples: NDArray[np.float32], frames: int, filters: NDArray[np.float32]) -> NDArray[np.float32]:
    """Power in every mel band, float32 [n_mels, frames], of windows of 25 ms that start every 10 ms from the first sample."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, N_FFT)[: frames * HOP : HOP]
    weights = np.hanning(N_FFT + 1)[:-1]  # float64: the transform then errs less than float32 can show
    power = (np.abs(np.fft.rfft(windows * weights)) ** 2).astype(np.float32)
    groups = np.pad(power, ((0, -frames % FRAMES_A_PRODUCT), (0, 0))).reshape(-1, FRAMES_A_PRODUCT, power.shape[1])
    mel: NDArray[np.float32] = (filters @ groups.swapaxes(1, 2)).swapaxes(0, 1).reshape(len(filters), -1)
    return mel[:, :frames]


def normalised(power: NDArray[np.float32], peak: np.float32) -> NDArray[np.float32]:
    """Whisper's features from the power in the mel bands: logarithm, floor 8 below that of ``peak``, scaled to about -1…1."""
    floor = np.log10(np.maximum(peak, np.float32(MEL_FLOOR))) - np.float32(DYNAMIC_RANGE)
    logarithm = np.log10(np.maximum(power, np.float32(MEL_FLOOR)))
    features: NDArray[np.float32] = (np.maximum(logarithm, floor) + np.float32(4.0)) / np.float32(4.0)
    return features
