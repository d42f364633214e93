"""Distillation: a student of some of the teacher's layers learns to say what the teacher says (Hinton et al. 2015).

The loss is α·CE + (1 − α)·T²·KL, by default with the teacher's own transcripts as labels (as Distil-Whisper's, Gandhi et al.
2023); the teacher's likeliest tokens are written to disk once and serve every round, and every other student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from asr_core.errors import UsageError
from asr_core.isolate import Progress
from compressors import examples, latent, training
from compressors.base import Applied
from compressors.calibration import Calibration
from compressors.methods import layers
from compressors.methods.finetune import Heard, parent_of
from compressors.model import Model
from compressors.teacher import Kept
from compressors.training import Schedule, Weighing

Choice = Literal["first", "last", "even"]


class Parameters(Schedule):
    """The student's layers, the loss, and how to train."""

    decoder: int | None = Field(default=None, ge=1, description="decoder layers of the student; else half of the teacher's")
    encoder: int | None = Field(default=None, ge=1, description="encoder layers of the student; else all")
    keep: Choice = Field(default="even", description="which of the teacher's layers: the first, the last, or evenly spread ones")
    alpha: float = Field(default=0.5, ge=0, le=1, description="weight of the cross-entropy; that of the KL is what is left to 1")
    temperature: float = Field(default=2.0, gt=0, description="of both distributions in the KL")
    labels: Literal["teacher", "data"] = Field(default="teacher", description="whose transcripts the cross-entropy is with")
    top: int = Field(default=64, ge=1, description="likeliest tokens of the teacher that are kept; the others count as one")
    freeze: bool = Field(default=True, description="leave the encoder as it is, where the student has all of its layers")
    teacher: str | None = Field(default=None, description="checkpoint to learn from; else the one that the run began with")
    cache: Path | None = Field(default=None, description="folder for the teacher's answers, to share among students")
    rate: float = Field(default=2e-4, gt=0, description="peak learning rate")


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Choose the student's layers and train it."""
    student = chosen(model, parameters, calibration, progress)
    source = parent_of(parameters.teacher, calibration)
    work = training.work_of(calibration, "distil")
    heard = Heard(examples.gather(source, parameters.data, parameters.windows, parameters.seed, work), calibration, work)
    teacher = Kept(
        source,
        Model.open(source),
        heard,
        parameters.cache or work / "teacher",
        top=parameters.top,
        temperature=parameters.temperature,
        pseudo=parameters.labels == "teacher",
    )
    whole = student.dims.encoder_layers == source.dims.encoder_layers
    return training.train(
        student,
        latent.latents(student, {}, encoder=not (whole and parameters.freeze)),
        teacher,
        teacher,
        Weighing(parameters.alpha, 1 - parameters.alpha, 0.0, parameters.temperature),
        parameters,
        work,
        progress,
    )


def control(model: Model, parameters: Parameters) -> tuple[str, dict[str, object]]:
    """The parent as its own student: no layer is left out, and the encoder may move as the student's may."""
    every = {"encoder": model.dims.encoder_layers, "decoder": model.dims.decoder_layers}
    return "distil", parameters.model_dump(mode="json") | every


def chosen(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Model:
    """The student before it is trained."""
    counts = {"encoder": model.dims.encoder_layers, "decoder": model.dims.decoder_layers}
    wanted = {
        "encoder": parameters.encoder or counts["encoder"],
        "decoder": parameters.decoder or max(1, counts["decoder"] // 2),
    }
    for side in layers.SIDES:
        if wanted[side] > counts[side]:
            raise UsageError(f"distil: {side}={wanted[side]} is more than the {counts[side]} layers of the teacher.")
    staying = {side: kept(counts[side], wanted[side], parameters.keep) for side in layers.SIDES}
    gone = {side: [i for i in range(counts[side]) if i not in staying[side]] for side in layers.SIDES}
    if not any(gone.values()):
        return model
    return layers.apply(model, layers.Parameters(**gone), calibration, progress).model


def kept(count: int, wanted: int, choice: Choice) -> list[int]:
    """Which of ``count`` layers stay; evenly spread ones begin with the first and end with the last."""
    if choice == "first":
        return list(range(wanted))
    if choice == "last" or wanted == 1:
        return list(range(count - wanted, count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]
