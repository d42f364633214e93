"""Speech from espeak-ng through ctypes: one process, one synthesiser, 16 kHz out."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import espeakng_loader
import numpy as np
import numpy.typing as npt
import soxr

SAMPLE_RATE = 16_000  # Hz

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_RATE, _PITCH, _RANGE, _WORD_GAP = 1, 3, 4, 7  # espeak_PARAMETER
_QUIET = 10 ** (-40 / 20)  # below this share of its peak, an edge of the sound is silence

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

# Accents are shared by training and clips; a speaker (an espeak-ng variant) is in one of the two.
ACCENTS = (
    *("en-us", "en-us", "en-us", "en", "en", "en-gb-x-rp"),
    *("en-gb-scotland", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029"),
)
HELD_OUT_ACCENTS = ("en-us", "en-us", "en", "en-gb-x-rp", "en-us-nyc")
TRAINED_SPEAKERS = (
    *("m1", "m2", "m3", "m5", "m6", "m7", "f1", "f3", "f4", "f5", "Alex", "Alicia", "Andrea", "Annie"),
    *("Denis", "Diogo", "Gene", "Henrique", "Jacky", "Lee", "Mario", "Michael", "Mike", "Nguyen"),
    *("RicishayMax", "RicishayMax2", "adam", "anika", "announcer", "antonio", "aunty", "belinda", "boris"),
    *("caleb", "david", "ed", "edward", "grandma", "grandpa", "gustave", "ian", "iven", "iven3", "john"),
    *("kaukovalta", "klatt", "klatt2", "klatt4", "marcelo", "max", "michel", "norbert", "pablo", "pedro"),
    *("quincy", "rob", "sandro", "shelby", "steph", "steph3", "travis", "zac"),
)
HELD_OUT_SPEAKERS = (
    *("m4", "m8", "f2", "Andy", "Hugo", "Reed", "benjamin", "edward2", "iven4", "linda", "miguel"),
    *("mike2", "paul", "robert", "steph2", "victor"),
)


@dataclass(frozen=True)
class Voice:
    """How a sentence is spoken, in espeak-ng's units."""

    name: str  # accent+variant
    rate: int  # words a minute
    pitch: int  # 0 to 99, 50 is the speaker's own
    pitch_range: int  # 0 to 99, 0 is monotone
    word_gap: int  # units of 10 ms
    stretch: float  # above 1, the whole spectrum moves down, as in a larger throat


def draw_voice(random: Random, *, held_out: bool = False) -> Voice:
    """Return a random voice of a trained-on speaker or of a held-out one."""
    accent = random.choice(HELD_OUT_ACCENTS if held_out else ACCENTS)
    speaker = random.choice(HELD_OUT_SPEAKERS if held_out else TRAINED_SPEAKERS)
    return Voice(
        name=f"{accent}+{speaker}",
        rate=random.randint(130, 200) if held_out else random.randint(115, 220),
        pitch=random.randint(35, 65) if held_out else random.randint(20, 80),
        pitch_range=random.randint(35, 65) if held_out else random.randint(20, 80),
        word_gap=random.choice((0, 0, 0, 1, 2, 4)),
        stretch=1.0 if held_out else random.uniform(0.9, 1.12),
    )


def speak(text: str, voice: Voice) -> npt.NDArray[np.float32]:
    """Return the speech as float32 [samples] at 16 kHz, peak 1, silence at both ends cut off."""
    synthesiser = _synthesiser()
    pcm = synthesiser.speak(text, voice)
    audio = soxr.resample(pcm.astype(np.float32), synthesiser.rate, SAMPLE_RATE * voice.stretch)
    return trim(audio / max(float(np.abs(audio).max()), 1.0))


def trim(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the audio [samples] from the first to the last sample that is not silence."""
    loud = np.flatnonzero(np.abs(audio) > _QUIET * np.abs(audio).max())
    return audio[loud[0] : loud[-1] + 1] if len(loud) else audio[:0]


class _Synthesiser:
    """espeak-ng's library keeps global state, so a process holds one of these."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._chunks: list[npt.NDArray[np.int16]] = []
        self._callback = _Callback(self._collect)  # kept alive: C holds only its address
        data = espeakng_loader.get_data_path().encode()
        self.rate: int = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng did not start with its data in {data.decode()}")
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: Voice) -> npt.NDArray[np.int16]:
        """Return the raw speech, int16 [samples] at the synthesiser's own rate."""
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.name!r}")
        settings = {
            _RATE: voice.rate,
            _PITCH: voice.pitch,
            _RANGE: voice.pitch_range,
            _WORD_GAP: voice.word_gap,
        }
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        return _joined(self._chunks)

    def _collect(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


@cache
def _synthesiser() -> _Synthesiser:
    return _Synthesiser()


def _joined(chunks: Sequence[npt.NDArray[np.int16]]) -> npt.NDArray[np.int16]:
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int16)
