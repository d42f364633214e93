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
CELLS = 4  # of the grid that k-means begins on, for each centroid
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
    """Centroids [count], sorted, of values [n]: Lloyd's algorithm, exact on sorted numbers by their running sums."""
    ordered = values.double().flatten().sort().values
    if not len(ordered):
        return torch.zeros(count)
    sums = _running(ordered)
    edges = _start(ordered, count)
    centroids = torch.zeros(count, dtype=torch.float64)
    for _ in range(ROUNDS):
        bounds = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(ordered)])])
        members = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / members.clamp(min=1)
        # Where there are fewer values than centroids, some repeat a neighbour.
        moved = torch.where(members > 0, means, ordered[bounds[1:].clamp(max=len(ordered) - 1)])
        still = (moved - centroids).abs().max() <= SETTLED * ordered.std(correction=0)
        centroids = moved
        if still:
            break
        edges = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
    return centroids.float()


def _start(ordered: Tensor, count: int) -> Tensor:
    """Where to begin: the edges [count - 1] between clusters of values [n] sorted, the best ones on a grid.

    The grid's cells have equal shares of the density's cube root, as clusters of the least error have when they are many
    (Panter and Dite 1951); the best of its edges are found by dynamic programming (Wang and Song 2011).
    """
    # Between neighbours the density is 1 / distance, so that its cube root holds distance ** (2/3).
    shares = _running(ordered.diff().pow(2 / 3))
    cells = CELLS * count
    inner = torch.searchsorted(shares, torch.arange(1, cells, dtype=torch.float64) / cells * shares[-1])
    grid = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ordered)])])
    costs = _costs(ordered, grid)
    least, origins = costs[0], []
    for _ in range(count - 1):
        least, origin = (least[:, None] + costs).min(0)
        origins.append(origin)
    chosen = [cells]
    for origin in reversed(origins):
        chosen.append(int(origin[chosen[-1]]))
    return grid[chosen[:0:-1]]


def _costs(ordered: Tensor, grid: Tensor) -> Tensor:
    """The squared error [G, G] of one cluster from each edge of the grid to each; infinite backwards."""
    members, sums, squares = (
        part[None, :] - part[:, None] for part in (grid, _running(ordered)[grid], _running(ordered**2)[grid])
    )
    costs = squares - sums.square() / members.clamp(min=1)
    return costs.masked_fill(torch.ones_like(costs, dtype=torch.bool).tril(-1), torch.inf)


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, … n of values [n]."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def closest(rows: Tensor, centroids: Tensor) -> Tensor:
    """The index of each value's nearest centroid: values [N, K], sorted centroids [N, C] → int64 [N, K]."""
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), rows.contiguous())
