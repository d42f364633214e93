"""Symmetric integer weights: codes · scale, with a scale for a tensor, each row, or each group of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressors.obs import compensate

# Ternary weights after Li and Liu 2016: zero below this share of the mean magnitude, one magnitude above.
TERNARY = 2  # bits
TERNARY_THRESHOLD = 0.7
FEW_BITS = 4
LEAST = 2.0**-24  # the smallest scale of float16


@dataclass(frozen=True)
class Codes:
    """Integer codes int8 [N, K] and scales float32 [1, 1], [N, 1] or [N, K / group]."""

    codes: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:
        """What they stand for, float32 [N, K]."""
        return self.codes * spread(self.scales, self.codes.shape[1])


def spread(scales: Tensor, columns: int) -> Tensor:
    """Scales for every column: [·, G] → [·, K]."""
    return scales.repeat_interleave(columns // scales.shape[1], 1)


def largest(bits: float) -> int:
    """The largest code: 127, 7, 3, and 1 for ternary weights (2 bits)."""
    return int(2 ** (bits - 1)) - 1


def scales_of(weight: Tensor, bits: int, group: int | None, *, whole: bool = False) -> Tensor:
    """Scales [N, K / group], [N, 1] without a group, or [1, 1] of the whole tensor: the largest magnitude over the largest code.

    Ternary weights are the exception: the mean magnitude of those above the threshold. Up to 4 bits, scales are float16's
    values, so that formats that keep them so have these very weights.
    """
    rows, columns = (1, weight.numel()) if whole else weight.shape
    magnitudes = weight.abs().reshape(rows, -1, group or columns)
    if bits == TERNARY:
        above = magnitudes > TERNARY_THRESHOLD * magnitudes.mean(-1, keepdim=True)
        scales = (magnitudes * above).sum(-1) / above.sum(-1).clamp(min=1)
    else:
        scales = magnitudes.amax(-1) / largest(bits)
    if bits <= FEW_BITS:
        return scales.half().float().clamp(min=LEAST)
    return scales.clamp(min=torch.finfo(torch.float32).tiny).float()


def rounded(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The codes, as floats, that are nearest to values / scales (halves to even); ternary by its threshold, scale / 2."""
    limit = largest(bits)
    return (values / scales).round().clamp(-limit, limit)


def nearest(weight: Tensor, bits: int, group: int | None, *, whole: bool = False) -> Codes:
    """Round every weight to the nearest code."""
    scales = scales_of(weight, bits, group, whole=whole)
    return Codes(rounded(weight, spread(scales, weight.shape[1]), bits).to(torch.int8), scales)


def gptq(
    weight: Tensor, second: Tensor, bits: int, group: int | None, *, whole: bool = False, mask: Tensor | None = None
) -> Codes:
    """Round column by column, each error made up for by the columns after it (:mod:`compressors.obs`).

    A group's scales are those of its values when its turn comes. Where ``mask`` is False, the weight stays zero.
    """
    columns = weight.shape[1]
    known = {} if group else {0: scales_of(weight, bits, None, whole=whole).double()}

    def plan(block: Tensor, start: int, _: Tensor) -> Callable[[int, Tensor], Tensor]:
        def column(j: int, values: Tensor) -> Tensor:
            index = j // group if group else 0
            if index not in known:
                known[index] = scales_of(block[:, j - start : j - start + (group or columns)], bits, None).double()
            coded = rounded(values, known[index][:, 0], bits) * known[index][:, 0]
            return coded if mask is None else coded * mask[:, j]

        return column

    # A group lies in one block, so that its values are up to date when its scales are taken.
    work = compensate(weight, second, plan, block=group or 128)
    scales = torch.cat([known[index] for index in sorted(known)], 1)
    return Codes((work / spread(scales, columns)).round().to(torch.int8), scales.float())
