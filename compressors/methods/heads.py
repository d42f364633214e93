"""Fewer attention heads: the least important ones are silenced and the output projection is refitted to the others.

Whisper's config has one number of heads for each side and derives their width from it, so that plain transformers can't hold an
attention with fewer: the checkpoint keeps its shapes, with zeros, and the side file names the rows and columns that are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from asr_core.errors import UsageError
from asr_core.isolate import Progress
from compressors import linears
from compressors.base import Applied
from compressors.base import Parameters as Base
from compressors.calibration import Calibration, Moments
from compressors.linears import bias_of
from compressors.model import Form, Model
from compressors.refit import refit, remaining


class Parameters(Base):
    """How many heads go."""

    remove: int = Field(ge=1, description="heads to silence, over all attentions; each keeps one at least")
    refit: bool = Field(default=True, description="fit the output projection to its former outputs by least squares")


@dataclass(frozen=True)
class Head:
    """One head of an attention (a prefix of tensors' names) and the share of the attention's output that it makes."""

    attention: str
    index: int
    importance: float


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Silence the heads that contribute least to their attention's output."""
    moments = calibration.moments(model)
    ranked = sorted(_heads(model, moments), key=lambda head: head.importance)
    removed = _removed(ranked, parameters.remove)
    tensors: dict[str, Tensor] = {}
    forms: dict[str, Form] = {}
    for attention, heads in removed.items():
        progress(attention)
        width = _width(model, attention)
        gone = torch.cat([torch.arange(head * width, (head + 1) * width) for head in sorted(heads)])
        silenced = _silenced(model, attention, gone, moments[f"{attention}.out_proj.weight"] if parameters.refit else None)
        tensors |= silenced[0]
        forms |= silenced[1]
    effects = [
        linears.effect(
            name, model.tensors[name], tensor, forms.get(name, Form({})), moments[name].second if name in moments else None
        )
        for name, tensor in tensors.items()
    ]
    return Applied(replace(model.changed(tensors, forms), generation=_aligned(model, removed)), effects)


def _heads(model: Model, moments: Mapping[str, Moments]) -> list[Head]:
    found = []
    for name in [name for name in model.tensors if name.endswith(".out_proj.weight")]:
        attention = name.removesuffix(".out_proj.weight")
        weight, width = model.tensors[name], _width(model, attention)
        whole = linears.energy(weight, moments[name].second)
        for index, columns in enumerate(torch.arange(weight.shape[1]).split(width)):
            found.append(Head(attention, index, float(remaining(weight, moments[name], columns) / whole)))
    return found


def _width(model: Model, attention: str) -> int:
    side = attention.split(".")[1]
    return model.dims.d_model // int(getattr(model.dims, f"{side}_heads"))


def _removed(ranked: list[Head], count: int) -> dict[str, set[int]]:
    """The heads to remove by attention, the least important first, never the last one of an attention."""
    left = {attention: sum(head.attention == attention for head in ranked) for attention in {head.attention for head in ranked}}
    removed: dict[str, set[int]] = {}
    for head in ranked:
        if count and left[head.attention] > 1:
            left[head.attention] -= 1
            removed.setdefault(head.attention, set()).add(head.index)
            count -= 1
    if count:
        raise UsageError(f"heads: {count} too many to remove: every attention keeps one of its heads.")
    return removed


def _silenced(model: Model, attention: str, gone: Tensor, moments: Moments | None) -> tuple[dict[str, Tensor], dict[str, Form]]:
    """The tensors of an attention with zeros where the removed heads were, and their forms."""
    tensors, forms = {}, {}
    stays = torch.ones(model.dims.d_model, dtype=torch.bool)
    stays[gone] = False
    kept = stays.nonzero()[:, 0]
    for projection in ("q_proj", "k_proj", "v_proj"):
        name = f"{attention}.{projection}.weight"
        tensors[name] = model.tensors[name] * stays[:, None]
        forms[name] = Form({"kept_rows": kept})
        if bias_of(name) in model.tensors:
            tensors[bias_of(name)] = model.tensors[bias_of(name)] * stays
    name = f"{attention}.out_proj.weight"
    tensors[name], forms[name] = model.tensors[name] * stays, Form({"kept_columns": kept})
    if moments is not None:
        narrow, bias = refit(model.tensors[name], model.tensors[bias_of(name)], moments, kept)
        tensors[name] = torch.zeros_like(model.tensors[name])
        tensors[name][:, kept] = narrow.float()
        tensors[bias_of(name)] = bias.float()
    return tensors, forms


def _aligned(model: Model, removed: Mapping[str, set[int]]) -> dict[str, object]:
    """The generation config with the alignment heads that still speak; where none does, all others of the upper layers."""

    def speaks(layer: int, head: int) -> bool:
        return head not in removed.get(f"model.decoder.layers.{layer}.encoder_attn", ())

    heads = model.generation.get("alignment_heads")
    if not heads:
        return model.generation
    layers, count = model.dims.decoder_layers, model.dims.decoder_heads
    upper = [[layer, head] for layer in range(layers // 2, layers) for head in range(count)]
    left = [[layer, head] for layer, head in heads if speaks(layer, head)]
    return model.generation | {"alignment_heads": left or [[layer, head] for layer, head in upper if speaks(layer, head)]}
