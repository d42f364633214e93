"""Makes the carried clips: `python -m reference.make_clips --out DIR`, the same ones every time.

With `--trained`, clips of the same kinds from the training's speakers and sentences: to calibrate on, never to judge by.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
import soundfile

from reference import grammar, manifest_path, synth
from reference.batches import Audio, Segment, Take, noise, with_noise
from reference.synth import SAMPLE_RATE

SEED = 2024
LEAST_SECONDS = 1.0
PEAK = 0.35  # of full scale: the files compress better than at 1


@dataclass(frozen=True)
class Kind:
    """Clips of one kind: how many in each language, what is said, and how long they are."""

    name: str
    counts: dict[str, int]
    noisy: float  # share of them that has noise behind the speech
    rule: str
    least: float  # seconds; above one second, sentences with pauses fill the clip up to it
    most: float  # seconds


KINDS = (
    Kind("short", {"en": 14, "es": 10}, noisy=0.15, rule="fragment", least=1.0, most=2.6),
    Kind("sentence", {"en": 39, "es": 23}, noisy=0.1, rule="sentence", least=1.0, most=9.0),
    Kind("paused", {"en": 12, "es": 9}, noisy=0.08, rule="sentence", least=4.0, most=28.5),
)
PREFIXES = {"en": "", "es": "es-"}


@dataclass(frozen=True)
class Clip:
    """A named recording, float32 [samples] at 16 kHz, and what is said in it."""

    name: str
    language: str
    audio: Audio
    segments: tuple[Segment, ...] = ()

    def text(self, language: str) -> str:
        """Everything that is said, or its translation."""
        return " ".join(segment.take.pair[language].text for segment in self.segments)

    def entry(self) -> dict[str, Any]:
        """The clip's line in the manifest; times are in seconds."""
        translation = {"translation": self.text("en")} if self.segments and self.language != "en" else {}
        return {
            "audio_filepath": f"{self.name}.flac",
            "duration": len(self.audio) / SAMPLE_RATE,
            "text": self.text(self.language),
            "lang": self.language,
            **translation,
            "segments": [_described(segment) for segment in self.segments],
        }


def clips(seed: int = SEED, *, held_out: bool = True) -> Iterator[Clip]:
    """Yield every clip; no sentence and no speaker of the held-out ones is trained on. The others all have speech."""
    random = Random(seed)
    told: set[str] = set()
    for language, prefix in PREFIXES.items():
        for kind in KINDS:
            count = kind.counts[language]
            for index in range(count):
                # Evenly spread lengths: each part of the range is a share of the clips.
                share = (index + random.random()) / count
                wanted = kind.least + share * (kind.most - kind.least) if kind.least > LEAST_SECONDS else 0.0
                empty = Clip(f"{prefix}{kind.name}-{index:02d}", language, _gap(random, 0.4))
                clip = _clip(random, kind, wanted, told, empty, held_out=held_out)
                noisy = int(index * kind.noisy) != int((index + 1) * kind.noisy)
                yield replace(clip, audio=with_noise(random, clip.audio, random.uniform(12, 25))) if noisy else clip
    if not held_out:
        return
    yield Clip("silence", "en", np.zeros(3 * SAMPLE_RATE, np.float32))
    yield Clip("noise", "en", noise(random, 3 * SAMPLE_RATE) * np.float32(0.01))
    yield Clip("es-noise", "es", noise(random, 4 * SAMPLE_RATE) * np.float32(0.003))


def write(out: Path, seed: int = SEED, *, held_out: bool = True) -> int:
    """Write the clips as FLAC with their manifest, ``manifest.jsonl``; returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip in clips(seed, held_out=held_out):
        soundfile.write(out / f"{clip.name}.flac", clip.audio, SAMPLE_RATE, subtype="PCM_16")
        lines.append(json.dumps(clip.entry(), ensure_ascii=False))
    (out / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the clips.  [default: that of the carried ones]")
@click.option("--trained", is_flag=True, help="Clips of the training's speakers and sentences, to calibrate on.")
@click.option("--seed", type=int, default=SEED, show_default=True)
def main(out: Path | None, seed: int, *, trained: bool) -> None:
    """Write the clips as FLAC with their manifest."""
    if out is None and (trained or seed != SEED):
        raise click.UsageError("--out is missing: only the carried clips themselves go where these are.")
    out = out or manifest_path().parent
    click.echo(f"{write(out, seed, held_out=not trained)} clips in {out}")


def _clip(random: Random, kind: Kind, wanted: float, told: set[str], clip: Clip, *, held_out: bool) -> Clip:
    """Return the clip with sentences of one voice, as many as make it so many seconds long, or one."""
    voice = synth.draw_voice(random, clip.language, held_out=held_out)
    while not clip.segments or len(clip.audio) < wanted * SAMPLE_RATE:
        take = _new_take(random, kind.rule, clip.language, voice, told, held_out=held_out)
        longer = np.concatenate([clip.audio, take.speech.audio * np.float32(PEAK), _gap(random, 0.8)])
        if len(longer) > kind.most * SAMPLE_RATE:
            if clip.segments:
                break
            continue
        segment = Segment(len(clip.audio) / SAMPLE_RATE, take)
        clip = replace(clip, audio=longer, segments=(*clip.segments, segment))
    missing = int(LEAST_SECONDS * SAMPLE_RATE) - len(clip.audio)
    return replace(clip, audio=np.pad(clip.audio, (0, max(missing, 0))))


def _new_take(random: Random, rule: str, language: str, voice: synth.Voice, told: set[str], *, held_out: bool) -> Take:
    while True:
        pair = grammar.draw(random, rule, held_out=held_out)
        if pair[language].text not in told:
            told.add(pair[language].text)
            return Take(pair, language, synth.speak(pair[language].text, voice))


def _described(segment: Segment) -> dict[str, Any]:
    words = zip(segment.take.pair[segment.take.language].words, segment.take.speech.words, strict=True)
    return {
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.take.pair[segment.take.language].text,
        "words": [
            {"word": word.text, "start": round(segment.start + start, 3), "end": round(segment.start + end, 3)}
            for word, (start, end) in words
        ],
    }


def _gap(random: Random, most: float) -> Audio:
    return np.zeros(int(random.uniform(0.1, most) * SAMPLE_RATE), np.float32)


if __name__ == "__main__":
    main()
