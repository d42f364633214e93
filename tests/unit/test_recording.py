"""Features and voice detection of streams, damaged files, memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_core import audio, vad
from asr_core.audio import AudioReader
from asr_core.errors import AudioError, UnavailableError
from asr_core.recording import Recording
from asr_core.vad import VoiceDetector

FILTERS = audio.mel_filters(80)


def noise(seconds: float) -> np.ndarray:
    """Louder and louder, so that the maximum of the whole lies at its end; as a 16-bit file holds it."""
    samples = np.random.default_rng(0).normal(size=round(seconds * 16000)) * 0.1
    return (np.round(samples * np.linspace(0.001, 1, len(samples)) * 32768) / 32768).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 200, 201, 399, 16000, 160_001, 400_777])
def test_features_are_openai_whispers_of_the_whole_file(tmp_path, samples):
    import whisper

    sound = noise(samples / 16000)
    soundfile.write(tmp_path / "sound.wav", sound, 16000)
    expected = whisper.log_mel_spectrogram(sound, 80, padding=480_000).numpy()
    with Recording(tmp_path / "sound.wav", FILTERS) as recording:
        assert recording.frames == expected.shape[1] - 3000
        # 1e-4: the rounding of their float32 transform, as in the test of one window.
        np.testing.assert_allclose(recording.features(0, expected.shape[1]), expected, rtol=0, atol=1e-4)
        middle = recording.frames // 2
        np.testing.assert_array_equal(recording.features(middle, middle + 50), recording.features(0, middle + 50)[:, middle:])


def test_silence_is_kept_as_a_hole(tmp_path):
    silence = np.zeros(20 * 16000, np.float32)
    soundfile.write(tmp_path / "sound.wav", np.concatenate([silence, noise(1), silence]), 16000)
    with Recording(tmp_path / "sound.wav", FILTERS) as recording:
        features = recording.features(0, 4200)
    floor = features[:, :1000]
    assert (floor == floor[0, 0]).all()
    assert (features[:, 2200:] == floor[0, 0]).all()
    assert (features[:, 2000:2100] > floor[0, 0]).any()


@pytest.mark.parametrize(("rate", "channels"), [(4000, 1), (4000, 2), (44100, 12), (192_000, 1)])
def test_odd_rates_and_channels(tmp_path, rate, channels):
    """What all channels share arrives; what two of them have against each other does not."""
    tone = 0.2 * np.sin(2 * np.pi * 440 * np.arange(rate * 2) / rate)
    sound = np.repeat(tone[:, None], channels, axis=1)
    if channels > 1:
        sound[:, 0], sound[:, -1] = sound[:, 0] + 0.3, sound[:, -1] - 0.3
    soundfile.write(tmp_path / "sound.wav", sound, rate)
    loaded = audio.load_audio(tmp_path / "sound.wav")
    assert len(loaded) == pytest.approx(32_000, abs=1)
    expected = 0.2 * np.sin(2 * np.pi * 440 * np.arange(len(loaded)) / 16000)
    np.testing.assert_allclose(loaded[400:-400], expected[400:-400], atol=5e-3)


SECONDS, DAMAGE = 30, (0.4, 0.6)


def damaged(folder: Path, suffix: str) -> Path:
    """A file whose middle fifth is overwritten with random bytes."""
    path = folder / f"sound.{suffix}"
    if suffix == "m4a":
        write_m4a(path)
    else:
        soundfile.write(path, noise(SECONDS), 16000)
    content = bytearray(path.read_bytes())
    first, last = (int(len(content) * share) for share in DAMAGE)
    content[first:last] = np.random.default_rng(1).bytes(last - first)
    path.write_bytes(content)
    return path


def write_m4a(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = noise(SECONDS)
        for start in range(0, len(sound) - 1024, 1024):
            frame = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", ["flac", "ogg", "m4a"])
def test_a_damaged_middle_is_silence_and_named(tmp_path, suffix):
    path = damaged(tmp_path, suffix)
    reader = AudioReader(path)
    samples = np.concatenate(list(reader.blocks()))
    assert len(samples) == pytest.approx(SECONDS * 16000, abs=3000)
    start, end = reader.gaps[0].start, reader.gaps[-1].end
    # The bytes are a fifth of the file; louder parts take more of them, and a container loses what shares a page.
    assert 0.15 * SECONDS < end - start < 0.5 * SECONDS
    assert not samples[round(start * 16000) + 2000 : round(end * 16000) - 2000].any()
    after = slice(round(end * 16000) + 4000, SECONDS * 16000 - 4000)
    # What follows the damage stands where it was: an offset of 10 ms would leave nothing in common.
    assert np.corrcoef(samples[after], noise(SECONDS)[after])[0, 1] > 0.5
    with pytest.raises(AudioError, match=r"is damaged: .*s cannot be decoded"):
        audio.load_audio(path)


def test_a_cut_end_is_named(tmp_path):
    path = tmp_path / "sound.flac"
    soundfile.write(path, noise(SECONDS), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Recording(path, FILTERS) as recording:
        assert recording.duration_s < SECONDS - 1
        assert recording.gaps[-1].start == pytest.approx(recording.duration_s, abs=0.01)
        assert recording.gaps[-1].end == pytest.approx(SECONDS, abs=0.01)


@pytest.fixture(scope="module")
def spoken(clips) -> np.ndarray:
    """Carried clips with pauses of all lengths, then three without any, longer together than a window."""
    random = np.random.default_rng(0)
    pieces = [np.concatenate([audio.load_audio(clip), np.zeros(round(random.uniform(0.1, 4) * 16000))]) for clip in clips[:8]]
    dense = np.concatenate([audio.load_audio(clip)[2000:-2000] for clip in clips[8:20]])
    return np.concatenate([*pieces, dense]).astype(np.float32)


def test_voice_is_where_faster_whisper_finds_it(spoken):
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    detector = VoiceDetector()
    for start in range(0, len(spoken), 7777):
        detector.hear(spoken[start : start + 7777])
    found = detector.clips()
    theirs = get_speech_timestamps(spoken.copy(), VadOptions(max_speech_duration_s=30, min_silence_duration_ms=160))
    expected = vad.merged([(speech["start"], speech["end"]) for speech in theirs])
    assert len(expected) > 1
    assert found == [(start / 16000, end / 16000) for start, end in expected]
    assert max(end - start for start, end in found) <= 30


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_is_faster_whispers_on_any_probabilities(monkeypatch, seed):
    """Slow and fast changes, so that stretches of speech are cut, joined and dropped in every way."""
    from faster_whisper import vad as theirs

    random = np.random.default_rng(seed)
    steps = np.repeat(random.uniform(0, 1, 400), random.integers(1, 60, 400))[:6000]
    probabilities = np.clip(steps + random.normal(size=len(steps)) * 0.1 + 0.25 * (seed % 2), 0, 1).astype(np.float32)
    samples = len(probabilities) * vad.CHUNK - 100
    monkeypatch.setattr(theirs, "get_vad_model", lambda: lambda padded: probabilities)
    options = theirs.VadOptions(max_speech_duration_s=30, min_silence_duration_ms=160)
    expected = theirs.get_speech_timestamps(np.zeros(samples, np.float32), options)
    assert vad.speech(probabilities, samples) == [(speech["start"], speech["end"]) for speech in expected]


def test_silence_has_no_voice():
    detector = VoiceDetector()
    detector.hear(np.zeros(100_000, np.float32))
    assert detector.clips() == []
    assert VoiceDetector().clips() == []


def test_voice_detection_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(vad.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"asr-export\[vad\]"):
        VoiceDetector()


MEMORY = """
import resource, sys
import numpy as np
from asr_core import audio, recording
from asr_core.recording import Recording

class Reader:
    gaps = ()
    def __init__(self, path): self.minutes = int(path)
    def blocks(self):
        random = np.random.default_rng(0)
        second = random.normal(size=16000).astype(np.float32)
        for _ in range(self.minutes * 60): yield second

recording.AudioReader = Reader
with Recording(sys.argv[1], audio.mel_filters(80)) as talk:
    for start in range(0, talk.frames, 3000): talk.features(start, min(start + 3000, talk.frames))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_file():
    """Peak memory in kB of a process of its own that streams 2 and 40 minutes; as float32, 38 minutes are 146 MB."""
    peaks = [
        int(subprocess.run([sys.executable, "-c", MEMORY, str(minutes)], capture_output=True, text=True, check=True).stdout)
        for minutes in (2, 40)
    ]
    assert peaks[1] - peaks[0] < 20_000
