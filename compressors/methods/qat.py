"""Quantisation-aware training: weights are rounded whenever they are used, and learn to be rounded (straight-through).

What error compensation cannot do at ternary weights, training can. The other tensors move along, the encoder's where any of them
is rounded; the loss is that of fine-tuning.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asr_core.dims import EMBEDDING
from asr_core.isolate import Progress
from compressors import latent, linears
from compressors.base import Applied
from compressors.calibration import Calibration
from compressors.latent import Rounding
from compressors.methods import finetune
from compressors.model import Model


class Parameters(finetune.Parameters):
    """What to round, to what, and how to train."""

    only: list[str] = Field(default=[], description="patterns of the weights to round, as model.decoder.*.fc?.weight; else all")
    bits: Literal[8, 4, 2] = Field(default=4, description="bits of a code; 2 is ternary: -1, 0 or 1")
    group: int | None = Field(
        default=None, multiple_of=16, gt=0, description="weights of a row that share a scale; else the whole row does"
    )
    embedding: bool = Field(default=False, description="round the token embedding, which is the head too")
    rate: float = Field(
        default=2e-4, gt=0, description="peak learning rate; ternary weights need 2e-3, weights that are not rounded less"
    )


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Train with the chosen weights rounded; factors of factored ones are rounded each."""
    names = model.chosen(parameters.only) + [EMBEDDING] * parameters.embedding
    for name in names:
        linears.check_group("qat", model, name, parameters.group)
    roundings = dict.fromkeys(names, Rounding(parameters.bits, parameters.group))
    rest = not any(name.startswith(latent.ENCODER) for name in names)
    return finetune.tuned(model, roundings, parameters, calibration, progress, rest=rest)


def control(model: Model, parameters: Parameters) -> tuple[str, dict[str, object]]:
    """The same training without any rounding."""
    shared = finetune.Parameters.model_fields
    return "finetune", {name: value for name, value in parameters.model_dump(mode="json").items() if name in shared}
