"""Static quantisation after training: weights as 8-bit integers, and ranges for what the layers hear as 8 bits too.

The ranges are those of the calibration clips. A runtime that knows them rounds inputs without looking at them first, as dynamic
quantisation does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from asr_core.isolate import Progress
from compressors import calibration as hearing
from compressors import ranges
from compressors.base import Applied, OnLinears
from compressors.calibration import Calibration, Window
from compressors.methods import quantise
from compressors.model import Form, Model
from compressors.ranges import Extremes, Histogram

Range = tuple[float, float]
CHOICES = {"percentile": ranges.percentile, "entropy": ranges.entropy}


class Parameters(OnLinears):
    """How to find the ranges."""

    observer: Literal["minmax", "percentile", "entropy"] = Field(
        default="minmax", description="all that was heard, all but its farthest 0.01 %, or what loses the least information"
    )


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Round the chosen weights to 8 bits for each row, unless they are integers already, and find the ranges of their inputs."""
    names = model.chosen(parameters.only)
    progress("ranges")
    found = _ranges(model, names, calibration.windows, parameters.observer)
    whole = [name for name in names if not model.form(name).parts.keys() & {"codes", "left_codes"}]
    rounding = quantise.Parameters(bits=8, rounding="nearest", only=whole)
    made = quantise.apply(model, rounding, calibration, progress) if whole else Applied(model, [])
    forms = {**made.model.forms}
    for name in names:
        form = forms[name]
        forms[name] = Form({**form.parts, **ranges.parts(*found[name])}, form.bits)
    return Applied(replace(made.model, forms=forms), made.effects)


def _ranges(model: Model, names: Sequence[str], heard: Sequence[Window], observer: str) -> Mapping[str, Range]:
    """The lowest and highest input that 8 bits should reach, by weight; zero lies between."""
    extremes = {name: Extremes() for name in names}
    hearing.watch(model, heard, extremes)
    if observer not in CHOICES:
        return {name: (one.low, one.high) for name, one in extremes.items()}
    histograms = {name: Histogram(one.low, one.high) for name, one in extremes.items()}
    hearing.watch(model, heard, histograms)
    return {name: CHOICES[observer](histograms[name].counts, one.low, one.high) for name, one in extremes.items()}
