"""Weights as small integers with scales: what the precision ``int4`` ships in every runtime that has it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from asr_core.graph_weights import FEW_BITS, MOST_BITS, Integers

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from asr_core.graph_weights import GraphWeights

GROUP = 32  # neighbours in a row that share a scale
LARGEST_CODE = 7
SMALLEST_SCALE = 2.0**-24  # of float16


def stored(weights: GraphWeights, name: str) -> Integers:
    """A matrix as integers of 4 or 8 bits: as the record of a compressed checkpoint has it, else rounded to the nearest in 4."""
    recorded = weights.integers(name)
    if recorded is None:
        return nearest(weights.read(name).float())
    return replace(recorded, bits=FEW_BITS if recorded.bits <= FEW_BITS else MOST_BITS)


def nearest(weight: torch.Tensor) -> Integers:
    """Round float32 [N, K] to codes of 4 bits, -7 to 7, with a scale for every group of a row; for a row, if it has no groups.

    A scale is the group's largest magnitude over the largest code, rounded to float16 before the codes are taken: runtimes
    whose programs hold float16 have the same numbers then.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, columns if columns % GROUP else GROUP)
    scales = (groups.abs().amax(-1) / LARGEST_CODE).half().float().clamp(min=SMALLEST_SCALE)
    codes = (groups / scales[..., None]).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    return Integers(codes.char().reshape(rows, columns), scales, FEW_BITS)


def packed(codes: torch.Tensor) -> NDArray[np.uint8]:
    """Codes of 4 bits, two to a byte, the first in the lower half; flat, an even number of them."""
    import numpy as np

    pairs: NDArray[np.uint8] = codes.reshape(-1, 2).numpy().view(np.uint8) & np.uint8(0xF)
    pairs[:, 0] |= pairs[:, 1] << 4
    return pairs[:, 0].copy()
