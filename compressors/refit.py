"""Least squares: what a layer's remaining inputs can say of those that were removed."""

from __future__ import annotations

import torch
from torch import Tensor

from compressors import obs
from compressors.calibration import Moments

# Keeps the normal equations solvable where inputs repeat each other.
DAMPING = 1e-4


def refit(weight: Tensor, bias: Tensor, moments: Moments, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [N, k] and bias [N] over the kept inputs that come nearest to the layer's outputs over all of them.

    ``weight`` [N, K], ``bias`` [N], ``kept`` int64 [k]; the mean squared error over inputs of these moments is least.
    """
    mean = moments.mean
    centred = moments.second - torch.outer(mean, mean)
    left = obs.damped(centred[kept][:, kept], DAMPING)
    # W' = W C[:, kept] C[kept, kept]⁻¹, and the bias carries what the means say.
    solved = torch.linalg.solve(left, (weight.double() @ centred[:, kept]).T).T
    return solved, bias.double() + weight.double() @ mean - solved @ mean[kept]


def remaining(weight: Tensor, moments: Moments, removed: Tensor) -> Tensor:
    """The mean square of what the removed inputs contribute to the outputs, summed over channels: how much they matter."""
    part = weight[:, removed].double()
    return ((part @ moments.second[removed][:, removed]) * part).sum()
