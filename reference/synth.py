"""Speech from espeak-ng through ctypes: one process, one synthesiser, 16 kHz out, with the times of words and sounds."""

import ctypes
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from zlib import crc32

import espeakng_loader
import numpy as np
import numpy.typing as npt
import soxr

SAMPLE_RATE = 16_000  # Hz

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_PHONEME_EVENTS = 1  # espeak_Initialize's option
_POSITION_CHARACTER = 1
_LIST_END, _WORD, _PHONEME = 0, 1, 7  # espeak_EVENT_TYPE
_RATE, _PITCH, _RANGE, _WORD_GAP = 1, 3, 4, 7  # espeak_PARAMETER
_QUIET = 10 ** (-40 / 20)  # below this share of its peak, an edge of the sound is silence

# A phoneme's class is its name's hash: two names in one class do no harm where it is used, as an auxiliary target. Class 0
# is silence.
PHONEME_CLASSES = 128


class _Event(ctypes.Structure):
    """espeak_EVENT."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))

# Accents are shared by training and clips; a speaker (an espeak-ng variant) is in one of the two.
ACCENTS = {"en": ("en-us", "en-us", "en", "en-gb-x-rp"), "es": ("es", "es-419")}
TRAINED_SPEAKERS = (
    *("m1", "m2", "m3", "m5", "m6", "m7", "f1", "f3", "f4", "f5", "Alex", "Andrea", "Annie", "Mario"),
    *("Denis", "Henrique", "ed", "paul", "pedro", "sandro"),
)
HELD_OUT_SPEAKERS = ("m4", "f2", "Gene", "linda")


@dataclass(frozen=True)
class Voice:
    """How a sentence is spoken, in espeak-ng's units."""

    name: str  # accent+variant
    rate: int  # words a minute
    pitch: int  # 0 to 99, 50 is the speaker's own
    pitch_range: int  # 0 to 99, 0 is monotone
    word_gap: int  # units of 10 ms


@dataclass(frozen=True)
class Speech:
    """A spoken text: float32 [samples] at 16 kHz, and when what is said, in seconds."""

    audio: npt.NDArray[np.float32]
    words: tuple[tuple[float, float], ...]  # start and end of each word of the text
    sounds: tuple[tuple[float, int], ...]  # start and class of each phoneme


def draw_voice(random: Random, language: str, *, held_out: bool = False) -> Voice:
    """Return a random voice of a trained-on speaker or of a held-out one."""
    accent = random.choice(ACCENTS[language])
    speaker = random.choice(HELD_OUT_SPEAKERS if held_out else TRAINED_SPEAKERS)
    return Voice(
        name=f"{accent}+{speaker}",
        rate=random.randint(140, 185) if held_out else random.randint(130, 195),
        pitch=random.randint(40, 60) if held_out else random.randint(30, 70),
        pitch_range=random.randint(40, 60) if held_out else random.randint(30, 70),
        word_gap=random.choice((0, 0, 0, 1, 2)),
    )


def speak(text: str, voice: Voice) -> Speech:
    """Return the speech with peak 1 and the silence at both ends cut off."""
    synthesiser = _synthesiser()
    pcm, words, sounds = synthesiser.speak(text, voice)
    audio = soxr.resample(pcm.astype(np.float32), synthesiser.rate, SAMPLE_RATE)
    first, last = _loud_part(audio)
    end = (last - first) / SAMPLE_RATE

    def seconds(sample: int) -> float:
        return min(max(sample / synthesiser.rate - first / SAMPLE_RATE, 0.0), end)

    return Speech(
        audio=audio[first:last] / max(float(np.abs(audio).max()), 1.0),
        words=tuple((seconds(start), seconds(stop)) for start, stop in _word_spans(text, words, len(pcm))),
        sounds=tuple((seconds(start), sound) for start, sound in sounds),
    )


def _loud_part(audio: npt.NDArray[np.float32]) -> tuple[int, int]:
    loud = np.flatnonzero(np.abs(audio) > _QUIET * np.abs(audio).max())
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, 0)


def _word_spans(text: str, events: Sequence[tuple[int, int]], samples: int) -> list[tuple[int, int]]:
    """Return the first sample of each word and the first behind it, from (text position, sample) of the words' events.

    espeak-ng joins some words into one event; they all get its span.
    """
    offsets = [place for place, _ in enumerate(text) if place == 0 or text[place - 1] == " "]
    starts = {max(bisect_right(offsets, position - 1) - 1, 0): sample for position, sample in reversed(events)}
    known = sorted(starts) or [0]
    spans = []
    for word in range(len(offsets)):
        place = max(bisect_right(known, word) - 1, 0)
        stop = starts[known[place + 1]] if place + 1 < len(known) else samples
        spans.append((starts.get(known[place], 0), stop))
    return spans


class _Synthesiser:
    """espeak-ng's library keeps global state, so a process holds one of these."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._chunks: list[npt.NDArray[np.int16]] = []
        self._words: list[tuple[int, int]] = []
        self._sounds: list[tuple[int, int]] = []
        self._callback = _Callback(self._collect)  # kept alive: C holds only its address
        data = espeakng_loader.get_data_path().encode()
        self.rate: int = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _PHONEME_EVENTS)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng did not start with its data in {data.decode()}")
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: Voice) -> tuple[npt.NDArray[np.int16], list[tuple[int, int]], list[tuple[int, int]]]:
        """Return the raw speech, int16 [samples] at the synthesiser's own rate, and its events.

        Words are (text position, sample), sounds (sample, class).
        """
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
        for collected in (self._chunks, self._words, self._sounds):
            collected.clear()
        self._library.espeak_ng_SetRandSeed(0)  # some voices tremble at random
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        return _joined(self._chunks), list(self._words), list(self._sounds)

    def _collect(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]") -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events and events[index].type != _LIST_END:
            event = events[index]
            if event.type == _WORD:
                self._words.append((event.text_position, event.sample))
            elif event.type == _PHONEME:
                self._sounds.append((event.sample, _sound_class(event.name)))
            index += 1
        return 0


@cache
def _sound_class(name: bytes) -> int:
    """Return the class of a phoneme by its name without stress marks; pauses begin with `_`."""
    sound = name.lstrip(b"',")
    return 0 if sound.startswith(b"_") else 1 + crc32(sound) % (PHONEME_CLASSES - 1)


@cache
def _synthesiser() -> _Synthesiser:
    return _Synthesiser()


def _joined(chunks: Sequence[npt.NDArray[np.int16]]) -> npt.NDArray[np.int16]:
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int16)
