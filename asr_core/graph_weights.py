"""A checkpoint's tensors as the export graph has them: factors in place of factored weights, without removed encoder heads.

What exporters read. A plain checkpoint's are its own tensors; a compressed one's have, where its record knows them, the integers
or palettes that they stand for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from asr_core.compressed import Forms, factor

if TYPE_CHECKING:
    import torch

    from asr_core.dims import Dims
    from asr_core.weights import Weights

# Which half of a factored weight, left @ right.
SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
# What an attention without some of its heads has less of: rows of these, columns of the output projection.
INNER = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias")
OUTPUT = "out_proj.weight"
MOST_BITS, FEW_BITS = 8, 4  # of a code
PALETTE_BITS = (4, 6, 8)  # of an index, as runtimes have them


@dataclass(frozen=True)
class Integers:
    """A weight as codes int8 [N, K] times scales float32 [N, G], where G divides K; ``bits`` a code."""

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int


@dataclass(frozen=True)
class Palette:
    """A weight as centroids float32 [1 or N, C], of all or of each row, and indices uint8 [N, K]."""

    centroids: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True)
class _Source:
    """Where a tensor comes from: a stored one, or a factor of its form, and the places along an axis that are kept."""

    name: str
    side: Literal["left", "right"] | None = None
    axis: int = 0
    kept: list[int] | None = None


class GraphWeights:
    """The tensors by the names of the graph's parameters (Hugging Face's), read one at a time.

    A factored ``x.weight`` is there as ``x.right.weight`` [R, K] and ``x.left.weight`` [N, R], and its bias as ``x.left.bias``.
    Self-attentions of the encoder have only the rows and columns of the heads that are left.
    """

    def __init__(self, weights: Weights, forms: Forms, dims: Dims) -> None:
        self._weights = weights
        self._forms = forms
        self._sources = {name: _Source(name) for name in weights.names}
        for name in forms.names:
            if forms.rank(name):
                self._factor(name)
        for layer in range(dims.encoder_layers):
            self._narrow(f"model.encoder.layers.{layer}.self_attn", dims.d_model // dims.encoder_heads)

    def _factor(self, name: str) -> None:
        stem = name.removesuffix(".weight")
        del self._sources[name]
        self._sources |= {f"{stem}.{side}.weight": _Source(name, side) for side in SIDES}
        if f"{stem}.bias" in self._sources:
            self._sources[f"{stem}.left.bias"] = self._sources.pop(f"{stem}.bias")

    def _narrow(self, attention: str, width: int) -> None:
        """Leave the removed heads out, where all four projections say the same of whole heads."""
        parts = {name: "kept_rows" for name in INNER if name.endswith("weight")} | {OUTPUT: "kept_columns"}
        if any(part not in self._forms.parts(f"{attention}.{name}") for name, part in parts.items()):
            return
        kept, *others = [self._forms.places(f"{attention}.{name}", part) for name, part in parts.items()]
        if _blocks(kept, width) is None or any(kept != other for other in others):
            return
        for name in (*INNER, OUTPUT):
            full = f"{attention}.{name}"
            if full in self._sources:
                self._sources[full] = _Source(full, axis=int(name == OUTPUT), kept=kept)

    @property
    def kinds(self) -> Counter[str]:
        """How many weights, or attentions of fewer heads, have a compact form of a kind (:data:`asr_core.build.NOTICES`)."""
        counts: Counter[str] = Counter()
        for name in self._forms.names:
            parts = self._forms.parts(name)
            counts["factors"] += self._forms.rank(name) is not None
            if "centroids" in parts:
                counts[palettes(*self._forms.shape(name, "centroids"))] += 1
            counts["zeros"] += "mask" in parts
            if parts & {"codes", "left_codes"}:
                counts["int4" if (self._forms.bits(name) or MOST_BITS) <= FEW_BITS else "int8"] += 1
            if name.endswith(f".{OUTPUT}") and "kept_columns" in parts:
                counts["silent" if self._sources[name].kept is None else "heads"] += 1
        return counts

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        source = self._sources[name]
        if source.side:
            n, k = self._weights.shape(source.name)
            rank = self._forms.rank(source.name) or 0
            return (n, rank) if source.side == "left" else (rank, k)
        shape = list(self._weights.shape(source.name))
        if source.kept is not None:
            shape[source.axis] = len(source.kept)
        return tuple(shape)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored type; raises :class:`CheckpointError` where a form is not what its weight is."""
        source = self._sources[name]
        if source.side:
            return factor(self._forms.read(source.name), source.side)
        whole = self._weights.read(source.name)
        return whole if source.kept is None else _chosen(whole, source.axis, source.kept)

    def integers(self, name: str) -> Integers | None:
        """What the record has as this tensor's integers, None where there are none."""
        source = self._sources[name]
        prefix = f"{source.side}_" if source.side else ""
        if f"{prefix}codes" not in self._forms.parts(source.name):
            return None
        parts = self._forms.read(source.name)
        codes = parts[f"{prefix}codes"]
        scales = parts[f"{prefix}scales"].expand(len(codes), -1)
        if source.kept is not None:
            group = codes.shape[1] // scales.shape[1]
            codes = _chosen(codes, source.axis, source.kept)
            if source.axis == 0:
                scales = _chosen(scales, 0, source.kept)
            elif scales.shape[1] > 1:
                groups = _blocks(source.kept, group)
                if groups is None:  # some lost a part of their columns
                    return None
                scales = _chosen(scales, 1, groups)
        return Integers(codes.contiguous(), scales.contiguous(), self._forms.bits(source.name) or MOST_BITS)

    def palette(self, name: str) -> Palette | None:
        """What the record has as this tensor's palette, None where there is none."""
        source = self._sources[name]
        if "centroids" not in self._forms.parts(source.name):
            return None
        parts = self._forms.read(source.name)
        centroids, indices = parts["centroids"], parts["indices"]
        if source.kept is not None:
            indices = _chosen(indices, source.axis, source.kept)
            if source.axis == 0 and len(centroids) > 1:
                centroids = _chosen(centroids, 0, source.kept)
        return Palette(centroids, indices)

    def inputs(self, name: str) -> tuple[float, int] | None:
        """Scale and zero of a linear layer's 8-bit inputs, (q - zero) · scale; None where nobody calibrated them."""
        source = self._sources[name]
        if "input_scale" not in self._forms.parts(source.name) or source.side == "left":
            return None
        return float(self._forms.part(source.name, "input_scale")), int(self._forms.part(source.name, "input_zero"))


def palettes(count: int, size: int) -> str:
    """The kind of compact form that ``count`` palettes of ``size`` values are, by the bits of an index."""
    bits = next(bits for bits in PALETTE_BITS if size <= 2**bits)
    return f"palettes{bits}" if count == 1 else f"row palettes{bits}"


def _chosen(tensor: torch.Tensor, axis: int, places: list[int]) -> torch.Tensor:
    import torch

    return tensor.index_select(axis, torch.tensor(places))


def _blocks(kept: list[int], size: int) -> list[int] | None:
    """The blocks of ``size`` neighbours that make up the kept places, None where some are there in part."""
    blocks = [place // size for place in kept[::size]]
    return blocks if kept == [block * size + i for block in blocks for i in range(size)] else None
