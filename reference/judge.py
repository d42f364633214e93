"""PyTorch's word error rate on the clips: `python -m reference.judge`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import jiwer
import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from reference import checkpoint_path, manifest_path

_BATCH = 8


@dataclass(frozen=True)
class Verdict:
    """What was said in a clip and what was heard, both normalised."""

    clip: str
    said: str
    heard: str

    @property
    def errors(self) -> int:
        """Word errors; every word heard in a clip without speech is one."""
        if not self.said:
            return len(self.heard.split())
        measured = jiwer.process_words(self.said, self.heard)
        return int(measured.substitutions + measured.deletions + measured.insertions)


def judge(checkpoint: Path, manifest: Path) -> list[Verdict]:
    """Transcribe every clip greedily and return the verdicts in the manifest's order."""
    model = WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = WhisperProcessor.from_pretrained(checkpoint)
    normalise = EnglishTextNormalizer(json.loads((checkpoint / "normalizer.json").read_text()))
    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    verdicts = []
    for first in range(0, len(entries), _BATCH):
        batch = entries[first : first + _BATCH]
        files = [manifest.parent / entry["audio_filepath"] for entry in batch]
        for entry, heard in zip(batch, _transcribe(model, processor, files), strict=True):
            said = normalise(entry["text"])
            verdicts.append(Verdict(entry["audio_filepath"], said, normalise(heard)))
    return verdicts


def word_error_rate(verdicts: Sequence[Verdict]) -> float:
    """Return the word errors of all clips over all words said."""
    return sum(v.errors for v in verdicts) / sum(len(v.said.split()) for v in verdicts)


def _transcribe(model: WhisperForConditionalGeneration, processor: WhisperProcessor, files: list[Path]) -> list[str]:
    audio = [soundfile.read(file, dtype="float32")[0] for file in files]
    features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.inference_mode():
        tokens = model.generate(features, language="en", task="transcribe")
    texts: list[str] = processor.batch_decode(tokens, skip_special_tokens=True)
    return texts


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), default=checkpoint_path())
@click.option("--manifest", type=click.Path(path_type=Path), default=manifest_path())
def main(checkpoint: Path, manifest: Path) -> None:
    """Print every clip with errors, then the word error rate."""
    verdicts = judge(checkpoint, manifest)
    for verdict in verdicts:
        if verdict.errors:
            click.echo(f"{verdict.clip}\n  said  {verdict.said}\n  heard {verdict.heard}")
    words = sum(len(v.said.split()) for v in verdicts)
    click.echo(f"WER {word_error_rate(verdicts):.2%} of {words} words in {len(verdicts)} clips")


if __name__ == "__main__":
    main()
