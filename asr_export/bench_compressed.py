"""What compression does to speed where layers are wide: `python -m asr_export.bench_compressed --out DIR`.

Checkpoints of real shapes with random weights are compressed without calibration (it would change numbers, not work), exported,
and timed by turns with their dense artifact, in seconds of the processor: encoding a window, and decode steps.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from asr_export.bench import Contender, Samples, measure
from asr_export.cli import handle_errors, stage_progress

if TYPE_CHECKING:
    from rich.table import Table

    from asr_core.checkpoint import Checkpoint

DENSE = "dense"
TECHNIQUES: dict[str, tuple[str, dict[str, object]]] = {
    "low rank 25 %": ("lowrank", {"share": 0.25, "criterion": "svd"}),
    "FFN −50 %": ("ffn", {"share": 0.5, "refit": False, "criterion": "magnitude"}),
    "50 % zeros": ("prune", {"sparsity": 0.5, "criterion": "magnitude"}),
}


@click.command(help=__doc__)
@click.option("--shape", "shapes", multiple=True, default=("tiny", "small"), show_default=True)
@click.option("--artifact", "artifacts", multiple=True, default=("onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-int8"))
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(3), help="Interleaved rounds.")
@click.option("--tokens", default=30, show_default=True, type=click.IntRange(1, 400), help="Forced tokens a window.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoints, artifacts and raw samples; kept.")
@handle_errors
def main(shapes: tuple[str, ...], artifacts: tuple[str, ...], rounds: int, tokens: int, threads: int, out: Path) -> None:
    """Run the command."""
    from rich.console import Console

    from parity import report

    found: dict[str, Samples] = {}
    for shape in shapes:
        checkpoints = _checkpoints(shape, out)
        for artifact in artifacts:
            target = artifact.partition("-")[0]
            contenders = [
                Contender(name, target, _exported(checkpoint, artifact, out / shape / f"{folder}-{artifact}"))
                for name, (folder, checkpoint) in checkpoints.items()
            ]
            found[f"{shape} {artifact}"] = measure(contenders, rounds, tokens, threads, processor=True)
            content = {"host": report.host() | {"threads": threads}, "tokens": tokens, "samples": found}
            report.write_json(out / "samples.json", content)
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=120)).print(_table(found))


def _checkpoints(shape: str, out: Path) -> dict[str, tuple[str, Checkpoint]]:
    """By technique: the folder's name, and the checkpoint."""
    from asr_core.checkpoint import Checkpoint
    from compressors import base
    from compressors.recipe import Planned
    from compressors.run import run
    from reference import shapes

    dense = out / shape / DENSE
    if not (dense / "config.json").exists():
        shapes.write(shapes.SHAPES[shape], dense)
    source = Checkpoint.open(str(dense))
    made = {DENSE: (DENSE, source)}
    for name, (method, given) in TECHNIQUES.items():
        folder = out / shape / method
        if not folder.exists():
            run(source, [Planned(method, base.parameters(method, given))], [], folder)
        made[name] = (method, Checkpoint.open(str(folder)))
    return made


def _exported(checkpoint: Checkpoint, artifact: str, final: Path) -> Path:
    from asr_core import build

    target, _, precision = artifact.partition("-")
    if not build.up_to_date(checkpoint, target, precision, final):
        with stage_progress() as progress:
            bar = progress.add_task(final.name, total=None, stage="")
            build.stage(checkpoint, target, precision, final, lambda stage: progress.update(bar, stage=stage)).publish()
    return final


def _table(found: dict[str, Samples]) -> Table:
    from rich.table import Table

    table = Table(title="Speed-up over the dense artifact: median of the rounds (lowest to highest)", title_justify="left")
    for column in ("shape, artifact", "technique", "encoder", "decode step"):
        table.add_column(column, no_wrap=True)
    for name, samples in found.items():
        for technique, own in samples.items():
            if technique == DENSE:
                continue
            cells = []
            for part in ("encode_s", "decode_s"):
                pairs = zip(samples[DENSE], own, strict=True)
                ratios = sorted((dense[part] or 0.0) / (time[part] or 1.0) for dense, time in pairs)
                cells.append(f"{median(ratios):.2f}× ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            table.add_row(name, technique, *cells)
        table.add_section()
    return table


if __name__ == "__main__":
    main()
