"""What ``--trim-silence`` gains and what it changes, on clips of which it is known what is said.

``python -m asr_export.bench_trim --artifact FOLDER…``: each artifact transcribes every clip in a whole window and in a trimmed
one by turns, greedily, without timestamps; the time is the processor's, from the file to the text.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asr_export.cli import checkpoint_options, handle_errors, open_checkpoint

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint
    from parity.data import Utterance

Heard = list[tuple[str, float]]  # text and seconds, a clip


@click.command(help=__doc__)
@checkpoint_options
@click.option("--artifact", "folders", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", "source", type=click.Path(path_type=Path), help="NeMo manifest or LibriSpeech folder [carried clips].")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Texts and seconds go here.")
@handle_errors
def main(
    model: str, adapter: str | None, folders: tuple[Path, ...], source: Path | None, threads: int, json_file: Path | None
) -> None:
    """Run the command."""
    import reference
    from parity import data

    checkpoint, utterances = open_checkpoint(model, adapter), data.read(source or reference.manifest_path())
    heard = {}
    for folder in folders:
        heard[folder.name] = whole, trimmed = hear(folder, utterances, threads)
        click.echo(f"{folder.name}: {_summary(checkpoint, utterances, whole, trimmed)}")
    if json_file:
        json_file.write_text(json.dumps({"threads": threads, "heard": heard}), encoding="utf-8")


def hear(folder: Path, utterances: list[Utterance], threads: int) -> tuple[Heard, Heard]:
    """Every clip in a whole window and in a trimmed one; the first clip is heard once more before, not counted."""
    from asr_core.artifact import Artifact
    from asr_core.decode import DecodeOptions
    from asr_core.transcribe import Bundle, TranscribeOptions, transcribe
    from runners.base import open_runner

    runner, bundle = open_runner(Artifact.open(folder).manifest.target, folder, threads), Bundle.read(folder)
    found: tuple[Heard, Heard] = ([], [])
    for utterance in [utterances[0], *utterances]:
        options = TranscribeOptions(DecodeOptions(utterance.language))
        for own, chosen in zip(found, (options, replace(options, trim_silence=True)), strict=True):
            started = time.process_time()
            own.append((transcribe(runner, bundle, utterance.path, chosen).text.strip(), time.process_time() - started))
    runner.close()
    return found[0][1:], found[1][1:]


def _summary(checkpoint: Checkpoint, utterances: list[Utterance], whole: Heard, trimmed: Heard) -> str:
    from parity.compare import word_errors
    from parity.session import normaliser

    normalise = normaliser(checkpoint)
    said = [normalise(one.text, one.language) for one in utterances]
    rates = [
        word_errors(said, [normalise(text, one.language) for (text, _), one in zip(heard, utterances, strict=True)]).rate or 0.0
        for heard in (whole, trimmed)
    ]
    same = statistics.mean(one == other for (one, _), (other, _) in zip(whole, trimmed, strict=True))
    totals = [sum(seconds for _, seconds in heard) for heard in (whole, trimmed)]
    return (
        f"{totals[0]:.2f} s and {totals[1]:.2f} s trimmed, {totals[0] / totals[1]:.2f}×; {same:.1%} of the texts are the same; "
        f"WER {rates[0]:.2%} and {rates[1]:.2%}"
    )


if __name__ == "__main__":
    main()
