"""Column-by-column compression of a weight in which later columns make up for the error of earlier ones.

The optimal brain surgeon of one layer, as GPTQ (Frantar et al. 2022) and SparseGPT (Frantar and Alistarh 2023) made it fast:
for inputs of second moments H, the inverse's Cholesky factor says how the columns still to come should change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Columns whose changes are gathered before the rest of the matrix hears of them: matrix products instead of outer ones.
BLOCK = 128
# Added to H's diagonal, as a share of its mean: short calibration leaves H singular.
DAMPING = 0.01

# Told of the columns [N, B] that come next, their first index and the diagonal [B] of the factor; gives the function that
# compresses one column: its index in the matrix and its values [N] → values [N].
Plan = Callable[[Tensor, int, Tensor], Callable[[int, Tensor], Tensor]]


def compensate(weight: Tensor, second: Tensor, plan: Plan, block: int = BLOCK) -> Tensor:
    """Compress a weight [N, K] column by column against inputs of second moments [K, K]; returns it, float64 [N, K]."""
    work = weight.double().clone()
    factor = inverse_factor(second)
    for start in range(0, work.shape[1], block):
        end = min(start + block, work.shape[1])
        diagonal = factor.diagonal()[start:end]
        column = plan(work[:, start:end], start, diagonal)
        errors = torch.empty_like(work[:, start:end])
        for j in range(start, end):
            compressed = column(j, work[:, j])
            error = (work[:, j] - compressed) / factor[j, j]
            work[:, j + 1 : end] -= torch.outer(error, factor[j, j + 1 : end])
            work[:, j] = compressed
            errors[:, j - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    return work


def inverse_factor(second: Tensor) -> Tensor:
    """The upper Cholesky factor U of the damped H's inverse = UᵀU, float64 [K, K]."""
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped(second))), upper=True)
    return factor


def damped(second: Tensor, share: float = DAMPING) -> Tensor:
    """H with a share of its mean diagonal added to the diagonal (1 where H is zero): float64, positive definite."""
    mean = second.diagonal().mean().double()
    return second.double() + torch.eye(len(second), dtype=torch.float64) * (share * mean if mean > 0 else 1.0)
