"""Winograd's F(2, 3) for a convolution of width 3 and stride 1: two outputs of four products instead of six.

Whisper's first convolution is the only one that it fits. Nothing here is part of an export: it is measured to tell whether it
would be worth it (Lavin and Gray 2016, in one dimension).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

FRAMES = 3000
N_MELS = 80
WIDTHS = (128, 384, 768)


def transformed(weight: Tensor) -> Tensor:
    """A kernel [N, C, 3] as it is multiplied, [4, N, C]; done once."""
    first, middle, last = weight.unbind(-1)
    return torch.stack([first, (first + middle + last) / 2, (first - middle + last) / 2, last])


def convolve(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A convolution with padding 1, as ``torch.nn.functional.conv1d``: x [B, C, L] with even L → [B, N, L]."""
    even, odd = nn.functional.pad(x, (1, 1)).unflatten(-1, (-1, 2)).unbind(-1)
    a, b, c, d = even[..., :-1], odd[..., :-1], even[..., 1:], odd[..., 1:]
    made = kernel @ torch.stack([a - c, b + c, c - b, b - d], 1)  # [B, 4, N, L / 2]
    first, second, third, fourth = made.unbind(1)
    out = x.new_empty(len(x), len(bias), x.shape[-1])
    out[..., 0::2] = first + second + third
    out[..., 1::2] = second - third - fourth
    return out.add_(bias[:, None])


@dataclass(frozen=True)
class Measured:
    """Of one width: how many times as fast as torch's convolution, and the largest difference over the largest output."""

    width: int
    faster: float
    error: float


def measure(width: int, rounds: int) -> Measured:
    """Time both on a window of noise in turn, in seconds of the processor, with random weights."""
    torch.manual_seed(0)
    layer = nn.Conv1d(N_MELS, width, 3, padding=1)
    bias = torch.zeros(width) if layer.bias is None else layer.bias
    x = torch.randn(1, N_MELS, FRAMES)
    ratios = []
    with torch.inference_mode():
        kernel = transformed(layer.weight)
        expected, got = layer(x), convolve(x, kernel, bias)
        for _ in range(rounds):
            begun = time.process_time()
            layer(x)
            between = time.process_time()
            convolve(x, kernel, bias)
            ratios.append((between - begun) / (time.process_time() - between))
    return Measured(width, median(ratios), float((got - expected).abs().max() / expected.abs().max()))
