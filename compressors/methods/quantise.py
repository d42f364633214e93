"""Weights as integers of 8, 4, 3 bits or ternary (2 bits), rounded to the nearest or error-compensated (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from asr_core.dims import EMBEDDING
from asr_core.isolate import Progress
from compressors import integers, linears
from compressors.base import Applied, OnLinears
from compressors.calibration import Calibration
from compressors.integers import Codes
from compressors.linears import Treated
from compressors.model import Form, Model, mask_of, pruned_parts


class Parameters(OnLinears):
    """What to round, to what, and how."""

    bits: Literal[8, 4, 3, 2] = Field(default=8, description="bits of a code; 2 is ternary: -1, 0 or 1")
    scale: Literal["tensor", "channel"] = Field(default="channel", description="what shares a scale, where group is not given")
    group: int | None = Field(default=None, multiple_of=16, gt=0, description="weights of a row that share a scale")
    rounding: Literal["nearest", "gptq"] = Field(default="gptq", description="nearest needs no calibration")
    body: bool = Field(default=True, description="the linear layers; without them, only the embedding")
    embedding: bool = Field(
        default=False, description="the token embedding, which is the head too; always rounded to the nearest"
    )


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Round the chosen linear weights, the factors of factored ones, and the embedding where that is asked for."""
    names = (model.chosen(parameters.only) if parameters.body else []) + [EMBEDDING] * parameters.embedding
    for name in names:
        linears.check_group("quantise", model, name, parameters.group)
    moments = calibration.moments(model) if parameters.rounding == "gptq" else None
    whole = parameters.scale == "tensor" and parameters.group is None

    def codes(weight: Tensor, second: Tensor | None, mask: Tensor | None = None) -> Codes:
        if second is None:
            return integers.nearest(weight, parameters.bits, parameters.group, whole=whole)
        return integers.gptq(weight, second, parameters.bits, parameters.group, whole=whole, mask=mask)

    def treat(name: str) -> Treated:
        weight, form = model.tensors[name], model.form(name)
        second = moments[name].second if moments and name in moments else None
        if "left" in form.parts:
            return _factored(form.parts["left"], form.parts["right"], second, codes, parameters.bits)
        made = codes(weight, second, mask_of(form, weight.shape))
        parts = pruned_parts(form) | {"codes": made.codes, "scales": made.scales}
        return Treated(made.weight, Form(parts, parameters.bits))

    return linears.treat_each(model, names, moments, treat, progress)


def _factored(left: Tensor, right: Tensor, second: Tensor | None, codes: Callable[..., Codes], bits: int) -> Treated:
    """Both factors as integers; the left one's inputs are what the rounded right one makes of the layer's."""
    inner = codes(right, second)
    reduced = inner.weight.double()
    outer = codes(left, None if second is None else reduced @ second @ reduced.T)
    parts = {"left_codes": outer.codes, "left_scales": outer.scales, "right_codes": inner.codes, "right_scales": inner.scales}
    return Treated(outer.weight @ inner.weight, Form(parts, bits), rank=len(right))
