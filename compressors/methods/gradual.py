"""Gradual pruning: zeros in rounds, with fine-tuning after each (Zhu and Gupta 2017).

The share of zeros rises fast at first and slowly at the end: s · (1 - (1 - round / rounds)³). A zero stays zero: trained weights
keep the mask of their round, and in the next one zeros are the least important.
"""

from __future__ import annotations

from functools import partial

from pydantic import Field

from asr_core.isolate import Progress
from compressors import training
from compressors.base import Applied
from compressors.calibration import Calibration
from compressors.methods import finetune, prune
from compressors.model import Model


class Parameters(prune.Parameters, finetune.Parameters):
    """Those of prune and of finetune, whose ``steps`` are those of one round, and the number of rounds."""

    rounds: int = Field(default=4, ge=2, description="how often to prune and to train")


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Prune a bit more in every round, and train every tensor but the sinusoids after it."""
    made = model
    for number in range(1, parameters.rounds + 1):
        tell = partial(_tell, progress, number)
        zeros = parameters.model_copy(update={"sparsity": sparsity(parameters, number)})
        made = prune.apply(made, zeros, calibration, tell).model
        made = finetune.tuned(made, {}, parameters, calibration, tell, f"round-{number}").model
    changed = [name for name, tensor in made.tensors.items() if tensor is not model.tensors[name]]
    return Applied(made, training.effects(model, made, changed))


def control(model: Model, parameters: Parameters) -> tuple[str, dict[str, object]]:
    """As much fine-tuning, for the parent itself."""
    shared = parameters.model_dump(mode="json", include=set(finetune.Parameters.model_fields))
    return "finetune", shared | {"steps": parameters.steps * parameters.rounds}


def sparsity(parameters: Parameters, number: int) -> float:
    """The share of zeros after a round, counted from 1."""
    return parameters.sparsity * (1 - (1 - number / parameters.rounds) ** 3)


def _tell(progress: Progress, number: int, stage: str) -> None:
    progress(f"round {number}, {stage}")
