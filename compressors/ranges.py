"""Ranges of activations: what a linear layer's inputs lie between, and which part of that 256 steps should cover.

Observers as in ONNX Runtime and TensorRT: everything that was seen, all but the farthest values, or the range whose histogram
loses the least information (Migacz 2017).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LEVELS = 256  # of an 8-bit input
BINS = 2048
PERCENTILE = 99.99  # of all values that the range holds; the rest is halved between both ends
CLOSEST = 128  # bins: the narrowest range that the entropy observer considers, of BINS
TINY = 1e-12


def parts(low: float, high: float) -> dict[str, Tensor]:
    """The parts ``input_scale`` and ``input_zero`` of a form: [low, high] in 256 steps, with zero on one of them."""
    scale = max(high - low, TINY) / (LEVELS - 1)
    return {"input_scale": torch.tensor([scale]), "input_zero": torch.tensor([round(-low / scale)], dtype=torch.uint8)}


def rounded(x: Tensor, form: Mapping[str, Tensor]) -> Tensor:
    """Inputs as 8 bits have them; gradients pass as if nothing were rounded."""
    scale, zero = form["input_scale"].to(x.device), form["input_zero"].to(x.device)
    steps = (x.detach() / scale + zero).round().clamp(0, LEVELS - 1)
    return x + ((steps - zero) * scale - x).detach()


def percentile(counts: Tensor, low: float, high: float) -> tuple[float, float]:
    """The range without the farthest values, of a histogram [B] of [low, high]."""
    rest = (1 - PERCENTILE / 100) / 2
    shares = torch.cat([counts.new_zeros(1), counts.cumsum(0)]) / counts.sum()
    edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)
    lowest = edges[(shares <= rest).nonzero()[-1, 0]]
    highest = edges[(shares >= 1 - rest).nonzero()[0, 0]]
    return min(float(lowest), 0.0), max(float(highest), 0.0)


def entropy(counts: Tensor, low: float, high: float) -> tuple[float, float]:
    """The range, both ends drawn in alike, whose 256 steps differ least (KL) from the histogram [B] of [low, high]."""
    zero = round(-low / (high - low) * len(counts)) if high > low else 0
    best = (torch.inf, low, high)
    for kept in range(CLOSEST, len(counts) + 1, LEVELS // 4):
        share = kept / len(counts)
        first, last = round(zero * (1 - share)), round(zero + (len(counts) - zero) * share)
        best = min(best, (_loss(counts, first, last), low * share, high * share))
    return best[1:]


def _loss(counts: Tensor, first: int, last: int) -> float:
    """KL divergence of the histogram, what is outside [first, last) moved to its edges, to its image in 256 levels."""
    inside = counts[first:last]
    clipped = inside.clone()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    level = torch.arange(len(inside)) * LEVELS // len(inside)
    filled = (clipped > 0).double()
    mass, members = (torch.zeros(LEVELS, dtype=torch.float64).index_add(0, level, part) for part in (inside, filled))
    image = (mass / members.clamp(min=1))[level] * filled
    ours, theirs = clipped / clipped.sum(), image / image.sum().clamp(min=TINY)
    return float((ours * (ours.clamp(min=TINY).log() - theirs.clamp(min=TINY).log())).sum())


class Extremes:
    """The lowest and the highest input that was seen, and zero."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0

    def __call__(self, x: Tensor, weights: Tensor) -> None:
        """Hear the inputs [rows, K] of a layer."""
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))


class Histogram:
    """How often inputs lie where between two extremes, float64 [BINS], each row counting as much as its weight."""

    def __init__(self, low: float, high: float) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self._range = (low, max(high, low + TINY))

    def __call__(self, x: Tensor, weights: Tensor) -> None:
        """Hear the inputs [rows, K] of a layer, each row with its weight [rows, 1]."""
        self.counts += torch.histogram(x.flatten(), BINS, range=self._range, weight=weights.expand_as(x).flatten()).hist
