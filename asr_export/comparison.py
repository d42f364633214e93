"""Compare every technique on every runtime that carries its form: shipped sizes, WER, speed, memory; as Markdown and picture."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asr_export.bench import Contender, Samples
from asr_export.cli import handle_errors, stage_progress

if TYPE_CHECKING:
    from compressors.comparison import Line, Sets
    from compressors.table import Speed
    from compressors.winograd import Measured

SIDE_BY_SIDE = 6  # contenders beside the original: each is a process that keeps its model
TOKENS = 15  # a window, as the carried clips have


@click.command(help=__doc__, epilog="Exit codes: see the README, section 'Exit codes'.")
@click.option("--model", default="reference", show_default=True, help="Checkpoint folder, hub id, or 'reference' (carried).")
@click.option("--out", default="artifacts/compression", show_default=True, type=click.Path(path_type=Path), help="Where it lies.")
@click.option(
    "--recipe", "chosen", multiple=True, type=click.Path(path_type=Path), help="Only these recipes.  [default: all carried ones]"
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="NeMo manifest or LibriSpeech folder to calibrate on.  [default: synthesised clips]",
)
@click.option("--judge", type=click.Path(path_type=Path), help="The same to judge on.  [default: the carried clips]")
@click.option(
    "--rounds", default=7, show_default=True, type=click.IntRange(0), help="Interleaved rounds of timing; 0: no speeds."
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of every measurement.")
@handle_errors
def main(
    model: str, out: Path, chosen: tuple[Path, ...], data: Path | None, judge: Path | None, rounds: int, threads: int
) -> None:
    """Make and measure what is not there yet, and write table.md, table.json and table.png below --out."""
    from asr_core import registry

    registry.require("compress", "export", "pytorch")
    import torch

    from asr_core.checkpoint import Checkpoint
    from compressors import comparison, table, winograd
    from parity import report

    torch.set_num_threads(threads)
    files = comparison.files(chosen)
    lines: list[Line] = []

    def write(speeds: dict[str, Speed], kernels: list[Measured]) -> None:
        """What is known so far."""
        order = [comparison.ORIGINAL, *(file.stem for file in files)]
        lines.sort(key=lambda line: (order.index(line.recipe), line.target != comparison.PYTORCH))
        report.write_json(
            out / "table.json",
            {
                "host": report.host(),
                "lines": [vars(line) for line in lines],
                "speeds": {name: vars(speed) for name, speed in speeds.items()},
            },
        )
        (out / "table.md").write_text(table.markdown(lines, speeds, kernels), encoding="utf-8")
        table.plot(lines, speeds, out / "table.png")

    with stage_progress() as progress:
        bar = progress.add_task("", total=None, stage="")

        def tell(name: str, stage: str) -> None:
            progress.update(bar, description=name, stage=stage)

        bench = comparison.Comparison(Checkpoint.open(model), _sets(data, judge, out), out, threads, tell)
        lines += bench.original(comparison.targets(files))
        for pytorch in (False, True):
            for file in files:
                lines += bench.lines(file, pytorch=pytorch)
                write({}, [])
    if rounds:
        write(_speeds(lines, out, rounds, threads), [winograd.measure(width, rounds) for width in winograd.WIDTHS])
    for line in lines:
        if line.problem:
            click.echo(f"{line.title}, {line.artifact}: {line.problem}", err=True)
    click.echo(f"{out / 'table.md'}, {out / 'table.png'}")


def _sets(data: Path | None, judge: Path | None, out: Path) -> Sets:
    import reference
    from asr_core import registry
    from compressors.comparison import Sets
    from parity.data import read

    if data is None:
        registry.require("train")
        from reference import make_clips

        data = out / "calibration" / "manifest.jsonl"
        if not data.exists():
            make_clips.write(data.parent, held_out=False)
    return Sets(read(data), read(judge or reference.manifest_path()))


def _speeds(lines: Sequence[Line], out: Path, rounds: int, threads: int) -> dict[str, Speed]:
    """How fast artifacts are beside the original's plain one of the same target, in the same rounds."""
    from compressors.comparison import ORIGINAL, PLAIN
    from compressors.table import key

    timed: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line.seconds is not None:
            timed[line.target].append(line)
    found: dict[str, Speed] = {}
    for target, own in timed.items():
        base = next((line for line in own if (line.recipe, line.artifact) == (ORIGINAL, f"{target}-{PLAIN}")), None)
        if base is None:
            continue
        others = [line for line in own if line is not base]
        for group in _groups(others):
            contenders = [Contender(key(line), target, Path(line.path)) for line in [base, *group]]
            samples = _timed(contenders, out, rounds, threads)
            found |= {key(line): _speed(samples, key(base), key(line)) for line in [base, *group]}
    return found


def _groups(lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    for start in range(0, len(lines), SIDE_BY_SIDE):
        yield lines[start : start + SIDE_BY_SIDE]


def _timed(contenders: list[Contender], out: Path, rounds: int, threads: int) -> Samples:
    """The samples of this very group, from a former run where it had one."""
    from asr_export.bench import measure
    from parity import report

    named = json.dumps([[contender.name, str(contender.path)] for contender in contenders] + [[rounds, threads]])
    file = out / "speeds" / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(file, {"samples": measure(contenders, rounds, TOKENS, threads, processor=True)})
    samples: Samples = json.loads(file.read_text(encoding="utf-8"))["samples"]
    return samples


def _speed(samples: Samples, base: str, own: str) -> Speed:
    from statistics import median

    from compressors.table import Speed

    seconds, plain = ([sum(part or 0.0 for part in sample.values()) for sample in samples[name]] for name in (own, base))
    return Speed(median(one / other for one, other in zip(plain, seconds, strict=True)), median(seconds))
