"""Long recordings with known boundaries: `python -m reference.longform OUT` joins the clips; none is carried."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import soundfile

from reference import manifest_path
from reference.synth import SAMPLE_RATE

MINUTES = (1, 2, 5, 10, 20)
PAUSE = (0.1, 0.9)  # seconds between two clips
LONG_PAUSE = (2.0, 6.0)  # seconds, one pause in eight
LONG_PAUSE_SHARE = 1 / 8
SHORTEST = 3  # seconds at the end that no clip need fill; many clips are shorter


def assemble(
    minutes: float, language: str, seed: int = 0, manifest: Path | None = None
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Return a recording, float32 [samples] at 16 kHz, so long or up to 3 s shorter, and its entry for a manifest.

    The same arguments give the same recording. Its clips come in a random order, each as often as the others; times in the
    entry are in seconds.
    """
    random = Random(f"{minutes} {language} {seed}")
    pieces: list[npt.NDArray[np.float32]] = []
    segments: list[dict[str, Any]] = []
    samples, most = 0, round(minutes * 60 * SAMPLE_RATE)
    for entry, audio in _endless(random, language, manifest or manifest_path()):
        if samples > most - SHORTEST * SAMPLE_RATE:
            break
        if samples + len(audio) > most:
            continue  # a shorter one comes
        segments += [_moved(segment, samples / SAMPLE_RATE) for segment in entry["segments"]]
        pause = random.uniform(*(LONG_PAUSE if random.random() < LONG_PAUSE_SHARE else PAUSE))
        pieces += [audio, np.zeros(round(pause * SAMPLE_RATE), np.float32)]
        samples += len(audio) + len(pieces[-1])
    recording = np.concatenate(pieces)[:most]
    entry = {
        "audio_filepath": f"{language}-{minutes:g}min.flac",
        "duration": len(recording) / SAMPLE_RATE,
        "text": " ".join(segment["text"] for segment in segments),
        "lang": language,
        "segments": segments,
    }
    return recording, entry


def _endless(random: Random, language: str, manifest: Path) -> Iterator[tuple[dict[str, Any], npt.NDArray[np.float32]]]:
    """Yield a language's clips with speech and their audio, over and over in new orders."""
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    spoken = [entry for entry in entries if entry["lang"] == language and entry["segments"]]
    while True:
        for entry in random.sample(spoken, len(spoken)):
            yield entry, soundfile.read(manifest.parent / entry["audio_filepath"], dtype="float32")[0]


def _moved(part: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return a segment or a word so many seconds later."""
    moved = part | {name: round(part[name] + seconds, 3) for name in ("start", "end")}
    return moved | ({"words": [_moved(word, seconds) for word in part["words"]]} if "words" in part else {})


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--minutes", type=float, multiple=True, default=MINUTES, show_default=True, help="Lengths of the recordings.")
@click.option("--language", "languages", multiple=True, default=("en", "es"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, minutes: tuple[float, ...], languages: tuple[str, ...], seed: int) -> None:
    """Write long recordings as FLAC with their manifest."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for language in languages:
        for length in minutes:
            recording, entry = assemble(length, language, seed)
            soundfile.write(out / entry["audio_filepath"], recording, SAMPLE_RATE, subtype="PCM_16")
            lines.append(json.dumps(entry, ensure_ascii=False))
    (out / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    click.echo(f"{len(lines)} recordings in {out}")


if __name__ == "__main__":
    main()
