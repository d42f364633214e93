"""Makes the carried clips: `python -m reference.make_clips --out DIR`, the same ones every time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
import numpy as np
import soundfile

from reference import grammar, manifest_path, synth
from reference.batches import Audio, noise, with_noise
from reference.synth import SAMPLE_RATE

SEED = 2024
LEAST_SECONDS = 1.0
PEAK = 0.35  # of full scale: the files compress better than at 1


@dataclass(frozen=True)
class Kind:
    """Clips of one kind: how many, what is said, and how long they are: at least ``least`` seconds, then silence fills up."""

    name: str
    count: int
    noisy: int  # how many of them have noise behind the speech
    rule: str
    least: float  # seconds
    most: float  # seconds


KINDS = (
    Kind("short", count=22, noisy=3, rule="fragment", least=1.0, most=2.6),
    Kind("sentence", count=72, noisy=11, rule="sentence", least=1.0, most=9.0),
    Kind("paused", count=14, noisy=2, rule="sentence", least=9.0, most=28.5),
)


@dataclass(frozen=True)
class Clip:
    """A named recording, float32 [samples] at 16 kHz, and its words."""

    name: str
    audio: Audio
    text: str


def clips(seed: int = SEED) -> Iterator[Clip]:
    """Yield every clip; no sentence and no speaker of theirs is trained on."""
    random = Random(seed)
    told: set[str] = set()
    for kind in KINDS:
        for index in range(kind.count):
            # Evenly spread lengths: each part of the range is a share of the clips.
            share = (index + random.random()) / kind.count
            shortest = kind.least if kind.least <= LEAST_SECONDS else kind.least + share * (kind.most - kind.least)
            clip = _clip(random, kind, shortest, told, f"{kind.name}-{index:02d}")
            noisy = index * kind.noisy // kind.count != (index + 1) * kind.noisy // kind.count
            yield _noisy(random, clip) if noisy else clip
    yield Clip("silence", np.zeros(3 * SAMPLE_RATE, np.float32), "")
    yield Clip("noise", noise(random, 3 * SAMPLE_RATE) * np.float32(0.01), "")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=manifest_path().parent)
def main(out: Path) -> None:
    """Write the clips as FLAC with their manifest."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip in clips():
        soundfile.write(out / f"{clip.name}.flac", clip.audio, SAMPLE_RATE, subtype="PCM_16")
        seconds = len(clip.audio) / SAMPLE_RATE
        entry = {"audio_filepath": f"{clip.name}.flac", "duration": seconds, "text": clip.text}
        lines.append(json.dumps(entry))
    (out / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    click.echo(f"{len(lines)} clips in {out}")


def _clip(random: Random, kind: Kind, shortest: float, told: set[str], name: str) -> Clip:
    """Return one sentence of a held-out voice, with silence around it."""
    voice = synth.draw_voice(random, held_out=True)
    while True:
        text = _new_sentence(random, kind.rule, told)
        speech = synth.speak(text, voice) * np.float32(PEAK)
        audio = np.concatenate([_gap(random, 0.4), speech, _gap(random, 0.8)])
        if len(audio) <= kind.most * SAMPLE_RATE:
            missing = int(shortest * SAMPLE_RATE) - len(audio)
            return Clip(name, np.pad(audio, (0, max(missing, 0))), text)


def _new_sentence(random: Random, rule: str, told: set[str]) -> str:
    while True:
        text = grammar.draw(random, rule, held_out=True)
        if text not in told:
            told.add(text)
            return text


def _noisy(random: Random, clip: Clip) -> Clip:
    return Clip(clip.name, with_noise(random, clip.audio, random.uniform(12, 25)), clip.text)


def _gap(random: Random, most: float) -> Audio:
    return np.zeros(int(random.uniform(0.1, most) * SAMPLE_RATE), np.float32)


if __name__ == "__main__":
    main()
