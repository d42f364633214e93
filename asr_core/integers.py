"""Weights as small integers with scales: what the precision ``int4`` ships in every runtime that has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from asr_core.graph_weights import FEW_BITS, MOST_BITS, Integers

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from asr_core.graph_weights import GraphWeights

GROUP = 32  # neighbours in a row that share a scale
SMALLEST_SCALE = 2.0**-24  # of float16


def stored(weights: GraphWeights, name: str) -> Integers:
    """A matrix as integers of 4 or 8 bits: as the record of a compressed checkpoint has it, else rounded to the nearest in 4."""
    recorded = weights.integers(name)
    if recorded is None:
        return nearest(weights.read(name).float())
    return replace(recorded, bits=FEW_BITS if recorded.bits <= FEW_BITS else MOST_BITS)


def nearest(weight: torch.Tensor, bits: int = FEW_BITS) -> Integers:
    """Round float32 [N, K] to codes; with 4 bits every group of a row has a scale, with 8, and where groups don't fit, a row.

    A scale is the largest magnitude over the largest code, rounded to float16 before the codes are taken: runtimes whose
    programs hold float16 have the same numbers then.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, columns if bits > FEW_BITS or columns % GROUP else GROUP)
    largest = 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1) / largest).half().float().clamp(min=SMALLEST_SCALE)
    codes = (groups / scales[..., None]).round().clamp(-largest, largest)
    return Integers(codes.char().reshape(rows, columns), scales, bits)


def by_values(weights: GraphWeights, query_scale: float = 1.0) -> Callable[[NDArray[np.float32]], Integers]:
    """What :func:`stored` says of a float32 matrix [N, K] in a converted graph, in which the converter has lost its name.

    ``query_scale`` is what it may have multiplied the projections of queries with.
    """
    import numpy as np

    recorded = {}
    for name in (name for name in weights.names if weights.integers(name)):
        values = weights.read(name).float().numpy()
        for factor in (query_scale, 1.0) if name.endswith("q_proj.weight") else (1.0,):
            recorded[_digest(values * np.float32(factor))] = (name, factor)

    def found(values: NDArray[np.float32]) -> Integers:
        import torch

        name, factor = recorded.get(_digest(values), (None, 1.0))
        if name is None:
            return nearest(torch.tensor(values))
        integers = stored(weights, name)
        return replace(integers, scales=integers.scales * factor)

    return found


def _digest(values: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(values.tobytes()).digest()


def packed(codes: torch.Tensor) -> NDArray[np.uint8]:
    """Codes of 4 bits, two to a byte, the first in the lower half; flat, an even number of them."""
    import numpy as np

    pairs: NDArray[np.uint8] = codes.reshape(-1, 2).numpy().view(np.uint8) & np.uint8(0xF)
    pairs[:, 0] |= pairs[:, 1] << 4
    return pairs[:, 0].copy()
