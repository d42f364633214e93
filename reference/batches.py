"""Training batches: synthesised windows, made worse on purpose, as log-mel and tokens."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset
from transformers.audio_utils import mel_filter_bank

from reference import grammar, synth
from reference.synth import SAMPLE_RATE, Voice
from reference.tokenizer import END, NO_SPEECH, NO_TIMESTAMPS, START, TRANSCRIBE

HOP = 160  # samples between two mel frames
FFT = 400  # samples in one frame
POSITION = 2 * HOP  # samples behind one encoder position
WINDOW_SECONDS = 30
POSITIONS_A_SECOND = SAMPLE_RATE / POSITION
SLACK_SECONDS = 0.3  # what the guess at a token's place may be wrong by, and its share of the sentence's length
SLACK_SHARE = 0.1
NOWHERE = (math.nan, math.nan)
IGNORED = -100  # a label without loss
LETTERS = " abcdefghijklmnopqrstuvwxyz'"  # of the auxiliary CTC loss; its blank is 0, so letter i is i + 1

# Shares of all windows.
SPEECHLESS = 0.04
HUMAN_DIGITS = 0.04
TELEPHONE = 0.1
NOISY = 0.5
DIGITAL_SILENCE = 0.3  # of the speechless ones

Audio = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Segment:
    """One spoken sentence and where it lies in its window, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Utterance:
    """A window's audio, float32 [samples] at 16 kHz, and what is said in it."""

    audio: Audio
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum."""

    until: float  # share of the training time at which it ends
    longest: float  # seconds of speech in a window
    budget: float  # seconds of audio in a batch, padding included
    short: float  # share of one- and two-word sentences
    packed: bool  # several sentences in a window, up to a drawn length
    full: bool = False  # windows of 30 s instead of windows as long as the speech


STAGES = (
    Stage(until=0.06, longest=2.5, budget=40, short=1.0, packed=False),
    Stage(until=0.20, longest=5.0, budget=48, short=0.4, packed=False),
    Stage(until=0.44, longest=9.0, budget=56, short=0.2, packed=False),
    Stage(until=0.87, longest=20.0, budget=90, short=0.15, packed=True),
    Stage(until=1.00, longest=29.0, budget=180, short=0.15, packed=True, full=True),
)


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    mel: torch.Tensor  # float32 [batch, 80, frames]
    inputs: torch.Tensor  # int64 [batch, tokens]
    labels: torch.Tensor  # int64 [batch, tokens], IGNORED where there is no loss
    positions: torch.Tensor  # int64 [batch], encoder positions that hold a window's own audio
    spans: torch.Tensor  # float32 [batch, tokens, 2], the encoder positions in which a label is spoken; NaN where none
    letters: torch.Tensor  # int64 [all letters], the windows' texts one after another
    letter_counts: torch.Tensor  # int64 [batch]


class Batches(IterableDataset[Batch]):
    """An endless stream of batches that follows the curriculum."""

    def __init__(self, tokenizer_file: Path, progress: torch.Tensor, seed: int, *, digits: bool = True) -> None:
        """Read the stage from `progress` (float32 [1], 0 to 1), which the trainer moves."""
        self._tokenizer_file = tokenizer_file
        self._progress = progress
        self._seed = seed
        self._digits = digits

    def __iter__(self) -> Iterator[Batch]:
        random = Random(self._seed)
        tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
        takes = real_digits() if self._digits else {}
        while True:
            stage = stage_at(float(self._progress))
            drawn = [draw_utterance(random, stage, takes) for _ in range(48)]
            groups = list(_grouped(drawn, stage))
            random.shuffle(groups)
            for group in groups:
                yield collate(group, tokenizer, full=stage.full)


def stage_at(progress: float) -> Stage:
    """Return the stage of the curriculum at a share of the training time."""
    return next((stage for stage in STAGES if progress < stage.until), STAGES[-1])


def draw_utterance(random: Random, stage: Stage, takes: dict[str, list[Path]], *, held_out: bool = False) -> Utterance:
    """Return a random window: silence, real digits, or synthesised sentences, with its defects."""
    kind = random.random()
    if kind < SPEECHLESS:
        return Utterance(_nothing(random, random.uniform(0.5, stage.longest)), ())
    if kind < SPEECHLESS + HUMAN_DIGITS and takes and not held_out:
        say = _digit_speaker(random, takes)
    else:
        say = _voice_speaker(random, stage, held_out=held_out)
    return spoil(random, _spoken(random, stage, say))


def collate(group: list[Utterance], tokenizer: Tokenizer, *, full: bool) -> Batch:
    """Return a batch whose windows all have the longest one's length, or 30 s."""
    longest = max(len(utterance.audio) for utterance in group)
    samples = WINDOW_SECONDS * SAMPLE_RATE if full else math.ceil(longest / POSITION) * POSITION
    audio = np.zeros((len(group), samples), np.float32)
    for row, utterance in zip(audio, group, strict=True):
        row[: len(utterance.audio)] = utterance.audio
    pairs = [_tokens(utterance, tokenizer) for utterance in group]
    letters = [_letters(utterance) for utterance in group]
    spans = [_spans(utterance, tokenizer) for utterance in group]
    width = max(len(inputs) for inputs, _ in pairs)
    end = tokenizer.token_to_id(END)
    return Batch(
        mel=log_mel(torch.from_numpy(audio)),
        inputs=torch.tensor([i + [end] * (width - len(i)) for i, _ in pairs]),
        labels=torch.tensor([t + [IGNORED] * (width - len(t)) for _, t in pairs]),
        spans=torch.tensor([own + [NOWHERE] * (width - len(own)) for own in spans]),
        positions=torch.tensor([math.ceil(len(utterance.audio) / POSITION) for utterance in group]),
        letters=torch.tensor([letter for spelled in letters for letter in spelled], dtype=torch.int64),
        letter_counts=torch.tensor([len(spelled) for spelled in letters]),
    )


def log_mel(audio: torch.Tensor) -> torch.Tensor:
    """Return Whisper's log-mel, float32 [batch, 80, samples / 160], of float32 [batch, samples].

    Zeros behind the speech make it equal to the same frames of a 30 s window.
    """
    window = torch.hann_window(FFT)
    spectrum = torch.stft(audio, FFT, HOP, window=window, return_complex=True)[..., :-1]
    power = torch.view_as_real(spectrum).square().sum(-1)
    log = (_mel_filters() @ power).clamp(min=1e-10).log10()
    floor = log.amax(dim=(1, 2), keepdim=True) - 8.0
    return (torch.maximum(log, floor) + 4.0) / 4.0


def spoil(random: Random, utterance: Utterance) -> Utterance:
    """Return the window with a random gain, sometimes a telephone's band, sometimes noise."""
    audio = utterance.audio
    if random.random() < TELEPHONE:
        narrow = soxr.resample(audio, SAMPLE_RATE, SAMPLE_RATE // 2)
        audio = soxr.resample(narrow, SAMPLE_RATE // 2, SAMPLE_RATE)[: len(audio)]
    if random.random() < NOISY:
        audio = with_noise(random, audio, random.uniform(8, 40))
    gain = 10 ** (-random.uniform(0, 24) / 20)
    return Utterance((audio * np.float32(gain)).clip(-1, 1), utterance.segments)


def with_noise(random: Random, audio: Audio, decibels: float) -> Audio:
    """Return the audio [samples] with noise at a ratio of mean powers."""
    hiss = noise(random, len(audio))
    ratio = np.sqrt(np.mean(audio**2) / np.mean(hiss**2)) * 10 ** (-decibels / 20)
    return audio + hiss * np.float32(ratio)


def noise(random: Random, samples: int) -> Audio:
    """Return noise float32 [samples] between white and brown, standard deviation about 1."""
    generator = np.random.default_rng(random.getrandbits(32))
    length = 1 << max(samples - 1, 1).bit_length()  # a length that the FFT is fast at
    spectrum = np.fft.rfft(generator.standard_normal(length, np.float32))
    slope = np.arange(1, len(spectrum) + 1) ** -random.choice((0.0, 0.0, 0.5, 1.0))
    coloured = np.fft.irfft(spectrum * slope.astype(np.float32), length)[:samples]
    return (coloured / max(float(coloured.std()), 1e-9)).astype(np.float32)


def real_digits() -> dict[str, list[Path]]:
    """Return the human takes of the digits by speaker; empty where the data is not there."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ASR_EXPORT_DATA", default)) / "fsdd"
    takes: dict[str, list[Path]] = {}
    for take in sorted(folder.glob("*.wav")):
        takes.setdefault(take.stem.split("_")[1], []).append(take)
    return takes


Say = Callable[[], tuple[str, Audio]]


def _voice_speaker(random: Random, stage: Stage, *, held_out: bool) -> Say:
    voice: Voice = synth.draw_voice(random, held_out=held_out)

    def say() -> tuple[str, Audio]:
        rule = "short" if random.random() < stage.short else "sentence"
        text = grammar.draw(random, rule, held_out=held_out)
        return text, synth.speak(text, voice)

    return say


def _digit_speaker(random: Random, takes: dict[str, list[Path]]) -> Say:
    chosen = takes[random.choice(sorted(takes))]

    def say() -> tuple[str, Audio]:
        while True:
            parts = random.choices(chosen, k=random.randint(1, 5))
            text = " ".join(_DIGITS[int(part.stem[0])] for part in parts)
            if not grammar.is_held_out(text):
                return text, _joined_takes(random, parts)

    return say


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _joined_takes(random: Random, parts: list[Path]) -> Audio:
    pieces: list[Audio] = []
    for part in parts:
        audio, rate = soundfile.read(part, dtype="float32")
        speech = synth.trim(soxr.resample(audio, rate, SAMPLE_RATE))
        pieces += [speech / max(float(np.abs(speech).max()), 1e-3), _silence(random, 0.02, 0.3)]
    return np.concatenate(pieces[:-1])


def _spoken(random: Random, stage: Stage, say: Say) -> Utterance:
    """Return sentences with gaps: one, or as many as fill a drawn length."""
    wanted = random.uniform(1.0, stage.longest) if stage.packed else 0.0
    pieces = [_silence(random, 0.0, random.choice((0.3, 0.6, 1.0)))]
    segments: list[Segment] = []
    seconds = len(pieces[0]) / SAMPLE_RATE
    while not segments or seconds < wanted:
        text, speech = say()
        gap = _silence(random, 0.1, random.choice((0.3, 0.6, 1.2)))
        spoken = len(speech) / SAMPLE_RATE
        if seconds + spoken > stage.longest:
            if segments:
                break
            continue  # never half a sentence: another one is shorter
        segments.append(Segment(seconds, seconds + spoken, text))
        pieces += [speech, gap]
        seconds += spoken + len(gap) / SAMPLE_RATE
    audio = np.concatenate(pieces)[: int(stage.longest * SAMPLE_RATE)]
    return Utterance(audio, tuple(segments))


def _silence(random: Random, least: float, most: float) -> Audio:
    return np.zeros(int(random.uniform(least, most) * SAMPLE_RATE), np.float32)


def _nothing(random: Random, seconds: float) -> Audio:
    """Return a window without speech: digital silence, or noise at any level."""
    samples = int(seconds * SAMPLE_RATE)
    if random.random() < DIGITAL_SILENCE:
        return np.zeros(samples, np.float32)
    level = 10 ** (-random.uniform(6, 70) / 20)
    return (noise(random, samples) * np.float32(level)).clip(-1, 1)


def _grouped(drawn: list[Utterance], stage: Stage) -> Iterator[list[Utterance]]:
    """Yield groups of about equal lengths that fit the stage's budget."""
    group: list[Utterance] = []
    for utterance in sorted(drawn, key=lambda u: len(u.audio)):
        seconds = WINDOW_SECONDS if stage.full else len(utterance.audio) / SAMPLE_RATE
        if group and (len(group) + 1) * seconds > stage.budget:
            yield group
            group = []
        group.append(utterance)
    yield group


def _tokens(utterance: Utterance, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return decoder inputs and labels, one label for each input."""
    prompt = _ids(tokenizer, START, "<|en|>", TRANSCRIBE, NO_TIMESTAMPS)
    text = _ids(tokenizer, *(f" {segment.text}" for segment in utterance.segments))
    sequence = [*prompt, *text, *_ids(tokenizer, END)]
    labels = sequence[1:]
    labels[2] = IGNORED  # with timestamps or without is the caller's choice, not a guess
    if not utterance.segments:
        labels[:2] = [*_ids(tokenizer, NO_SPEECH), IGNORED]
    return sequence[:-1], labels


def _spans(utterance: Utterance, tokenizer: Tokenizer) -> list[tuple[float, float]]:
    """Return roughly where each label is spoken, in encoder positions, taking a sentence's letters to be equally long."""
    spans = [NOWHERE] * 3  # the labels of the prompt
    for segment in utterance.segments:
        duration = segment.end - segment.start
        slack = SLACK_SECONDS + SLACK_SHARE * duration
        ids = _ids(tokenizer, f" {segment.text}")
        lengths = [len(tokenizer.decode([index])) for index in ids]
        scale, spoken = duration / sum(lengths), 0
        for length in lengths:
            middle = segment.start + (spoken + length / 2) * scale
            spoken += length
            spans.append((POSITIONS_A_SECOND * (middle - slack), POSITIONS_A_SECOND * (middle + slack)))
    return [*spans, NOWHERE]  # the end is not spoken


def _letters(utterance: Utterance) -> list[int]:
    text = " ".join(segment.text for segment in utterance.segments)
    return [LETTERS.index(letter) + 1 for letter in text]


def _ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    encoded: list[int] = tokenizer.encode("".join(texts), add_special_tokens=False).ids
    return encoded


@cache
def _mel_filters() -> torch.Tensor:
    filters = mel_filter_bank(
        num_frequency_bins=FFT // 2 + 1,
        num_mel_filters=80,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters.T.astype(np.float32))
