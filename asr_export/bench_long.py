"""How much faster a long recording goes when its stretches with speech are decoded side by side.

``python -m asr_export.bench_long RECORDING --artifact FOLDER…``: each artifact transcribes the recording sequentially and in
batches by turns, greedily, without timestamps or previous text, each as asr-transcribe does with so many threads; the ratios
are those of neighbouring rounds.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import click

from asr_export.cli import handle_errors


@click.command(help=__doc__)
@click.argument("recording", type=click.Path(exists=True, path_type=Path))
@click.option("--artifact", "folders", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(2))
@click.option("--tokens", default=100, show_default=True, type=click.IntRange(1), help="Bound on the tokens of a window.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="After one that is not counted.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Raw samples go here.")
@handle_errors
def main(
    recording: Path, folders: tuple[Path, ...], batch_size: int, tokens: int, rounds: int, threads: int, json_file: Path | None
) -> None:
    """Run the command."""
    samples = {}
    for folder in folders:
        samples[folder.name] = measure(recording, folder, batch_size, tokens, rounds, threads)
        click.echo(f"{folder.name}, batches of {batch_size}")
        for clock in ("wall", "processor"):
            click.echo(f"  {clock}: {_summary([sample[clock] for sample in samples[folder.name]])}")
    if json_file:
        json_file.write_text(json.dumps({"threads": threads, "batch_size": batch_size, "seconds": samples}), encoding="utf-8")


def measure(
    recording: Path, folder: Path, batch_size: int, tokens: int, rounds: int, threads: int
) -> list[dict[str, tuple[float, float]]]:
    """Seconds of each round by the wall's clock and the processors', sequentially and in batches."""
    from asr_core.artifact import Artifact
    from asr_core.decode import DecodeOptions
    from asr_core.transcribe import Bundle, TranscribeOptions, transcribe
    from runners.base import open_team

    artifact = Artifact.open(folder)
    ways = [(open_team(artifact.manifest.target, folder, threads, size), size) for size in (1, batch_size)]
    bundle = Bundle.read(folder)
    policy = DecodeOptions(max_new_tokens=tokens, no_speech_threshold=None)
    sequential = TranscribeOptions(policy, condition_on_previous_text=False)
    samples = []
    for _ in range(rounds + 1):
        times = []
        for team, size in ways:
            started, used = time.perf_counter(), time.process_time()
            transcribe(team, bundle, recording, replace(sequential, batch_size=size))
            times.append((time.perf_counter() - started, time.process_time() - used))
        samples.append({"wall": (times[0][0], times[1][0]), "processor": (times[0][1], times[1][1])})
    for runner in itertools.chain.from_iterable(team for team, _ in ways):
        runner.close()
    return samples[1:]


def _summary(pairs: list[tuple[float, float]]) -> str:
    ratios = sorted(one / other for one, other in pairs)
    one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return f"{one:.2f} s and {other:.2f} s, {statistics.median(ratios):.2f}× ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
