"""One checkpoint through a chain of methods into a new checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from asr_core import compressed
from asr_core.checkpoint import Checkpoint
from asr_core.compressed import Record, Step
from asr_core.isolate import Progress
from compression import base, calibration, folder
from compression.calibration import Calibration, Window
from compression.divergence import mean_kl
from compression.model import Model
from compression.recipe import Planned
from parity.data import Utterance


@dataclass(frozen=True)
class Compressed:
    """What came of a run: the new checkpoint, its record, and the steps of this run with their effects."""

    checkpoint: Checkpoint
    record: Record
    steps: list[Step]


def run(
    source: Checkpoint,
    plan: Sequence[Planned],
    utterances: Sequence[Utterance],
    out: Path,
    progress: Progress = lambda stage: None,
) -> Compressed:
    """Apply the steps in order and write the result to ``out``; one half of the utterances calibrates, the other judges.

    Every step's calibration hears the model as the steps before it left it.
    """
    folder.check_free(out)
    first, second = calibration.halves(utterances)

    def calibrating() -> list[Window]:
        calibration.check_sound(first)
        return calibration.windows(source, first)

    heard = Calibration(calibrating)
    before = model = Model.open(source)
    steps = []
    for planned in plan:
        method = base.method(planned.method)
        applied = method.apply(model, planned.parameters, heard, partial(_tell, progress, planned.method))
        model = applied.model
        parameters = planned.parameters.model_dump(mode="json")
        steps.append(Step(method=planned.method, parameters=parameters, parent=source.fingerprint, effects=applied.effects))
    progress("judge")
    seen = sorted({*_seen(source), *heard.seen})
    held_out = [window for window in calibration.windows(source, second) if window.clip not in seen] if second else []
    kl = mean_kl(before, model, held_out, seen) if held_out else None
    progress("write")
    checkpoint, record = folder.write(out, source, model, steps, seen, kl)
    return Compressed(checkpoint, record, steps)


def _tell(progress: Progress, method: str, stage: str) -> None:
    progress(f"{method}: {stage}")


def _seen(source: Checkpoint) -> list[str]:
    """The clips that calibrated the source itself."""
    record = compressed.read(source.path)
    return record.calibration if record else []
