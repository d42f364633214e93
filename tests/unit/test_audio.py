from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from asr_core import audio
from asr_core.errors import AudioError

# The oracles transform in float32: their rounding, relative to the loudest bin of a frame, is 4e-5 in the log of its
# quietest bins. Ours transforms in float64, and is held to 1e-6 of a float64 oracle below.
ORACLE_ROUNDING = 1e-4


def noise(seconds: float) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=int(seconds * 16000)) * 0.1).astype(np.float32)


def tone(seconds: float) -> np.ndarray:
    return np.sin(np.arange(int(seconds * 16000)) * 0.1).astype(np.float32)


SOUNDS = {
    "one sample": np.array([0.5], np.float32),
    "silence": np.zeros(8000, np.float32),
    "short noise": noise(1.03),
    "tone": tone(7.7),
    "exactly 30 s": noise(30),
}


@pytest.mark.parametrize("n_mels", [80, 128])
def test_mel_filters_are_openai_whispers(n_mels):
    import whisper

    theirs = np.load(Path(whisper.__file__).parent / "assets" / "mel_filters.npz")[f"mel_{n_mels}"]
    np.testing.assert_allclose(audio.mel_filters(n_mels), theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("name", SOUNDS)
def test_log_mel_is_openai_whispers_and_transformers(name, n_mels):
    check_log_mel(SOUNDS[name], n_mels)


def test_log_mel_of_real_speech(recordings):
    check_log_mel(audio.load_audio(recordings / "jfk" / "jfk.flac"), 80)
    check_log_mel(audio.load_audio(recordings / "cards" / "005.wav"), 128)


def check_log_mel(samples, n_mels):
    import whisper
    from transformers import WhisperFeatureExtractor

    ours = audio.log_mel(samples, audio.mel_filters(n_mels))
    openai = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples), n_mels).numpy()
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    transformers = extractor(samples, sampling_rate=16000, return_tensors="np").input_features[0]
    assert ours.shape == (n_mels, 3000)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, openai, rtol=0, atol=ORACLE_ROUNDING)
    np.testing.assert_allclose(ours, transformers, rtol=0, atol=ORACLE_ROUNDING)


@pytest.mark.parametrize("name", SOUNDS)
def test_log_mel_is_exact(name):
    import torch

    samples = torch.nn.functional.pad(torch.from_numpy(SOUNDS[name]).double(), (0, 480000 - len(SOUNDS[name])))
    window = torch.hann_window(400, dtype=torch.float64)
    power = torch.stft(samples, 400, 160, window=window, return_complex=True)[..., :-1].abs() ** 2
    mel = (torch.from_numpy(audio.mel_filters(80)).double() @ power).clamp(min=1e-10).log10()
    expected = (mel.clamp(min=mel.max() - 8) + 4) / 4
    # 1e-6: float32 results of about 1, through a product with float32 filters.
    np.testing.assert_allclose(audio.log_mel(SOUNDS[name], audio.mel_filters(80)), expected, rtol=0, atol=1e-6)


def test_log_mel_refuses_more_than_a_window():
    with pytest.raises(AudioError, match=r"lasts 30\.0 s; one window holds 30 s"):
        audio.log_mel(np.zeros(480001, np.float32), audio.mel_filters(80))


def chord(rate: int, seconds: float = 1.5) -> np.ndarray:
    """Tones below 3 kHz, so that resamplers of any steepness must agree away from the edges."""
    time = np.arange(int(rate * seconds)) / rate
    return sum(0.2 * np.sin(2 * np.pi * hertz * time) for hertz in (110, 440, 1234, 2900))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_24")])
def test_load_audio_resamples_and_mixes_down(tmp_path, rate, channels, suffix, subtype):
    signal = chord(rate)
    # Two unequal channels whose mean is the signal.
    stereo = np.stack([1.5 * signal, 0.5 * signal], axis=1)
    path = tmp_path / f"sound.{suffix}"
    soundfile.write(path, signal if channels == 1 else stereo, rate, subtype=subtype)
    mono = soundfile.read(path, always_2d=True)[0].mean(axis=1)
    expected = resample_poly(mono, 16000, rate)
    loaded = audio.load_audio(path)
    assert loaded.dtype == np.float32
    assert abs(len(loaded) - len(expected)) <= 1
    # -46 dB: the filters' different flatness in the pass band, worst at 8 kHz where 2.9 kHz lies near the edge.
    np.testing.assert_allclose(loaded[400:-400], expected[: len(loaded)][400:-400], atol=5e-3)


def test_load_audio_of_one_rate_is_soundfiles(clips):
    for clip in clips[:3]:
        samples, rate = soundfile.read(clip, dtype="float32")
        assert rate == 16000
        np.testing.assert_allclose(audio.load_audio(clip), samples, rtol=0, atol=1e-7)


def test_load_audio_of_a_real_stereo_file(recordings):
    samples, rate = soundfile.read(recordings / "jfk" / "jfk.flac")
    expected = resample_poly(samples.mean(axis=1), 16000, rate)
    loaded = audio.load_audio(recordings / "jfk" / "jfk.flac")
    assert len(loaded) == len(expected)
    # The two filters differ near 8 kHz, where speech has little: -40 dB of the signal's power.
    assert np.square(loaded - expected).mean() < 1e-4 * np.square(expected).mean()


@pytest.mark.parametrize("suffix", ["mp3", "ogg", "aiff"])
def test_load_audio_of_other_containers(tmp_path, suffix):
    path = tmp_path / f"sound.{suffix}"
    soundfile.write(path, chord(16000), 16000)
    loaded = audio.load_audio(path)
    # Lossy codecs add up to two frames of padding and change the wave, not its power.
    assert 0 <= len(loaded) - 24000 <= 2304
    assert np.square(loaded).mean() == pytest.approx(np.square(chord(16000)).mean(), rel=0.1)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_thirty_seconds_at_any_rate_fit_one_window(tmp_path, rate):
    path = tmp_path / "sound.wav"
    soundfile.write(path, chord(rate, 30), rate)
    loaded = audio.load_audio(path)
    assert len(loaded) == audio.WINDOW_SAMPLES


def write_bad_audio(path: Path, kind: str) -> None:
    match kind:
        case "nothing":
            path.write_bytes(b"")
        case "text":
            path.write_text("These are words, not sounds.\n" * 100)
        case "noise bytes":
            path.write_bytes(np.random.default_rng(0).bytes(10_000))
        case "no samples":
            soundfile.write(path, np.zeros(0), 16000)
        case "header only":
            soundfile.write(path, chord(16000), 16000)
            path.write_bytes(path.read_bytes()[:20])
        case "nan":
            soundfile.write(path, np.array([0.1, np.nan, 0.2] * 1000), 16000, subtype="FLOAT")
        case "infinity":
            soundfile.write(path, np.array([0.1, np.inf, 0.2] * 1000), 16000, subtype="FLOAT")
        case "folder":
            path.mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("nothing", "can be decoded"),
        ("text", "can be decoded"),
        ("noise bytes", "can be decoded"),
        ("header only", "can be decoded|is empty"),
        ("folder", "can be decoded"),
        ("no samples", "is empty"),
        ("nan", "NaN or infinite"),
        ("infinity", "NaN or infinite"),
    ],
)
def test_load_audio_says_what_is_wrong(tmp_path, kind, message):
    path = tmp_path / "sound.wav"
    write_bad_audio(path, kind)
    with pytest.raises(AudioError, match=message) as raised:
        audio.load_audio(path)
    assert str(path) in str(raised.value)


def test_load_audio_wants_an_audio_stream(tmp_path):
    import av

    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(AudioError, match="no audio stream"):
        audio.load_audio(path)
