"""Decode any audio file to mono 16 kHz and turn it into Whisper's log-mel features, in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
MEL_FLOOR = 1e-10  # power, before the logarithm
DYNAMIC_RANGE = 8.0  # log10 units below the window's maximum that survive


def load_audio(path: str | Path) -> NDArray[np.float32]:
    """Decode a file of any container, rate and channel count.

    Returns float32 samples [n] in -1…1, mono, 16 kHz. Raises :class:`AudioError` where the file is missing, empty, not
    audio, or holds NaN.
    """
    import av

    path = Path(path)
    if not path.exists():
        raise AudioError(f"{path}: no such file.")
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioError(f"{path} holds no audio stream.")
            # Channels are averaged below: FFmpeg's own mix to mono is √2 louder than their mean in float samples.
            resampler = av.AudioResampler(format="fltp", rate=SAMPLE_RATE)
            frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
            frames += resampler.resample(None) if frames else []
    except (av.FFmpegError, OSError) as error:
        raise AudioError(f"{path} is not audio that can be decoded ({error.strerror}).") from error
    if not frames:
        raise AudioError(f"{path} is empty: it holds no audio samples.")
    samples: NDArray[np.float32] = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in frames])
    if not np.isfinite(samples).all():
        raise AudioError(f"{path} holds NaN or infinite samples.")
    return samples


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
    voiced = min(WINDOW_FRAMES, len(samples) // HOP + 3)
    padded = np.zeros(WINDOW_SAMPLES, np.float32)
    padded[: len(samples)] = samples
    padded = np.pad(padded, N_FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[: voiced * HOP : HOP]
    window = np.hanning(N_FFT + 1)[:-1]  # float64: the transform then errs less than float32 can show
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    mel = np.full((len(filters), WINDOW_FRAMES), np.log10(MEL_FLOOR), np.float32)
    mel[:, :voiced] = np.log10(np.maximum(filters @ power.T.astype(np.float32), MEL_FLOOR))
    normalised: NDArray[np.float32] = (np.maximum(mel, mel.max() - DYNAMIC_RANGE) + 4.0) / 4.0
    return normalised
