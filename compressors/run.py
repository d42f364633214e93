"""One checkpoint through a chain of methods into a new checkpoint folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from asr_core import compressed
from asr_core.checkpoint import Checkpoint
from asr_core.compressed import Record, Step
from asr_core.errors import ExportError, UsageError
from asr_core.isolate import Progress
from compressors import base, calibration, folder
from compressors.base import Applied
from compressors.calibration import Calibration, Window
from compressors.divergence import mean_kl
from compressors.model import Model
from compressors.recipe import Planned
from compressors.training import DivergedError
from parity.data import Utterance

TRAINING = ".training"  # beside the output: what trainings keep until the run is through
LAST_GOOD = "last-good"


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
    judging: Sequence[Utterance] | None = None,
    hear: Callable[[Checkpoint, Sequence[Utterance]], list[Window]] = calibration.windows,
) -> Compressed:
    """Apply the steps in order and write the result to ``out``; one half of the utterances calibrates, the other judges.

    With ``judging``, those judge and all the utterances calibrate. ``hear`` makes windows of them.

    Every step's calibration hears the model as the steps before it left it. Steps that train keep their state beside ``out``
    until the run is through: the same run goes on from there. Raises :class:`ExportError` where a training breaks, and leaves
    its last good model there too.
    """
    folder.check_free(out)
    kept = out.with_name(f"{out.name}{TRAINING}")
    first, second = calibration.halves(utterances) if judging is None else (utterances, judging)

    def calibrating() -> list[Window]:
        calibration.check_sound(first)
        return hear(source, first)

    heard = Calibration(calibrating, source)
    before = model = Model.open(source)
    steps: list[Step] = []
    for number, planned in enumerate(plan, 1):
        method = base.method(planned.method)
        heard.work = kept / _stamp(source, plan[:number])
        try:
            applied = method.apply(model, planned.parameters, heard, partial(_tell, progress, planned.method))
        except DivergedError as broken:
            good = heard.work / LAST_GOOD
            shutil.rmtree(good, ignore_errors=True)
            made = [*steps, _step(source, planned, broken.applied)]
            folder.write(good, source, broken.applied.model, made, sorted({*_seen(source), *heard.seen}), None)
            at = f"The model as it was after step {broken.step} is in {good}."
            raise ExportError(f"{planned.method}: {broken} {at}") from broken
        model = applied.model
        steps.append(_step(source, planned, applied))
    progress("judge")
    seen = sorted({*_seen(source), *heard.seen})
    held_out = [window for window in hear(source, second) if window.clip not in seen] if second else []
    kl = mean_kl(before, model, held_out, seen) if held_out else None
    progress("write")
    checkpoint, record = folder.write(out, source, model, steps, seen, kl)
    shutil.rmtree(kept, ignore_errors=True)
    return Compressed(checkpoint, record, steps)


def controls(source: Checkpoint, plan: Sequence[Planned]) -> list[Planned]:
    """The trainings of a plan without what it compresses: what they do to the uncompressed source tells their own harm.

    Raises :class:`UsageError` where no step of the plan trains.
    """
    model = Model.open(source)
    made = []
    for planned in plan:
        control = getattr(base.method(planned.method), "control", None)
        if control is not None:
            name, given = control(model, planned.parameters)
            made.append(Planned(name, base.parameters(name, given)))
    if not made:
        raise UsageError("a control is for steps that train; this recipe has none.")
    return made


def _step(source: Checkpoint, planned: Planned, applied: Applied) -> Step:
    parameters = planned.parameters.model_dump(mode="json")
    return Step(method=planned.method, parameters=parameters, parent=source.fingerprint, effects=applied.effects)


def _stamp(source: Checkpoint, plan: Sequence[Planned]) -> str:
    """A name for the work of a plan's last step: after everything that led there."""
    steps = [[planned.method, planned.parameters.model_dump(mode="json")] for planned in plan]
    digest = hashlib.sha256(json.dumps([source.fingerprint, steps], sort_keys=True).encode()).hexdigest()
    return f"{len(plan)}-{plan[-1].method}-{digest[:12]}"


def _tell(progress: Progress, method: str, stage: str) -> None:
    progress(f"{method}: {stage}")


def _seen(source: Checkpoint) -> list[str]:
    """The clips that calibrated the source itself."""
    record = compressed.read(source.path)
    return record.calibration if record else []
