"""What PyTorch hears in the clips: `python -m reference.judge` prints error rates, languages, times and silence."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import jiwer
import numpy as np
import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from reference import checkpoint_path, manifest_path
from reference.tokenizer import NO_SPEECH, TIME_STEP, TIMESTAMP_TOKENS

LENGTHS = (0.0, 2.0, 5.0, 15.0, 30.0)  # seconds: the clips' lengths between which words are counted together

FRAMES_A_SECOND = 100

_BATCH = 8


@dataclass(frozen=True)
class Clip:
    """A line of the manifest and the window that it fills, log-mel float32 [80, 3000]."""

    entry: dict[str, Any]
    mel: torch.Tensor

    @property
    def name(self) -> str:
        """The file's name."""
        return str(self.entry["audio_filepath"])

    @property
    def language(self) -> str:
        """The language that is spoken."""
        return str(self.entry["lang"])

    @property
    def boundaries(self) -> list[float]:
        """When each sentence starts and ends, in seconds."""
        return [time for segment in self.entry["segments"] for time in (segment["start"], segment["end"])]

    @property
    def words(self) -> list[dict[str, Any]]:
        """Every word with its start and end, in seconds."""
        return [word for segment in self.entry["segments"] for word in segment["words"]]


@dataclass(frozen=True)
class Verdict:
    """What was said in a clip and what was heard, as words or tokens with spaces between them."""

    clip: Clip
    said: str
    heard: str
    written: str = ""  # what was heard, before the normaliser put digits together

    @property
    def plain(self) -> "Verdict":
        """The same without the normaliser, so that digits heard too often count one by one."""
        return replace(self, said=self.clip.entry["text"], heard=self.written)

    @property
    def errors(self) -> int:
        """Wrong, missing and superfluous words; every word heard in a clip without speech is one."""
        if not self.said:
            return len(self.heard.split())
        measured = jiwer.process_words(self.said, self.heard)
        return int(measured.substitutions + measured.deletions + measured.insertions)


@dataclass(frozen=True)
class Heard:
    """What a model wrote about one clip: its tokens, behind the prompt and before the end, and their times in seconds."""

    tokens: list[int]
    times: list[float]


class Listener:
    """A checkpoint in transformers' own hands: greedy, float32."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
        self._processor = WhisperProcessor.from_pretrained(checkpoint)
        spelling = json.loads((checkpoint / "normalizer.json").read_text())
        self._normalise: dict[str, Callable[[str], str]] = {"en": EnglishTextNormalizer(spelling), "es": BasicTextNormalizer()}

    @cached_property
    def first_timestamp(self) -> int:
        """The id of <|0.00|>."""
        return self._id(TIMESTAMP_TOKENS[0])

    def clips(self, manifest: Path) -> list[Clip]:
        """Read every clip of a manifest."""
        read = []
        for line in manifest.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            audio, rate = soundfile.read(manifest.parent / entry["audio_filepath"], dtype="float32")
            mel = self._processor(audio, sampling_rate=rate, return_tensors="pt").input_features[0]
            read.append(Clip(entry, mel))
        return read

    def hear(
        self, clips: Iterable[Clip], *, task: str = "transcribe", timestamps: bool = False, word_times: bool = False
    ) -> Iterator[tuple[Clip, Heard]]:
        """Yield every clip with what is heard in it, told its language."""
        for batch in _batches(clips, 1 if word_times else _BATCH):  # other rows would disturb the times
            for language in sorted({clip.language for clip in batch}):
                group = [clip for clip in batch if clip.language == language]
                with torch.inference_mode():
                    written = self._model.generate(
                        torch.stack([clip.mel for clip in group]),
                        language=language,
                        task=task,
                        return_timestamps=timestamps,
                        return_token_timestamps=word_times,
                        return_dict_in_generate=True,
                        attention_mask=_frames(group),
                    )
                times = written.get("token_timestamps", torch.zeros_like(written["sequences"], dtype=torch.float32))
                for row, clip in enumerate(group):
                    yield clip, self._body(written["sequences"][row].tolist(), times[row].tolist())

    def text(self, heard: Heard) -> str:
        """Return the words."""
        return str(self._processor.tokenizer.decode(heard.tokens, skip_special_tokens=True)).strip()

    def normalised(self, text: str, language: str) -> str:
        """Return a text as Whisper's normaliser for its language leaves it."""
        return self._normalise[language](text).strip()

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        ids: list[int] = self._processor.tokenizer(f" {text}", add_special_tokens=False).input_ids
        return ids

    def starts_word(self, token: int) -> bool:
        """Say whether a token begins a word."""
        return bool(self._processor.tokenizer.decode([token]).startswith(" "))

    @torch.inference_mode()
    def start(self, clip: Clip) -> tuple[str, float]:
        """Return the best language at the start of the transcript, and the probability that nobody speaks."""
        config = self._model.generation_config
        start = torch.tensor([[config.decoder_start_token_id]])
        scores = self._model(clip.mel[None], decoder_input_ids=start).logits[0, 0]
        codes, ids = zip(*config.lang_to_id.items(), strict=True)
        best = codes[int(scores[list(ids)].argmax())].strip("<|>")
        return best, float(scores.softmax(-1)[self._id(NO_SPEECH)])

    def _body(self, tokens: list[int], times: list[float]) -> Heard:
        end = self._model.generation_config.eos_token_id
        kept = [(token, time) for token, time in zip(tokens, times, strict=True) if token < end or token >= self.first_timestamp]
        return Heard([token for token, _ in kept], [time for _, time in kept])

    def _id(self, token: str) -> int:
        index: int = self._processor.tokenizer.convert_tokens_to_ids(token)
        return index


def judge(checkpoint: Path, manifest: Path) -> list[Verdict]:
    """Transcribe every clip without timestamps and return the verdicts in the manifest's order."""
    listener = Listener(checkpoint)
    return transcribed(listener, listener.clips(manifest))


def transcribed(listener: Listener, clips: list[Clip], *, timestamps: bool = False) -> list[Verdict]:
    """Return the verdicts on every clip's words, in the clips' order."""
    verdicts = {}
    for clip, heard in listener.hear(clips, timestamps=timestamps):
        said = listener.normalised(clip.entry["text"], clip.language)
        text = listener.text(heard)
        verdicts[clip.name] = Verdict(clip, said, listener.normalised(text, clip.language), text)
    return [verdicts[clip.name] for clip in clips]


def translated(listener: Listener, clips: Iterable[Clip]) -> list[Verdict]:
    """Return the verdicts on the tokens of every translation."""
    foreign = [clip for clip in clips if "translation" in clip.entry]
    verdicts = []
    for clip, heard in listener.hear(foreign, task="translate"):
        said = listener.tokens(clip.entry["translation"])
        verdicts.append(Verdict(clip, " ".join(map(str, said)), " ".join(map(str, heard.tokens))))
    return verdicts


def boundary_errors(listener: Listener, clips: Iterable[Clip]) -> tuple[list[float], list[str]]:
    """Return how far each timestamp is off, in seconds, and the clips whose number of timestamps is wrong."""
    errors: list[float] = []
    miscounted = []
    spoken = [clip for clip in clips if clip.boundaries]
    for clip, heard in listener.hear(spoken, timestamps=True):
        times = [TIME_STEP * (t - listener.first_timestamp) for t in heard.tokens if t >= listener.first_timestamp]
        if len(times) == len(clip.boundaries):
            errors += np.abs(np.subtract(times, clip.boundaries)).tolist()
        else:
            miscounted.append(clip.name)
    return errors, miscounted


def word_time_errors(listener: Listener, clips: Iterable[Clip]) -> list[float]:
    """Return how far each word's end, read off the alignment heads, is off, in seconds, in clips that are heard rightly.

    Transformers gives a token the time at which it is over.
    """
    errors: list[float] = []
    for clip, heard in listener.hear(clips, word_times=True):
        starts = [place for place, token in enumerate(heard.tokens) if listener.starts_word(token)]
        if heard.tokens == listener.tokens(clip.entry["text"]) and clip.words:
            ends = [heard.times[after - 1] for after in [*starts[1:], len(heard.tokens)]]
            errors += np.abs(np.subtract(ends, [word["end"] for word in clip.words])).tolist()
    return errors


def error_rate(verdicts: Sequence[Verdict]) -> float:
    """Return the errors of all clips over all words said."""
    return sum(v.errors for v in verdicts) / max(sum(len(v.said.split()) for v in verdicts), 1)


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), default=checkpoint_path())
@click.option("--manifest", type=click.Path(path_type=Path), default=manifest_path())
@click.option("--details/--no-details", default=False, help="Print every clip with errors.")
def main(checkpoint: Path, manifest: Path, *, details: bool) -> None:
    """Print what the model hears in the clips, task by task."""
    listener = Listener(checkpoint)
    clips = listener.clips(manifest)
    plain = transcribed(listener, clips)
    for verdict in plain if details else []:
        if verdict.errors:
            click.echo(f"{verdict.clip.name}\n  said  {verdict.said}\n  heard {verdict.heard}")
    click.echo("\n".join(_table(plain)))
    click.echo(_rate("not normalised", [verdict.plain for verdict in plain]))
    timed = transcribed(listener, clips, timestamps=True)
    click.echo(_rate("with timestamps", timed))
    click.echo(_rate("with timestamps, not normalised", [verdict.plain for verdict in timed]))
    click.echo(_rate("translated, tokens", translated(listener, clips)))
    errors, miscounted = boundary_errors(listener, clips)
    click.echo(f"timestamps: {_spread(errors)}; wrong in number in {len(miscounted)} clips {' '.join(miscounted)}")
    click.echo(f"word ends: {_spread(word_time_errors(listener, clips))}")
    click.echo("\n".join(_starts(listener, clips)))


def _table(verdicts: list[Verdict]) -> Iterator[str]:
    """Yield the word error rate of everything, of each language, and of each length of clip."""
    yield _rate("WER", verdicts)
    for language in ("en", "es"):
        yield _rate(f"  {language}", [v for v in verdicts if v.clip.language == language])
    for least, most in pairwise(LENGTHS):
        chosen = [v for v in verdicts if least < v.clip.entry["duration"] <= most]
        yield _rate(f"  {least:.0f} to {most:.0f} s", chosen)


def _rate(name: str, verdicts: list[Verdict]) -> str:
    said = sum(len(v.said.split()) for v in verdicts)
    return f"{name}: {error_rate(verdicts):.2%} of {said} in {len(verdicts)} clips"


def _spread(errors: list[float]) -> str:
    if not errors:
        return "none measured"
    return f"mean error {np.mean(errors):.3f} s, median {np.median(errors):.3f} s, worst {max(errors):.2f} s of {len(errors)}"


def _starts(listener: Listener, clips: list[Clip]) -> Iterator[str]:
    starts = [(clip, *listener.start(clip)) for clip in clips]
    spoken = [(clip, language, silent) for clip, language, silent in starts if clip.boundaries]
    wrong = [clip.name for clip, language, _ in spoken if language != clip.language]
    yield f"language: right in {1 - len(wrong) / len(spoken):.1%} of {len(spoken)} clips {' '.join(wrong)}"
    blank = ", ".join(f"{clip.name} {silent:.3f}" for clip, _, silent in starts if not clip.boundaries)
    yield f"no speech: {blank}; at most {max(silent for _, _, silent in spoken):.3f} in clips with speech"


def _frames(clips: list[Clip]) -> torch.Tensor:
    """Return 1 where a window's frame belongs to its clip, [clips, 3000]: word times need to know where speech can be."""
    ends = [[clip.entry["duration"] * FRAMES_A_SECOND] for clip in clips]
    return (torch.arange(clips[0].mel.shape[-1])[None] < torch.tensor(ends)).long()


def _batches(clips: Iterable[Clip], most: int) -> Iterator[list[Clip]]:
    """Yield the clips in batches of about equal lengths."""
    ordered = sorted(clips, key=lambda clip: float(clip.entry["duration"]))
    yield from (ordered[first : first + most] for first in range(0, len(ordered), most))


if __name__ == "__main__":
    main()
