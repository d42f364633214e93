"""Fine-tuning: repairs what the steps before it broke, held to the parent's predictions and encoder states.

Zeros stay zeros, factors are trained as factors, integers and centroids stay as they are. Without the parent's hold a converged
model gets worse from being trained on, so compare with the dense control: the same training of the uncompressed parent.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from asr_core.isolate import Progress
from compressors import examples, latent, training
from compressors.base import Applied
from compressors.calibration import Calibration
from compressors.examples import Example, Examples
from compressors.latent import Rounding
from compressors.model import Model
from compressors.teacher import Live
from compressors.training import Schedule, Weighing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asr_core.checkpoint import Checkpoint


HEARD = "heard.txt"


class Parameters(Schedule):
    """How to train, what the loss is made of, and whose predictions to keep."""

    entropy: float = Field(default=1.0, ge=0, description="weight of the cross-entropy with the transcripts")
    divergence: float = Field(default=1.0, ge=0, description="weight of the KL to the parent")
    encoder: float = Field(default=1.0, ge=0, description="weight of the mean square error of the encoder states")
    parent: str | None = Field(default=None, description="checkpoint to stay close to; else the one that the run began with")


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Train every tensor but the sinusoids."""
    return tuned(model, {}, parameters, calibration, progress)


def control(model: Model, parameters: Parameters) -> tuple[str, dict[str, object]]:
    """The same training, for the parent itself."""
    return "finetune", parameters.model_dump(mode="json")


def tuned(
    model: Model,
    roundings: Mapping[str, Rounding],
    parameters: Parameters,
    calibration: Calibration,
    progress: Progress,
    part: str = "",
    *,
    rest: bool = False,
) -> Applied:
    """Train with some weights rounded on the way; ``part`` names one of several trainings of a step.

    With ``rest``, the encoder stays as it is where it is the parent's.
    """
    source = parent_of(parameters.parent, calibration)
    parent = Model.open(source)
    work = training.work_of(calibration, "finetune")
    chosen = Heard(examples.gather(source, parameters.data, parameters.windows, parameters.seed, work), calibration, work)
    return training.train(
        model,
        latent.latents(model, roundings, encoder=not (rest and _same_encoder(model, parent))),
        chosen,
        Live(parent, 1.0, training.device()),
        Weighing(parameters.entropy, parameters.divergence, parameters.encoder),
        parameters,
        work / part,
        progress,
    )


def _same_encoder(model: Model, parent: Model) -> bool:
    names = {name for one in (model, parent) for name in one.tensors if name.startswith(latent.ENCODER)}
    return all(
        name in model.tensors and name in parent.tensors and torch.equal(model.tensors[name], parent.tensors[name])
        for name in names
    )


def parent_of(named: str | None, calibration: Calibration) -> Checkpoint:
    """The checkpoint to learn from: the named one, or the run's source."""
    from asr_core.checkpoint import Checkpoint

    if named is not None:
        return Checkpoint.open(named)
    if calibration.source is None:
        raise ValueError("a training needs the checkpoint that its run began with: Calibration.source")
    return calibration.source


class Heard:
    """Examples that note which clips were heard, over restarts too, so that nobody judges on them."""

    def __init__(self, wrapped: Examples, calibration: Calibration, work: Path) -> None:
        self.digest = wrapped.digest
        self._wrapped, self._trained, self._file = wrapped, calibration.trained, work / HEARD
        if self._file.exists():
            self._trained.update(self._file.read_text(encoding="utf-8").split())

    def __len__(self) -> int:
        return len(self._wrapped)

    def __getitem__(self, index: int) -> Example:
        example = self._wrapped[index]
        if example.clip is not None and example.clip not in self._trained:
            self._trained.add(example.clip)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{example.clip}\n")
        return example
