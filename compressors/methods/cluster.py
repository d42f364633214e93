"""Weight clustering: every weight becomes one of a few centroids, found by k-means for a tensor or for each of its rows."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from asr_core.dims import EMBEDDING
from asr_core.errors import UsageError
from asr_core.isolate import Progress
from compressors import linears
from compressors.base import Applied, OnLinears
from compressors.calibration import Calibration
from compressors.linears import Treated
from compressors.model import Form, Model, mask_of, pruned_parts

ROUNDS = 300  # as scikit-learn's; nearly all have settled by then
SETTLED = 1e-6  # of the weights' standard deviation: centroids that move less stand still


class Parameters(OnLinears):
    """How many centroids, shared by what."""

    centroids: Literal[16, 64, 256] = Field(default=256, description="values that a weight can have")
    scope: Literal["tensor", "channel"] = Field(default="tensor", description="what shares its centroids")
    embedding: bool = Field(default=False, description="the token embedding, which is the head too")


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Cluster the chosen linear weights, and the embedding where that is asked for; zeros of pruned ones stay zeros."""
    names = model.chosen(parameters.only) + [EMBEDDING] * parameters.embedding
    for name in names:
        width = model.tensors[name].shape[1]
        if parameters.scope == "channel" and parameters.centroids >= width:
            raise UsageError(f"cluster: {parameters.centroids} centroids for rows of {width} weights save nothing ({name}).")

    def treat(name: str) -> Treated:
        weight, form = model.tensors[name], model.form(name)
        mask = mask_of(form, weight.shape)
        rows = weight if parameters.scope == "channel" else weight.reshape(1, -1)
        masks = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.view_as(rows)
        centroids = torch.stack(
            [_centroids(row[kept], parameters.centroids, zero=mask is not None) for row, kept in zip(rows, masks, strict=True)]
        )
        indices = torch.where(masks, closest(rows, centroids), closest(torch.zeros_like(rows), centroids))
        clustered = centroids.gather(1, indices).view_as(weight)
        parts = pruned_parts(form) | {"centroids": centroids, "indices": indices.to(torch.uint8).view_as(weight)}
        return Treated(clustered, Form(parts))

    return linears.treat_each(model, names, None, treat, progress)


def _centroids(weights: Tensor, count: int, *, zero: bool) -> Tensor:
    """Centroids [C], sorted; with ``zero``, one of them is zero."""
    if not zero:
        return kmeans(weights, count)
    return torch.cat([kmeans(weights, count - 1), torch.zeros(1)]).sort().values


def kmeans(values: Tensor, count: int) -> Tensor:
    """Centroids [count], sorted, of values [n]: Lloyd's algorithm, exact on sorted numbers by their running sums.

    It starts at the quantiles of the density's cube root, where centroids of the least squared error lie when they are many
    (Panter and Dite 1951).
    """
    ordered = values.double().flatten().sort().values
    if not len(ordered):
        return torch.zeros(count)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])
    centroids = _start(ordered, count)
    for _ in range(ROUNDS):
        edges = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        bounds = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(ordered)])])
        members = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / members.clamp(min=1)
        moved = torch.where(members > 0, means, centroids)
        still = (moved - centroids).abs().max() <= SETTLED * ordered.std(correction=0)
        centroids = moved
        if still:
            break
    return centroids.float()


def _start(ordered: Tensor, count: int) -> Tensor:
    """Where to begin: values [n] sorted → centroids [count]."""
    # Between neighbours the density is 1 / distance, so that its cube root holds distance ** (2/3).
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.diff().pow(2 / 3).cumsum(0)])
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * shares[-1]
    return ordered[torch.searchsorted(shares, wanted).clamp(max=len(ordered) - 1)]


def closest(rows: Tensor, centroids: Tensor) -> Tensor:
    """The index of each value's nearest centroid: values [N, K], sorted centroids [N, C] → int64 [N, K]."""
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), rows.contiguous())
