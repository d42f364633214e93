"""Whole recordings against openai-whisper: `python -m tests.longform_by_hand CHECKPOINT RECORDING… [--artifact FOLDER]`.

Too slow for the suite. Every recording is transcribed by openai-whisper's ``transcribe()`` with the checkpoint's weights and by
the artifact (the PyTorch runner without one), and the segments are compared: seek, start, end, tokens, text, temperature.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import torch

from asr_core import audio
from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.tokens import load_tokenizer
from asr_core.transcribe import Bundle, TranscribeOptions, transcribe
from runners.base import open_runner
from tests import openai_oracle

COMPARED = ("seek", "start", "end", "tokens", "text", "temperature")


@click.command(help=__doc__)
@click.argument("model")
@click.argument("recordings", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--artifact", type=click.Path(exists=True, path_type=Path))
@click.option("--beam-size", type=int, help="Beams; greedy without.")
@click.option("--fallback/--no-fallback", default=False, help="Temperatures up to 1; above 0 tokens are drawn, and differ.")
@click.option("--previous-text/--no-previous-text", default=True, help="Whether what was said is the next window's prompt.")
@click.option("--language")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Both sides' segments go here.")
def main(
    model: str,
    recordings: tuple[Path, ...],
    artifact: Path | None,
    beam_size: int | None,
    fallback: bool,
    previous_text: bool,
    language: str | None,
    json_file: Path | None,
) -> None:
    """Run the comparison."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(model)
    oracle = openai_oracle.model(checkpoint, checkpoint.alignment_heads)
    target = Artifact.open(artifact).manifest.target if artifact else "pytorch"
    runner = open_runner(target, artifact or checkpoint.path, 1)
    bundle = Bundle(load_tokenizer(checkpoint.path), audio.mel_filters(checkpoint.dims.n_mels))
    temperatures = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) if fallback else (0.0,)
    suppressed = checkpoint.generation["suppress_tokens"]
    policy = DecodeOptions(language, timestamps=True, temperatures=temperatures, beam_size=beam_size, suppress=tuple(suppressed))
    kept, same = {}, 0
    for path in recordings:
        started = time.perf_counter()
        ours = transcribe(runner, bundle, path, TranscribeOptions(policy, condition_on_previous_text=previous_text))
        between = time.perf_counter()
        theirs = openai_oracle.transcribe(
            checkpoint, oracle, audio.load_audio(path), temperature=temperatures, suppress_tokens=suppressed,
            beam_size=beam_size, language=language, condition_on_previous_text=previous_text,
        )  # fmt: skip
        ended = time.perf_counter()
        rows = [{name: getattr(segment, name) for name in COMPARED} for segment in ours.segments]
        expected = [{name: segment[name] for name in COMPARED} for segment in theirs["segments"]]
        kept[path.name] = {"ours": rows, "openai": expected}
        same += rows == expected
        click.echo(
            f"{path.name}: {ours.duration_s / 60:.1f} min, {len(rows)} and {len(expected)} segments, "
            f"{'identical' if rows == expected else _first_difference(rows, expected)}, language {ours.language} and "
            f"{theirs['language']}; {between - started:.1f} s and {ended - between:.1f} s"
        )
    click.echo(f"{same} of {len(recordings)} recordings have identical segments")
    if json_file:
        json_file.write_text(json.dumps(kept), encoding="utf-8")


def _first_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    for i, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return f"DIFFERENT from segment {i}: {one} and {other}"
    return f"DIFFERENT from segment {min(len(ours), len(theirs))}: one side ends"


if __name__ == "__main__":
    main()
