"""Narrower feed-forward layers: the least important channels go, and fc2 is refitted to what is left.

Every layer of a side keeps the same number of channels, because a Whisper's config has one width for each side.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from asr_core.isolate import Progress
from compressors import linears
from compressors.base import Applied
from compressors.base import Parameters as Base
from compressors.calibration import Calibration, Moments
from compressors.model import Model
from compressors.refit import refit

MULTIPLE = 32  # of channels that stay: block-wise integer kernels want it
SIDES = ("encoder", "decoder")


class Parameters(Base):
    """How many channels go, which, and whether the others make up for them."""

    share: float = Field(gt=0, lt=1, description="share of the channels to remove; what stays is rounded up to a multiple of 32")
    criterion: Literal["magnitude", "activation"] = Field(default="activation", description="how important a channel is")
    refit: bool = Field(default=True, description="fit fc2 and its bias to the former outputs by least squares")
    side: Literal["both", "encoder", "decoder"] = Field(default="both", description="where")


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Remove channels of every layer of the chosen sides."""
    moments = calibration.moments(model) if parameters.refit or parameters.criterion == "activation" else None
    changed: dict[str, Tensor] = {}
    config = model.config
    for side in SIDES if parameters.side == "both" else (parameters.side,):
        width = config[f"{side}_ffn_dim"]
        count = min(width, MULTIPLE * math.ceil((1 - parameters.share) * width / MULTIPLE))
        config = config | {f"{side}_ffn_dim": count}
        for layer in range(getattr(model.dims, f"{side}_layers")):
            prefix = f"model.{side}.layers.{layer}"
            progress(prefix)
            inputs = moments[f"{prefix}.fc2.weight"] if moments else None
            changed |= _narrowed(model, prefix, count, inputs, parameters)
    effects = [linears.effect(name, model.tensors[name], tensor) for name, tensor in changed.items()]
    return Applied(replace(model.changed(changed, {}), config=config), effects)


def _narrowed(model: Model, prefix: str, count: int, moments: Moments | None, parameters: Parameters) -> dict[str, Tensor]:
    """The four tensors of a layer's feed-forward part with ``count`` channels."""
    fc1, b1, fc2, b2 = (model.tensors[f"{prefix}.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    incoming = fc1.norm(dim=1) if moments is None or parameters.criterion == "magnitude" else moments.second.diagonal().sqrt()
    kept = (incoming * fc2.norm(dim=0)).topk(count).indices.sort().values
    narrow, bias = fc2[:, kept], b2
    if parameters.refit and moments is not None:
        narrow, bias = refit(fc2, b2, moments, kept)
    named = {"fc1.weight": fc1[kept], "fc1.bias": b1[kept], "fc2.weight": narrow, "fc2.bias": bias}
    return {f"{prefix}.{name}": tensor.float().contiguous() for name, tensor in named.items()}
