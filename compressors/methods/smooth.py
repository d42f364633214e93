"""SmoothQuant-style scaling (Xiao et al. 2022): the same model, with outliers of activations moved into the weights.

Every channel of a layer norm's output is divided by a factor, and the columns of the linear layers that read it multiplied.
The predictions stay the same; what changes is how well weights and activations round to int8 afterwards.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from asr_core.isolate import Progress
from compressors import linears
from compressors.base import Applied
from compressors.base import Parameters as Base
from compressors.calibration import Calibration
from compressors.model import Model

# A layer norm and those of its layer that read its output. The encoder's last norm is left alone: its output is public.
READERS = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "encoder_attn_layer_norm": ("encoder_attn.q_proj",),
    "final_layer_norm": ("fc1",),
}
LEAST = 1e-5  # of either largest magnitude, so that idle channels keep a finite factor


class Parameters(Base):
    """How far to go."""

    alpha: float = Field(default=0.5, ge=0, le=1, description="0 evens out the weights' columns, 1 the activations'")


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Scale the readers of every layer norm, and the norm the other way."""
    moments = calibration.moments(model)
    changed: dict[str, Tensor] = {}
    for norm in [name.removesuffix(".weight") for name in model.tensors if name.endswith("_layer_norm.weight")]:
        progress(norm)
        layer, _, kind = norm.rpartition(".")
        weights = {name: model.tensors[name] for name in (f"{layer}.{reader}.weight" for reader in READERS[kind])}
        factors = factors_of(
            moments[next(iter(weights))].largest,
            torch.stack([w.abs().amax(0) for w in weights.values()]).amax(0),
            parameters.alpha,
        )
        changed |= {f"{norm}.{part}": model.tensors[f"{norm}.{part}"] / factors for part in ("weight", "bias")}
        changed |= {name: weight * factors for name, weight in weights.items()}
    effects = [linears.effect(name, model.tensors[name], tensor) for name, tensor in changed.items()]
    return Applied(model.changed(changed, {}), effects)


def factors_of(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Factors [K] = max|x|^alpha / max|w|^(1 - alpha), from the largest magnitudes of inputs and of columns."""
    return activations.clamp(min=LEAST) ** alpha / weights.clamp(min=LEAST) ** (1 - alpha)
