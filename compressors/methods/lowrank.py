"""Low rank: a weight as the product of two narrow factors, by SVD or aware of the activations.

``svd`` is nearest to the weight, ``whitened`` (the SVD of the weight times a square root of its inputs' second moments) to the
layer's outputs, and ``pca`` keeps the principal components of the outputs about their mean, which goes into the bias (as
LiteASR, Kamahori et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from asr_core.errors import UsageError
from asr_core.isolate import Progress
from compressors import linears
from compressors.base import Applied, OnLinears
from compressors.calibration import Calibration, Moments
from compressors.linears import Treated, bias_of
from compressors.model import Form, Model

# Ranks that are worked out, not given, are multiples of this, as block-wise integer kernels want them.
MULTIPLE = 16
# Of the largest: below this share, directions of the inputs count as equally rare. It keeps the square root invertible.
RAREST = 1e-8


class Parameters(OnLinears):
    """How to find the factors, and exactly one way to say their rank."""

    criterion: Literal["svd", "whitened", "pca"] = Field(default="whitened", description="svd needs no calibration")
    rank: int | None = Field(default=None, ge=1, description="the rank of every chosen layer")
    share: float | None = Field(default=None, gt=0, le=1, description="rank as a share of the full rank")
    energy: float | None = Field(
        default=None, gt=0, le=1, description="the lowest rank that keeps this share of the squared singular values"
    )
    budget: float | None = Field(
        default=None, gt=0, le=1, description="share of the chosen layers' parameters that may stay, spent where it helps most"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Parameters:
        ways = ("rank", "share", "energy", "budget")
        if sum(getattr(self, way) is not None for way in ways) != 1:
            raise ValueError(f"give exactly one of {', '.join(ways)}")
        return self


@dataclass(frozen=True)
class Spectrum:
    """A weight [N, K] = ``left`` [N, F] @ ``right`` [F, K], its components in falling order of what losing one costs.

    ``energy`` [F] is that cost. ``mean`` [K] is the inputs' mean where a lost component leaves its mean output to the bias.
    """

    left: Tensor
    right: Tensor
    energy: Tensor
    mean: Tensor | None = None


def apply(model: Model, parameters: Parameters, calibration: Calibration, progress: Progress) -> Applied:
    """Factor the chosen linear weights; where factors would be larger than the weight, energy and budget leave it dense."""
    names = model.chosen(parameters.only)
    moments = None if parameters.criterion == "svd" else calibration.moments(model)
    spectra = {}
    for name in names:
        progress(name)
        spectra[name] = _spectrum(name, model, moments, parameters.criterion)
    ranks = _ranks(spectra, parameters)

    def treat(name: str) -> Treated:
        return _cut(model.tensors.get(bias_of(name)), spectra[name], ranks[name])

    return linears.treat_each(model, list(ranks), moments, treat, progress)


def _spectrum(name: str, model: Model, moments: Mapping[str, Moments] | None, criterion: str) -> Spectrum:
    weight = model.tensors[name].double()
    if moments is None:
        return svd(weight)
    if criterion == "whitened":
        return whitened(weight, moments[name].second)
    return pca(weight, moments[name])


def svd(weight: Tensor) -> Spectrum:
    """The singular value decomposition, its values shared evenly between both factors."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return Spectrum(u * s.sqrt(), s.sqrt()[:, None] * v, s.square())


def whitened(weight: Tensor, second: Tensor) -> Spectrum:
    """The decomposition of W L, where H = L Lᵀ are the inputs' second moments, times L's inverse."""
    # Not Cholesky's: short calibration leaves H singular, and a hair's breadth below zero after rounding.
    powers, directions = torch.linalg.eigh(second.double())
    scales = powers.clamp(min=max(float(powers[-1]) * RAREST, torch.finfo(torch.float64).tiny)).sqrt()
    u, s, v = torch.linalg.svd((weight @ directions) * scales, full_matrices=False)
    return Spectrum(u * s.sqrt(), s.sqrt()[:, None] * (v / scales) @ directions.T, s.square())


def pca(weight: Tensor, moments: Moments) -> Spectrum:
    """The principal components of the outputs about their mean."""
    centred = moments.second - torch.outer(moments.mean, moments.mean)
    variances, axes = torch.linalg.eigh(weight @ centred @ weight.T)
    count = min(weight.shape)
    axes = axes.flip(1)[:, :count]
    return Spectrum(axes, axes.T @ weight, variances.flip(0)[:count].clamp(min=0), moments.mean)


def _cut(bias: Tensor | None, spectrum: Spectrum, rank: int) -> Treated:
    left, right = spectrum.left[:, :rank].float().contiguous(), spectrum.right[:rank].float().contiguous()
    offset = None
    if spectrum.mean is not None and bias is not None:
        # What the lost components give on average.
        offset = bias.double() + spectrum.left[:, rank:] @ (spectrum.right[rank:] @ spectrum.mean)
    return Treated(left @ right, Form({"left": left, "right": right}), offset, rank)


def _ranks(spectra: Mapping[str, Spectrum], parameters: Parameters) -> dict[str, int]:
    """The rank of every layer that is to be factored."""
    full = {name: len(spectrum.energy) for name, spectrum in spectra.items()}
    if parameters.rank is not None:
        for name, most in full.items():
            if parameters.rank > most:
                raise UsageError(f"lowrank: rank {parameters.rank} is above that of {name}, {most}.")
        return dict.fromkeys(full, parameters.rank)
    if parameters.share is not None:
        return {name: _rounded(parameters.share * most, most) for name, most in full.items()}
    if parameters.energy is not None:
        ranks = {name: _rounded(by_energy(spectrum.energy, parameters.energy), full[name]) for name, spectrum in spectra.items()}
    else:
        ranks = by_budget(spectra, parameters.budget or 1.0)
    return {name: rank for name, rank in ranks.items() if rank < worth(spectra[name])}


def by_energy(energy: Tensor, share: float) -> int:
    """The lowest rank whose components hold a share of the energy."""
    sums = energy.cumsum(0) / energy.sum()
    return min(int((sums < share - 1e-12).sum()) + 1, len(energy))


def by_budget(spectra: Mapping[str, Spectrum], share: float) -> dict[str, int]:
    """Ranks that together keep the most energy, each layer's relative to its whole, within a share of all parameters.

    Components are bought in the order of their gain for a parameter, in blocks of :data:`MULTIPLE`; a layer whose factors
    would be as large as itself stays dense, at the price of its parameters. (The KL that each layer's cut costs on a few windows
    is a worse guide: such measurements are tiny and noisy.)
    """
    left = share * sum(_dense(spectrum) for spectrum in spectra.values())
    ranks = dict.fromkeys(spectra, 0)
    offers = sorted(
        (
            -float(block.sum() / spectrum.energy.sum()) / (len(block) * _row(spectrum)),
            name,
            len(block) * _row(spectrum),
            len(block),
        )
        for name, spectrum in spectra.items()
        for block in spectrum.energy.split(MULTIPLE)
    )
    full = set()
    for _, name, offered, count in offers:
        price = min(offered, _dense(spectra[name]) - ranks[name] * _row(spectra[name]))
        if name in full or price > left:
            continue
        left -= price
        ranks[name] += count
        if ranks[name] >= worth(spectra[name]):
            full.add(name)
    if starved := [name for name, rank in ranks.items() if not rank]:
        raise UsageError(f"lowrank: a budget of {share} leaves nothing for {starved[0]}; raise it.")
    return ranks


def worth(spectrum: Spectrum) -> float:
    """The rank from which on the factors are no smaller than the weight."""
    return _dense(spectrum) / _row(spectrum)


def _dense(spectrum: Spectrum) -> int:
    return spectrum.left.shape[0] * spectrum.right.shape[1]


def _row(spectrum: Spectrum) -> int:
    """Parameters of one component."""
    return spectrum.left.shape[0] + spectrum.right.shape[1]


def _rounded(rank: float, most: int) -> int:
    return min(most, MULTIPLE * math.ceil(rank / MULTIPLE))
