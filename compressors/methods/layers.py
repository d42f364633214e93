"""Fewer layers: whole encoder or decoder layers are left out; the checkpoint becomes that of a shallower model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from asr_core.errors import UsageError
from asr_core.isolate import Progress
from compressors.base import Applied
from compressors.base import Parameters as Base
from compressors.calibration import Calibration
from compressors.model import Model

SIDES = ("encoder", "decoder")


class Parameters(Base):
    """Which layers go, counted from 0."""

    encoder: list[int] = Field(default=[], description="encoder layers to leave out")
    decoder: list[int] = Field(default=[], description="decoder layers to leave out")

    @model_validator(mode="after")
    def _something(self) -> Parameters:
        if not self.encoder and not self.decoder:
            raise ValueError("name the layers to leave out, as encoder=[1] or decoder=[0]")
        return self


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Leave the layers out; configs and alignment heads follow."""
    kept = {side: _kept(side, getattr(model.dims, f"{side}_layers"), getattr(parameters, side)) for side in SIDES}
    names = {name: moved for name in model.tensors if (moved := _moved(name, kept)) is not None}
    config = model.config | {f"{side}_layers": len(kept[side]) for side in SIDES}
    # transformers takes this for another name of encoder_layers, and the last one read wins.
    config["num_hidden_layers"] = config["encoder_layers"]
    generation = model.generation
    if generation.get("alignment_heads"):
        generation = generation | {"alignment_heads": _alignment(generation["alignment_heads"], kept["decoder"], config)}
    tensors = {moved: model.tensors[name] for name, moved in names.items()}
    forms = {names[name]: form for name, form in model.forms.items() if name in names}
    return Applied(replace(model, config=config, generation=generation, tensors=tensors, forms=forms), [])


def _kept(side: str, count: int, dropped: Sequence[int]) -> list[int]:
    if unknown := sorted(set(dropped) - set(range(count))):
        raise UsageError(f"layers: the {side} has no layer {unknown[0]}; it has 0 to {count - 1}.")
    kept = [i for i in range(count) if i not in dropped]
    if not kept:
        raise UsageError(f"layers: nothing would be left of the {side}'s {count} layers.")
    return kept


def _moved(name: str, kept: dict[str, list[int]]) -> str | None:
    """A tensor's name once layers are gone; None where it goes too."""
    parts = name.split(".")
    if parts[2] != "layers":
        return name
    layers, index = kept[parts[1]], int(parts[3])
    if index not in layers:
        return None
    return ".".join([*parts[:3], str(layers.index(index)), *parts[4:]])


def _alignment(heads: list[list[int]], kept: Sequence[int], config: dict[str, Any]) -> list[list[int]]:
    """The alignment heads that are left, renumbered; where none is, openai-whisper's default: the upper half of all layers."""
    left = [[kept.index(layer), head] for layer, head in heads if layer in kept]
    upper = range(len(kept) // 2, len(kept))
    return left or [[layer, head] for layer in upper for head in range(config["decoder_attention_heads"])]
