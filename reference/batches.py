"""Training batches: synthesised windows, made worse on purpose, as log-mel and tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset
from transformers.audio_utils import mel_filter_bank

from reference import grammar, synth
from reference.grammar import Pair
from reference.synth import SAMPLE_RATE, Speech
from reference.tokenizer import (
    END,
    NO_SPEECH,
    NO_TIMESTAMPS,
    PREVIOUS,
    START,
    TIME_STEP,
    TIMESTAMP_TOKENS,
    TRANSCRIBE,
    TRANSLATE,
)

HOP = 160  # samples between two mel frames
FFT = 400  # samples in one frame
POSITION = 2 * HOP  # samples behind one encoder position
WINDOW_SECONDS = 30
POSITIONS = WINDOW_SECONDS * SAMPLE_RATE // POSITION
POSITIONS_A_SECOND = SAMPLE_RATE / POSITION
# Whisper's decoding rules allow no first timestamp above 1 s; a window that begins with more silence says 1 s.
LATEST_START = 1.0
SLACK_SECONDS = 0.06  # around a token's place in time, where attention to it is right too
NOWHERE = (math.nan, math.nan)
IGNORED = -100  # a label without loss

# Shares of all windows, or of those that the comment names.
SPEECHLESS = 0.05
DIGITAL_SILENCE = 0.3  # of the speechless ones
NOISY = 0.4
SPANISH = 0.5
TRANSLATED = 0.25  # of the Spanish ones; Whisper translates into English only
ENGLISH_TRANSLATED = 0.04  # of the English ones: into the same words
TIMESTAMPED = 0.5
PREVIOUS_TEXT = 0.12  # of the windows of stages that have it
PREVIOUS_OF_FULL = 0.12  # of the windows of 30 s
PREVIOUS_TOKENS = 223  # at most: Whisper's decoding keeps the last ones
CUT = 0.5  # of the full windows with timestamps: the last sentence goes on behind the window's end
LATE = 0.2  # speech may begin late, up to the middle of the window
LONG_PAUSES = 0.3  # of the windows with several sentences: up to 8 s
SHIFTED = 0.4  # of the windows that are shorter than 30 s: they lie anywhere in those

Audio = npt.NDArray[np.float32]
Span = tuple[float, float]


@dataclass(frozen=True)
class Take:
    """One sentence as spoken once."""

    pair: Pair
    language: str
    speech: Speech

    @property
    def seconds(self) -> float:
        """The speech's length."""
        return len(self.speech.audio) / SAMPLE_RATE


@dataclass(frozen=True)
class Segment:
    """A take and where it lies in its window, in seconds; it may end behind the window."""

    start: float
    take: Take

    @property
    def end(self) -> float:
        """Where its last sound ends."""
        return self.start + self.take.seconds


@dataclass(frozen=True)
class Utterance:
    """A window: audio, float32 [samples] at 16 kHz, what is said in it, and what is asked for."""

    audio: Audio
    segments: tuple[Segment, ...]
    language: str
    translated: bool = False
    timestamps: bool = False
    previous: tuple[Take, ...] = ()
    first: int = 0  # encoder positions that are left out before the audio, taken as silent

    @property
    def target(self) -> str:
        """The language of the text."""
        return "en" if self.translated else self.language


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum."""

    until: float  # share of the training at which it ends
    longest: float  # seconds of speech in a window
    budget: float  # seconds of audio in a batch, padding included
    single: float  # share of single words
    shuffled: float  # share of words in any order
    repeated: float = 0.0  # share of sentences with a word twice in a row
    packed: bool = False  # several sentences in a window, up to a drawn length
    previous: bool = False  # some windows continue a text
    full: bool = False  # windows of 30 s instead of windows as long as the speech


STAGES = (
    Stage(until=0.06, longest=2.0, budget=30, single=0.8, shuffled=0.2),
    Stage(until=0.27, longest=5.0, budget=40, single=0.2, shuffled=0.4),
    Stage(until=0.37, longest=8.0, budget=50, single=0.1, shuffled=0.3, packed=True),
    Stage(until=0.49, longest=13.0, budget=70, single=0.08, shuffled=0.25, packed=True, previous=True),
    Stage(until=0.62, longest=20.0, budget=90, single=0.08, shuffled=0.2, packed=True, previous=True),
    Stage(until=0.72, longest=29.0, budget=120, single=0.08, shuffled=0.15, packed=True, previous=True),
    Stage(until=1.00, longest=30.0, budget=180, single=0.05, shuffled=0.12, repeated=0.12, packed=True, previous=True, full=True),
)


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    mel: torch.Tensor  # float32 [batch, 80, frames]
    first: torch.Tensor  # int64 [batch], the encoder position of each window's first frame
    inputs: torch.Tensor  # int64 [batch, tokens]
    labels: torch.Tensor  # int64 [batch, tokens], IGNORED where there is no loss
    spans: torch.Tensor  # float32 [batch, tokens, 2], the frames' positions in which a label is spoken; NaN where none
    sounds: torch.Tensor  # int64 [batch, positions], the phoneme's class, IGNORED behind a window's own audio
    pieces: torch.Tensor  # int64 [batch, positions], the token that is being spoken, IGNORED where none is
    seconds: float  # of audio, padding included


class Pool:
    """Sentences spoken before, to be heard again in other windows: synthesis would take as long as learning."""

    SIZE = 3_000
    FRESH = 0.15

    def __init__(self, random: Random, *, held_out: bool = False) -> None:
        """Draw from the trained-on voices and sentences or from the held-out ones."""
        self._random = random
        self._held_out = held_out
        self._takes: dict[tuple[str, str], list[Take]] = {}

    def draw(self, language: str, rule: str) -> Take:
        """Return a take, new or known."""
        takes = self._takes.setdefault((language, rule), [])
        known = len(takes) >= self.SIZE
        if takes and self._random.random() > max(self.FRESH, 1 - 2 * len(takes) / self.SIZE):
            return self._random.choice(takes)
        take = self._speak(language, rule)
        if known:
            takes[self._random.randrange(len(takes))] = take
        else:
            takes.append(take)
        return take

    def _speak(self, language: str, rule: str) -> Take:
        voice = synth.draw_voice(self._random, language, held_out=self._held_out)
        pair = grammar.draw(self._random, rule, held_out=self._held_out)
        return Take(pair, language, synth.speak(pair[language].text, voice))


class Progress(Protocol):
    """What a trainer shares with the process that makes its batches."""

    value: float  # share of the training


class Batches(IterableDataset[Batch]):
    """An endless stream of batches that follows the curriculum."""

    def __init__(self, tokenizer_file: Path, progress: "Progress", seed: int) -> None:
        """Follow a training's progress, a share that its process writes down."""
        self._tokenizer_file = tokenizer_file
        self._progress = progress
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        random = Random(self._seed)
        writer = Writer(Tokenizer.from_file(str(self._tokenizer_file)))
        pool = Pool(random)
        while True:
            stage = stage_at(self._progress.value)
            drawn = [draw_utterance(random, stage, pool) for _ in range(64)]
            groups = list(_grouped(drawn, stage))
            random.shuffle(groups)
            yield from (collate(group, writer, full=stage.full) for group in groups)


def stage_at(progress: float) -> Stage:
    """Return the stage of the curriculum at a share of the training."""
    return next((stage for stage in STAGES if progress < stage.until), STAGES[-1])


def draw_utterance(random: Random, stage: Stage, pool: Pool) -> Utterance:
    """Return a random window, with or without speech, and its defects."""
    language = "es" if random.random() < SPANISH else "en"
    blank = Utterance(
        audio=np.zeros(0, np.float32),
        segments=(),
        language=language,
        translated=random.random() < (TRANSLATED if language == "es" else ENGLISH_TRANSLATED),
        timestamps=random.random() < TIMESTAMPED,
    )
    if random.random() < SPEECHLESS:
        return replace(blank, audio=_nothing(random, random.uniform(0.5, stage.longest)))
    return spoil(random, _spoken(random, stage, blank, pool))


def spoil(random: Random, utterance: Utterance) -> Utterance:
    """Return the window with a random gain, sometimes with noise."""
    audio = utterance.audio
    if random.random() < NOISY:
        audio = with_noise(random, audio, random.uniform(10, 40))
    gain = 10 ** (-random.uniform(0, 20) / 20)
    return replace(utterance, audio=(audio * np.float32(gain)).clip(-1, 1))


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


def collate(group: list[Utterance], writer: "Writer", *, full: bool) -> Batch:
    """Return a batch whose windows all have the longest one's length, or 30 s."""
    longest = max(len(utterance.audio) for utterance in group)
    samples = WINDOW_SECONDS * SAMPLE_RATE if full else math.ceil(longest / POSITION) * POSITION
    # Whoever has more silence left out than the padding leaves room for starts earlier.
    latest = POSITIONS - samples // POSITION
    group = [replace(utterance, first=min(utterance.first, latest)) for utterance in group]
    audio = np.zeros((len(group), samples), np.float32)
    sounds, pieces = (np.full((len(group), samples // POSITION), IGNORED) for _ in range(2))
    for row, heard, read, utterance in zip(audio, sounds, pieces, group, strict=True):
        row[: len(utterance.audio)] = utterance.audio
        own = _sounds(utterance)
        heard[: len(own)] = own
        for token, (start, end) in writer.spoken(utterance):
            read[round(start * POSITIONS_A_SECOND) : round(end * POSITIONS_A_SECOND)] = token
    scripts = [writer.script(utterance) for utterance in group]
    width = max(len(script.inputs) for script in scripts)
    rest = [width - len(script.inputs) for script in scripts]
    pairs = list(zip(scripts, rest, strict=True))
    return Batch(
        mel=log_mel(torch.from_numpy(audio)),
        first=torch.tensor([utterance.first for utterance in group]),
        inputs=torch.tensor([s.inputs + [writer.end] * more for s, more in pairs]),
        labels=torch.tensor([s.labels + [IGNORED] * more for s, more in pairs]),
        spans=torch.tensor([s.spans + [NOWHERE] * more for s, more in pairs]),
        sounds=torch.from_numpy(sounds),
        pieces=torch.from_numpy(pieces),
        seconds=len(group) * samples / SAMPLE_RATE,
    )


@dataclass(frozen=True)
class Script:
    """A window's decoder inputs, one label for each of them, and where the labels are spoken, in encoder positions."""

    inputs: list[int]
    labels: list[int]
    spans: list[Span]


class Writer:
    """Writes windows as tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words: dict[str, list[int]] = {}
        self.end = self.id(END)
        self.first_timestamp = self.id(TIMESTAMP_TOKENS[0])

    def id(self, token: str) -> int:
        """Return the id of a token that the vocabulary holds."""
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise KeyError(token)
        return int(index)

    def script(self, utterance: Utterance) -> Script:
        """Return what the decoder is to write about a window."""
        prompt = self.prompt(utterance)
        text = self._text(utterance)
        sequence = [*prompt, *(token for token, _ in text), self.end]
        labels = [IGNORED] * (len(prompt) - 1) + sequence[len(prompt) :]
        start = prompt.index(self.id(START))
        labels[start] = sequence[start + 1] if utterance.segments else self.id(NO_SPEECH)
        spans = [NOWHERE] * (len(prompt) - 1) + [span for _, span in text] + [self._over(utterance)]
        return Script(sequence[:-1], labels, spans)

    def prompt(self, utterance: Utterance) -> list[int]:
        """Return the tokens before the text."""
        task = TRANSLATE if utterance.translated else TRANSCRIBE
        special = [START, f"<|{utterance.language}|>", task, *([] if utterance.timestamps else [NO_TIMESTAMPS])]
        return [*self._previous(utterance), *map(self.id, special)]

    def spoken(self, utterance: Utterance) -> list[tuple[int, Span]]:
        """Return the tokens that are spoken, in the language that is spoken, and when, in seconds."""
        return [token for segment in utterance.segments for token in self._segment(segment, utterance.language)]

    def timestamp(self, seconds: float) -> int:
        """Return the token of a time in the window."""
        return self.first_timestamp + min(round(seconds / TIME_STEP), len(TIMESTAMP_TOKENS) - 1)

    def word(self, text: str) -> list[int]:
        """Return the tokens of a word and the space before it."""
        if text not in self._words:
            self._words[text] = self._tokenizer.encode(f" {text}", add_special_tokens=False).ids
        return self._words[text]

    def _previous(self, utterance: Utterance) -> list[int]:
        """Return the text before the window, with the timestamps of the window in which it was written."""
        if not utterance.previous:
            return []
        tokens: list[int] = []
        seconds = 0.0
        for take in utterance.previous:
            text = [token for word in take.pair[utterance.target].words for token in self.word(word.text)]
            times = self.timestamp(seconds), self.timestamp(seconds + take.seconds)
            tokens += [times[0], *text, times[1]] if utterance.timestamps else text
            seconds = (seconds + take.seconds) % (WINDOW_SECONDS - take.seconds)  # the window before the last one begins at 0 too
        return [self.id(PREVIOUS), *tokens[-PREVIOUS_TOKENS:]]

    def _text(self, utterance: Utterance) -> list[tuple[int, Span]]:
        """Return the tokens behind the prompt and where they are spoken."""
        if not utterance.segments:
            return [(self.timestamp(0), NOWHERE)] if utterance.timestamps else []
        shift = utterance.first / POSITIONS_A_SECOND
        whole = utterance.first * POSITION + len(utterance.audio)
        text: list[tuple[int, Span]] = []
        for segment in utterance.segments:
            spoken = [(token, _positions(*span)) for token, span in self._segment(segment, utterance.target)]
            if utterance.timestamps:
                start = segment.start + shift
                begin = self.timestamp(start if text else min(start, LATEST_START))
                spoken.insert(0, (begin, _around(segment.start)))
                # What goes on behind the window has a start only, as in Whisper's training.
                cut = segment.end + shift > WINDOW_SECONDS and whole >= WINDOW_SECONDS * SAMPLE_RATE
                spoken[1 if cut else len(spoken) :] = (
                    []
                    if cut
                    else [
                        (self.timestamp(segment.end + shift), _around(segment.end)),
                    ]
                )
            text += spoken
        return text

    def _over(self, utterance: Utterance) -> Span:
        """Return where the end of the text is heard: behind the last word."""
        last = max((segment.end for segment in utterance.segments), default=math.nan)
        return _around(last + SLACK_SECONDS) if last <= len(utterance.audio) / SAMPLE_RATE else NOWHERE

    def _segment(self, segment: Segment, target: str) -> list[tuple[int, Span]]:
        """Return a sentence's tokens and when they are spoken: a word's letters are taken to be equally long."""
        tokens: list[tuple[int, Span]] = []
        for index, word in enumerate(segment.take.pair[target].words):
            start, end = self._word_span(segment, target, index)
            ids = self.word(word.text)
            lengths = [len(self._tokenizer.decode([token])) for token in ids] if target == segment.take.language else []
            spoken, scale = 0, (end - start) / max(sum(lengths), 1)
            for place, token in enumerate(ids):
                part = (start, end)
                if lengths:
                    part = (start + spoken * scale, start + (spoken + lengths[place]) * scale)
                    spoken += lengths[place]
                tokens.append((token, part))
        return tokens

    def _word_span(self, segment: Segment, target: str, index: int) -> Span:
        """Return when a word, or what it translates, is spoken; the whole sentence where that is not known."""
        take = segment.take
        times = [(segment.start + start, segment.start + end) for start, end in take.speech.words]
        if target == take.language:
            return times[index]
        piece = take.pair[target].words[index].piece
        spoken = zip(take.pair[take.language].words, times, strict=True)
        same = [span for word, span in spoken if piece >= 0 and word.piece == piece] or times
        return same[0][0], same[-1][1]


def _positions(start: float, end: float) -> Span:
    return POSITIONS_A_SECOND * (start - SLACK_SECONDS), POSITIONS_A_SECOND * (end + SLACK_SECONDS)


def _around(seconds: float) -> Span:
    return _positions(seconds - SLACK_SECONDS, seconds + SLACK_SECONDS)


def _sounds(utterance: Utterance) -> npt.NDArray[np.int64]:
    """Return the phonemes' classes at the window's own positions, int64 [positions]."""
    classes = np.zeros(math.ceil(len(utterance.audio) / POSITION), np.int64)
    middles = (np.arange(len(classes)) + 0.5) / POSITIONS_A_SECOND
    for segment in utterance.segments:
        starts = np.array([segment.start + start for start, _ in segment.take.speech.sounds])
        inside = (middles >= starts[0]) & (middles < segment.end)
        named = np.array([sound for _, sound in segment.take.speech.sounds])
        classes[inside] = named[np.searchsorted(starts, middles[inside], side="right") - 1]
    return classes


def _spoken(random: Random, stage: Stage, blank: Utterance, pool: Pool) -> Utterance:
    """Return sentences with gaps: one, or as many as fill a drawn length."""
    # Silence up to 30 s costs as much as speech does, and teaches less.
    wanted = max(random.uniform(1.0, stage.longest + 2.0) for _ in range(2 if stage.full else 1)) if stage.packed else 0.0
    may_cut = stage.full and blank.timestamps and random.random() < CUT
    most = 8.0 if stage.packed and random.random() < LONG_PAUSES else random.choice((0.3, 0.6, 1.2))
    seconds = random.uniform(0.0, min(most, stage.longest / 2 if random.random() < LATE else LATEST_START))
    segments: list[Segment] = []
    while not segments or seconds < wanted:
        take = pool.draw(blank.language, _rule(random, stage))
        segment = Segment(seconds, take)
        fits = segment.end <= stage.longest
        if fits or (may_cut and segments and seconds < stage.longest - 0.1):
            segments.append(segment)
        if not fits and segments:
            break
        if fits:
            seconds = segment.end + random.uniform(0.05, most)
    audio = np.zeros(int(min(max(seconds, segments[-1].end), stage.longest) * SAMPLE_RATE), np.float32)
    for segment in segments:
        first = round(segment.start * SAMPLE_RATE)
        part = segment.take.speech.audio[: len(audio) - first]
        audio[first : first + len(part)] += part * np.float32(random.uniform(0.6, 1.0))
    room = POSITIONS - math.ceil(len(audio) / POSITION)
    hidden = 0 if stage.full or random.random() > SHIFTED else random.randrange(room)
    continued = stage.previous and random.random() < (PREVIOUS_OF_FULL if stage.full else PREVIOUS_TEXT)
    previous = random.choice((3, 10, 30, 30)) if stage.full else 4
    previous = random.randint(1, previous) if continued else 0
    before = tuple(pool.draw(blank.language, "sentence") for _ in range(previous))
    return replace(blank, audio=audio, segments=tuple(segments), first=hidden, previous=before)


def _rule(random: Random, stage: Stage) -> str:
    rules = ("single", "shuffled", "repeated", "sentence")
    shares = (stage.single, stage.shuffled, stage.repeated)
    return random.choices(rules, (*shares, 1 - sum(shares)))[0]


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
