"""From an audio file of any length to its segments, with whatever runtime was opened.

openai-whisper's ``transcribe()`` is normative: a window of 30 s is decoded, its timestamps say where the next one begins, what
was said before is its prompt. Several stretches of one file may be decoded side by side instead; each then goes by the same
rules, with nothing but the initial prompt before it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from asr_core import hallucination
from asr_core.align import Aligner, add_word_timestamps
from asr_core.audio import HOP, SAMPLE_RATE, WINDOW_FRAMES, Gap
from asr_core.decode import Decoded, DecodeOptions, Mel, compression_ratio
from asr_core.errors import UsageError
from asr_core.recording import Recording
from asr_core.segments import Cuts, Segment, cut, last_word_end
from asr_core.tokens import load_tokenizer, written_out
from asr_core.vad import VoiceDetector

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FRAMES_A_SECOND = SAMPLE_RATE // HOP
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# Frames of silence that stay after the audio with ``trim_silence``. With fewer, a model that was trained on windows of 30 s goes
# on after its end: the carried one has 2.7 % of the words wrong with 800 frames and more, 3.2 % with 256, 4.5 % with 128.
MARGIN = 256
FORGET_ABOVE = 0.5  # the temperature above which an answer is no prompt for the next window

Item = TypeVar("Item")
Progress = Callable[[float, float], None]  # seconds done, seconds in all


class Recogniser(Aligner, Protocol):
    """What transcription needs of a runner; ``short_windows`` tells whether windows may have fewer than 3000 frames."""

    short_windows: bool

    def generate(self, mel: Mel, options: DecodeOptions) -> list[Decoded]:
        """Decode a batch of windows, float32 [B, n_mels, 3000]."""

    def detect_language(self, mel: Mel) -> list[dict[str, float]]:
        """The probability of every language by code, for each window."""


@dataclass(frozen=True)
class Bundle:
    """What an artifact folder carries beside the network: tokenizer and mel filters, float32 [n_mels, 201]."""

    tokenizer: Tokenizer
    filters: NDArray[np.float32]

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read the bundle of an artifact folder."""
        return cls(load_tokenizer(folder), np.load(folder / "mel_filters.npy"))


@dataclass(frozen=True)
class TranscribeOptions:
    """The policy of a file; every field that openai-whisper's ``transcribe()`` has means what it means there.

    ``decode`` is that of its windows; its language None means: heard once, in the first 30 s; its prompt is set here.
    ``clips`` are start and end of what to transcribe, in seconds, everything by default; ``vad`` finds them instead. With
    ``batch_size`` above 1 they are decoded side by side (found by voice detection where none are given), each window with the
    initial prompt alone before it. ``trim_silence`` leaves out most of what fills a window up after its audio: it is faster,
    and the model hears something else.
    """

    decode: DecodeOptions = field(default_factory=lambda: DecodeOptions(None, timestamps=True, temperatures=TEMPERATURES))
    condition_on_previous_text: bool = True
    initial_prompt: str | None = None
    carry_initial_prompt: bool = False
    hotwords: str | None = None
    word_timestamps: bool = False
    hallucination_silence_threshold: float | None = None
    clips: tuple[tuple[float, float | None], ...] = ()
    vad: bool = False
    batch_size: int = 1
    trim_silence: bool = False

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for what does not go together."""
        if self.vad and self.clips:
            raise UsageError("voice detection chooses the clips; give either.")
        if self.hallucination_silence_threshold is not None and not self.word_timestamps:
            raise UsageError("the hallucination silence threshold is about words: ask for word timestamps too.")

    @property
    def detects_voice(self) -> bool:
        """Whether stretches with speech are looked for."""
        return self.vad or (self.batch_size > 1 and not self.clips)


@dataclass(frozen=True)
class Transcript:
    """What was said in one file.

    ``language`` is a code; ``gaps`` are the stretches of the file that could not be read; ``rtfx`` is seconds of audio per second
    of work, from the file to its text, None where the work was not the runtime's own.
    """

    audio: str
    text: str
    segments: list[Segment]
    language: str
    duration_s: float
    rtfx: float | None
    gaps: tuple[Gap, ...] = ()


def transcribe(
    model: Recogniser | Sequence[Recogniser],
    bundle: Bundle,
    path: str | Path,
    options: TranscribeOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> Transcript:
    """Transcribe one file of any length; with several copies of a model, each decodes batches of its own.

    Raises :class:`~asr_core.errors.AudioError` for an unreadable file, :class:`UsageError` for a language or task that the
    model does not know.
    """
    options = options or TranscribeOptions()
    models = model if isinstance(model, Sequence) else [model]
    if options.trim_silence and not models[0].short_windows:
        raise UsageError(
            "this artifact's encoder takes whole windows of 30 s: leave --trim-silence out, or take one of ONNX, OpenVINO "
            "or CTranslate2."
        )
    started = time.perf_counter()
    detector = VoiceDetector(len(models)) if options.detects_voice else None
    with Recording(path, bundle.filters, [detector] if detector else []) as recording:
        language = _language(models[0], recording, options)
        clips = detector.clips() if detector else options.clips
        run = _Run(models, bundle.tokenizer, recording, options, language)
        segments = run.through(clips or ([] if detector else [(0.0, None)]), progress)
        duration, gaps = recording.duration_s, recording.gaps
    text = run.text([token for segment in segments for token in segment.tokens])
    return Transcript(str(path), text, segments, language, duration, duration / (time.perf_counter() - started), gaps)


def _language(model: Recogniser, recording: Recording, options: TranscribeOptions) -> str:
    """The code of a language that was named, or that of the first 30 s."""
    wanted = options.decode.language
    if wanted is not None or not model.tokens.languages:
        return model.tokens.code_of(wanted) or "en"
    frames = _frames(recording.frames) if options.trim_silence else WINDOW_FRAMES
    heard = model.detect_language(recording.features(0, frames)[None])[0]
    return max(heard, key=lambda code: heard[code])


def _frames(size: int) -> int:
    """How long a window is that holds so many frames of audio and the margin: an even number, 3000 at most."""
    return min((size + MARGIN + 1) // 2 * 2, WINDOW_FRAMES)


def batches(items: Sequence[Item], size: int, copies: int) -> list[Sequence[Item]]:
    """Neighbours in batches of at most ``size``, about equally many in each, so many batches that all copies have work."""
    count = min(len(items), -(-len(items) // (size * copies)) * copies)
    edges = [len(items) * i // count for i in range(count + 1)]
    return [items[start:end] for start, end in itertools.pairwise(edges)]


def prompt_tokens(tokenizer: Tokenizer, text: str | None) -> list[int]:
    """The ids of words that stand before a window."""
    return list(tokenizer.encode(" " + text.strip(), add_special_tokens=False).ids) if text else []


@dataclass
class _Past:
    """What was said before a window, and where speech last ended (seconds)."""

    initial: list[int]
    room: int
    carries: bool
    conditions: bool
    tokens: list[int] = field(default_factory=list)
    since: int = 0
    last_speech: float = 0.0

    def __post_init__(self) -> None:
        self.tokens += self.initial

    def prompt(self) -> tuple[int, ...]:
        """Token ids, those last said at the end; no more than fit."""
        if not self.carries:
            return tuple(self.tokens[self.since :][-self.room :])
        rest = self.tokens[max(len(self.initial), self.since) :]
        return tuple(self.initial + rest[-(self.room - len(self.initial)) :])[-self.room :]

    def add(self, tokens: list[int], temperature: float) -> None:
        """Remember an answer; one that is not to be a prompt makes everything before it forgotten too."""
        self.tokens += tokens
        if not self.conditions or temperature > FORGET_ABOVE:
            self.since = len(self.tokens)


@dataclass
class _Lane:
    """A stretch of the file that is decoded from its beginning to its end; both in frames."""

    seek: int
    stop: int
    past: _Past
    segments: list[Segment] = field(default_factory=list)


@dataclass(frozen=True)
class _Window:
    """Features float32 [1, n_mels, ≤ 3000], of which ``size`` frames from frame ``seek`` of the file on are content."""

    mel: Mel
    seek: int
    size: int

    @property
    def start(self) -> float:
        return self.seek * HOP / SAMPLE_RATE

    @property
    def seconds(self) -> float:
        return self.size * HOP / SAMPLE_RATE

    @property
    def end(self) -> float:
        return (self.seek + WINDOW_FRAMES) * HOP / SAMPLE_RATE


class _Run:
    """The way through one recording."""

    def __init__(
        self, models: Sequence[Recogniser], tokenizer: Tokenizer, recording: Recording, options: TranscribeOptions, language: str
    ) -> None:
        self.copies = len(models) if options.batch_size > 1 else 1
        self.idle: SimpleQueue[Recogniser] = SimpleQueue()
        for model in models[: self.copies]:
            self.idle.put(model)
        self.ids = models[0].tokens
        self.tokenizer = tokenizer
        self.recording = recording
        self.options = options
        hotwords = tuple(prompt_tokens(tokenizer, options.hotwords))
        self.policy = replace(options.decode, language=language, hotwords=hotwords)
        self._last: tuple[list[_Window], DecodeOptions, list[Decoded]] | None = None

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, timestamps left out; blanks around it are kept."""
        return self.tokenizer.decode([token for token in tokens if token < self.ids.end], skip_special_tokens=False)

    def through(self, clips: Sequence[tuple[float, float | None]], progress: Progress) -> list[Segment]:
        """Decode every clip to its end, many side by side or, each with the ones before as its past, one after the other."""
        lanes = self._lanes(clips)
        total = sum(max(lane.stop - lane.seek, 0) for lane in lanes) / FRAMES_A_SECOND
        done = 0.0
        for seconds in self._heard([lanes] if self.options.batch_size > 1 else [[lane] for lane in lanes]):
            done += seconds
            progress(done, total)
        found = [segment for lane in lanes for segment in lane.segments]
        return [replace(segment, id=i) for i, segment in enumerate(found)]

    def _heard(self, groups: Sequence[Sequence[_Lane]]) -> Iterator[float]:
        """Decode the lanes of one group after the other, and tell each time by how many seconds that went on.

        All lanes of a group go on by a window before any goes on by the next: who shares a batch with whom never depends on
        which copy of the model is the faster.
        """
        with ThreadPoolExecutor(self.copies) as pool:
            at_once = pool.map if self.copies > 1 else map
            for group in groups:
                while waiting := [lane for lane in group if lane.seek < lane.stop]:
                    yield from at_once(self._advance, batches(waiting, self.options.batch_size, self.copies))

    def _advance(self, batch: Sequence[_Lane]) -> float:
        """Decode a window of each lane with whichever copy of the model is idle; returns the seconds that they went on by."""
        model = self.idle.get()
        try:
            windows = [self._window(lane) for lane in batch]
            answers = self._decode(model, windows, replace(self.policy, prompt=batch[0].past.prompt()))
            for lane, window, answer in zip(batch, windows, answers, strict=True):
                self._take(model, lane, window, answer)
        finally:
            self.idle.put(model)
        moves = zip(batch, windows, strict=True)
        return sum(min(lane.seek, lane.stop) - window.seek for lane, window in moves) / FRAMES_A_SECOND

    def _lanes(self, clips: Sequence[tuple[float, float | None]]) -> list[_Lane]:
        options = self.options
        initial = prompt_tokens(self.tokenizer, options.initial_prompt)
        room = self.ids.max_new_tokens - 1  # half of the text context, less one
        together = options.batch_size > 1

        def past() -> _Past:
            # A checkpoint without the token for it cannot be told what was said before.
            conditions = options.condition_on_previous_text and not together and self.ids.previous is not None
            return _Past(initial, room, options.carry_initial_prompt or together, conditions)

        shared = past()
        lanes = []
        for start, end in clips:
            stop = self.recording.frames if end is None else min(round(end * FRAMES_A_SECOND), self.recording.frames)
            lanes.append(_Lane(round(start * FRAMES_A_SECOND), stop, past() if together else shared))
        return lanes

    def _window(self, lane: _Lane) -> _Window:
        size = min(WINDOW_FRAMES, lane.stop - lane.seek)
        mel = self.recording.features(lane.seek, lane.seek + size)
        frames = _frames(size) if self.options.trim_silence else WINDOW_FRAMES
        return _Window(self._filled(mel[None], frames), lane.seek, size)

    def _filled(self, mel: Mel, frames: int) -> Mel:
        """A window filled up with zeros as openai-whisper's ``pad_or_trim`` does, or, where it is trimmed, with silence.

        Zeros are a tone in all bands. Before 20 s of them, models know that speech has ended; before a few, they go on.
        """
        value = self.recording.silence if self.options.trim_silence else 0.0
        return np.pad(mel, ((0, 0), (0, 0), (0, frames - mel.shape[2])), constant_values=value)

    def _decode(self, model: Recogniser, windows: list[_Window], policy: DecodeOptions) -> list[Decoded]:
        """Decode windows; the same ones with the same prompt (hours of silence) give the answer that they gave before."""
        last = self._last  # read once: another thread may set it meanwhile
        if last and last[1] == policy and len(last[0]) == len(windows):
            pairs = zip(last[0], windows, strict=True)
            if all(before.size == now.size and np.array_equal(before.mel, now.mel) for before, now in pairs):
                return last[2]
        longest = max(window.mel.shape[2] for window in windows)
        answers = model.generate(np.concatenate([self._filled(window.mel, longest) for window in windows]), policy)
        self._last = (windows, policy, answers)
        return answers

    def _take(self, model: Recogniser, lane: _Lane, window: _Window, answer: Decoded) -> None:
        """Add what a window said to its lane, and move the lane on."""
        if self._silent(answer):
            lane.seek += window.size
            return
        cuts = cut(answer.tokens, self.ids.timestamp_begin)
        segments = self._segments(window, answer, cuts)
        lane.seek += window.size if cuts.resume is None else cuts.resume
        kept = self._with_words(model, lane, window, cuts, segments) if self.options.word_timestamps else segments
        if lane.seek <= window.seek:  # openai-whisper's rules never stand still; a runtime that decodes by its own might
            lane.seek = window.seek + window.size
        if kept is None:
            return
        segments = [segment if segment.voiced else segment.cleared() for segment in kept]
        lane.segments += segments
        lane.past.add([token for segment in segments for token in segment.tokens], answer.temperature)

    def _silent(self, answer: Decoded) -> bool:
        limit, floor = self.policy.no_speech_threshold, self.policy.logprob_threshold
        if limit is None or answer.no_speech_prob is None:
            return False
        return answer.no_speech_prob > limit and not (floor is not None and answer.avg_logprob > floor)

    def _segments(self, window: _Window, answer: Decoded, cuts: Cuts) -> list[Segment]:
        ratio = compression_ratio(written_out(self.tokenizer, answer.tokens))
        return [
            Segment(
                id=0,
                seek=window.seek,
                start=window.start + piece.start,
                end=window.start + (window.seconds if piece.end is None else piece.end),
                text=self.text(piece.tokens),
                tokens=piece.tokens,
                temperature=answer.temperature,
                avg_logprob=answer.avg_logprob,
                compression_ratio=ratio,
                no_speech_prob=answer.no_speech_prob,
            )
            for piece in cuts.pieces
        ]

    def _with_words(
        self, model: Recogniser, lane: _Lane, window: _Window, cuts: Cuts, segments: list[Segment]
    ) -> list[Segment] | None:
        """The segments with their words, those that are probably not speech left out, and the lane moved on by the words.

        None: nothing of the window is kept.
        """
        spans = add_word_timestamps(
            segments, model, self.tokenizer, window.mel, frames=window.size, offset=window.start,
            language=self.policy.language or "en", task=self.policy.task, last_speech=lane.past.last_speech,
        )  # fmt: skip
        timed = zip(segments, spans, strict=True)
        segments = [replace(segment, start=span.start, end=span.end, words=span.words) for segment, span in timed]
        end = last_word_end(segments)
        if not cuts.closed and end is not None and end > window.start:
            lane.seek = round(end * FRAMES_A_SECOND)
        if self.options.hallucination_silence_threshold is not None:
            kept = self._without_hallucinations(lane, window, cuts, segments)
            if kept is None:
                return None
            segments = kept
        end = last_word_end(segments)
        lane.past.last_speech = lane.past.last_speech if end is None else end
        return segments

    def _without_hallucinations(self, lane: _Lane, window: _Window, cuts: Cuts, segments: list[Segment]) -> list[Segment] | None:
        around = hallucination.Surroundings(
            start=window.start, content_end=window.start + window.seconds, end=window.end,
            file_end=self.recording.frames * HOP / SAMPLE_RATE, last_speech=lane.past.last_speech,
            threshold=self.options.hallucination_silence_threshold or 0.0,
        )  # fmt: skip
        end = last_word_end(segments)
        if not cuts.closed and end is not None and end > window.start:
            after = hallucination.resume_after_words(segments, around)
            lane.seek = window.seek + window.size if after is None else round(after * FRAMES_A_SECOND)
        silence = hallucination.leading_silence(segments, around)
        if silence:
            lane.seek = window.seek + round(silence * FRAMES_A_SECOND)
            return None
        segments, resume = hallucination.kept(segments, around)
        if resume is not None:
            lane.seek = self.recording.frames if resume == around.file_end else round(resume * FRAMES_A_SECOND)
        return segments
