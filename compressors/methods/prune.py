"""Unstructured zeros: by magnitude (a layer's own or over all layers), Wanda, or error-compensated as SparseGPT.

Wanda: Sun et al. 2023; SparseGPT: Frantar and Alistarh 2023. Dense kernels gain neither size nor speed from zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from asr_core.compressed import Effect
from asr_core.isolate import Progress
from compressors import linears, obs
from compressors.base import Applied, OnLinears
from compressors.calibration import Calibration, Moments
from compressors.linears import Treated
from compressors.model import Form, Model

Treat = Callable[[Tensor, Moments, float], Treated]


class Parameters(OnLinears):
    """How many weights become zero, and which."""

    sparsity: float = Field(ge=0, lt=1, description="share of zeros")
    criterion: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        default="sparsegpt", description="magnitude needs no calibration"
    )
    scope: Literal["layer", "global"] = Field(default="layer", description="what the share is of; global is for magnitude only")

    @model_validator(mode="after")
    def _global_is_for_magnitude(self) -> Parameters:
        if self.scope == "global" and self.criterion != "magnitude":
            raise ValueError(f"scope global is for magnitude only: {self.criterion}'s scores differ in scale between layers")
        return self


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Set the least important of the chosen linear weights to zero."""
    names = model.chosen(parameters.only)
    if parameters.criterion == "magnitude":
        masks = _by_magnitude({name: model.tensors[name] for name in names}, parameters)
        return linears.treat_each(model, names, None, lambda name: _masked(model.tensors[name], masks[name]), progress)
    treat, made, effects = _WITH_MOMENTS[parameters.criterion], model, list[Effect]()
    for block in model.blocks:
        if chosen := [name for name in block if name in names]:
            # As the blocks before it have become: many zeros change what a block hears.
            moments = calibration.moments(made, chosen)
            applied = linears.treat_each(
                made, chosen, moments, partial(_treated, treat, made, moments, parameters.sparsity), progress
            )
            made, effects = applied.model, effects + applied.effects
    return Applied(made, effects)


def _treated(treat: Treat, model: Model, moments: Mapping[str, Moments], sparsity: float, name: str) -> Treated:
    return treat(model.tensors[name], moments[name], sparsity)


def _masked(weight: Tensor, mask: Tensor) -> Treated:
    return Treated(weight * mask, Form({"mask": mask}))


def _by_magnitude(weights: Mapping[str, Tensor], parameters: Parameters) -> dict[str, Tensor]:
    """True where a weight stays: the largest of each tensor, or of all together."""
    if parameters.scope == "layer":
        return {name: largest(weight.abs(), parameters.sparsity) for name, weight in weights.items()}
    together = largest(torch.cat([weight.abs().flatten() for weight in weights.values()]), parameters.sparsity)
    pieces = together.split([weight.numel() for weight in weights.values()])
    return {name: piece.view_as(weight) for piece, (name, weight) in zip(pieces, weights.items(), strict=True)}


def largest(scores: Tensor, sparsity: float) -> Tensor:
    """True for all but the given share, rounded to whole weights, of the lowest scores: bool, shaped as the scores."""
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(round(sparsity * scores.numel()), largest=False).indices] = False
    return mask.view_as(scores)


def _wanda(weight: Tensor, moments: Moments, sparsity: float) -> Treated:
    """Magnitude times the norm of the weight's input, compared within each row."""
    scores = weight.abs() * moments.second.diagonal().sqrt()
    return _masked(weight, torch.stack([largest(row, sparsity) for row in scores]))


def _sparsegpt(weight: Tensor, moments: Moments, sparsity: float) -> Treated:
    """What hurts least once later columns have made up for it, chosen block by block of columns."""
    mask = torch.ones_like(weight, dtype=torch.bool)

    def plan(block: Tensor, start: int, diagonal: Tensor) -> Callable[[int, Tensor], Tensor]:
        mask[:, start : start + block.shape[1]] = largest((block / diagonal).square(), sparsity)
        return lambda j, values: values * mask[:, j]

    return Treated(obs.compensate(weight, moments.second, plan), Form({"mask": mask}))


_WITH_MOMENTS: dict[str, Treat] = {"wanda": _wanda, "sparsegpt": _sparsegpt}
