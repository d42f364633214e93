"""What methods that treat linear layers one by one share: the walk over them and the measure of each layer's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from asr_core.compressed import Effect
from asr_core.errors import UsageError
from asr_core.isolate import Progress
from compressors.base import Applied
from compressors.calibration import Moments
from compressors.model import DENSE, Form, Model, form_bytes


@dataclass(frozen=True)
class Treated:
    """A layer's new weight [N, K], its form, and its new bias where that changes."""

    weight: Tensor
    form: Form = DENSE
    bias: Tensor | None = None
    rank: int | None = None


def treat_each(
    model: Model,
    names: Sequence[str],
    moments: Mapping[str, Moments] | None,
    treat: Callable[[str], Treated],
    progress: Progress,
) -> Applied:
    """Treat the weights one after the other; ``moments`` measure the effect on outputs where they were needed anyway."""
    tensors: dict[str, Tensor] = {}
    forms: dict[str, Form] = {}
    effects = []
    for name in names:
        progress(name)
        treated = treat(name)
        tensors[name], forms[name] = treated.weight.float().contiguous(), treated.form
        if treated.bias is not None:
            tensors[bias_of(name)] = treated.bias.float().contiguous()
        second = moments[name].second if moments and name in moments else None
        effects.append(effect(name, model.tensors[name], tensors[name], treated.form, second, treated.rank))
    return Applied(model.changed(tensors, forms), effects)


def check_group(method: str, model: Model, name: str, group: int | None) -> None:
    """Raise :class:`UsageError` where groups of that many weights don't fit into the rows of a weight, or of its factors."""
    parts = model.form(name).parts
    for width in [model.tensors[name].shape[1], *([parts["left"].shape[1]] if "left" in parts else [])]:
        if group and width % group:
            raise UsageError(f"{method}: group {group} does not divide the rows of {width} weights of {name}.")


def bias_of(weight: str) -> str:
    """The name of the bias beside a weight; key projections have none."""
    return f"{weight.removesuffix('.weight')}.bias"


def effect(
    name: str, before: Tensor, after: Tensor, form: Form = DENSE, second: Tensor | None = None, rank: int | None = None
) -> Effect:
    """What became of one tensor; ``second`` are the second moments of its inputs."""
    size = form_bytes(after, form)
    change = (after - before).double() if after.shape == before.shape else None
    return Effect(
        tensor=name,
        shape=list(after.shape),
        bits=8 * size / after.numel(),
        bytes=size,
        zeros=float((after == 0).double().mean()),
        rank=rank,
        relative_error=None if change is None else _ratio(change.square().sum(), before.double().square().sum()),
        output_error=None if change is None or second is None else _ratio(energy(change, second), energy(before, second)),
    )


def energy(weight: Tensor, second: Tensor) -> Tensor:
    """The mean square of a layer's outputs, without bias, summed over its channels: tr(W H Wᵀ)."""
    w = weight.double()
    return ((w @ second) * w).sum()


def _ratio(change: Tensor, whole: Tensor) -> float:
    return float((change.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0
