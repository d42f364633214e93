"""What a training moves, and what the model computes with: tensors that keep their zeros, their factors or their integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asr_core.dims import EMBEDDING, HEAD
from compressors import integers
from compressors.linears import bias_of
from compressors.model import DENSE, Form, Model, mask_of, pruned_parts

POSITIONS = "model.encoder.embed_positions.weight"  # sinusoids, which Whisper never trains
ENCODER = "model.encoder."
SIDES = ("left", "right")


@dataclass(frozen=True)
class Rounding:
    """How a weight is rounded while it is trained: bits, and weights of a row that share a scale (None: the whole row)."""

    bits: int
    group: int | None


class Latent:
    """One tensor of a model as a training sees it.

    ``trained`` are the parameters that move: the tensor itself or its two factors; none, where it stays as it is.
    """

    def __init__(self, tensor: Tensor, form: Form, rounding: Rounding | None, mask: Tensor | None, *, fixed: bool) -> None:
        self._form, self._rounding, self._mask, self._tensor = form, rounding, mask, tensor
        moving = [form.parts[side] for side in SIDES] if "left" in form.parts else [tensor]
        self.trained = [] if fixed else [nn.Parameter(part.detach().clone()) for part in moving]

    def value(self) -> Tensor:
        """What the model computes with; gradients pass through the rounding as if it were not there."""
        if not self.trained:
            return self._tensor
        parts = [self._rounded(part) for part in self.trained]
        whole = parts[0] @ parts[1] if len(parts) == len(SIDES) else parts[0]
        return whole if self._mask is None else whole * self._mask.to(whole.device)

    def _rounded(self, weight: Tensor) -> Tensor:
        """Straight-through estimator (Bengio et al. 2013)."""
        if self._rounding is None:
            return weight
        with torch.no_grad():
            scales = integers.spread(integers.scales_of(weight, self._rounding.bits, self._rounding.group), weight.shape[1])
            nearest = integers.rounded(weight, scales, self._rounding.bits) * scales
        return weight + (nearest - weight).detach()

    def move(self, device: torch.device) -> None:
        """Put everything on a device."""
        self._tensor = self._tensor.to(device)
        for part in self.trained:
            part.data = part.data.to(device)

    def finished(self) -> tuple[Tensor, Form]:
        """The tensor float32 as it is now, and its compact form."""
        if not self.trained:
            return self._tensor.cpu(), self._form
        parts = [part.detach().cpu().float() for part in self.trained]
        if self._rounding is None:
            return self._dense(parts)
        codes = [integers.nearest(part, self._rounding.bits, self._rounding.group) for part in parts]
        if len(codes) == len(SIDES):
            named = {f"{side}_codes": one.codes for side, one in zip(SIDES, codes, strict=True)}
            named |= {f"{side}_scales": one.scales for side, one in zip(SIDES, codes, strict=True)}
            return codes[0].weight @ codes[1].weight, Form(named, self._rounding.bits)
        (one,) = codes
        if self._mask is not None:
            one = integers.Codes(one.codes * self._mask.to(torch.int8), one.scales)
        made = pruned_parts(self._form) | {"codes": one.codes, "scales": one.scales}
        return one.weight, Form(made, self._rounding.bits)

    def _dense(self, parts: list[Tensor]) -> tuple[Tensor, Form]:
        if len(parts) == len(SIDES):
            return parts[0] @ parts[1], Form(dict(zip(SIDES, parts, strict=True)))
        whole = parts[0] if self._mask is None else parts[0] * self._mask
        return whole, Form(pruned_parts(self._form))


def latents(model: Model, roundings: Mapping[str, Rounding], *, encoder: bool = True) -> dict[str, Latent]:
    """Every tensor of a model as a training sees it, by name; ``roundings`` say which are rounded on the way.

    Zeros of pruned weights stay zeros, and so do the biases of rows that are zero; factors are trained as factors. Weights that
    are integers or centroids already, and are not to be rounded anew, stay as they are, as the sinusoids do; without
    ``encoder``, so does the whole encoder.
    """
    biases = _bias_masks(model)
    made = {}
    for name, tensor in model.tensors.items():
        form, rounding = model.form(name), roundings.get(name)
        integral = bool(form.parts.keys() & {"codes", "left_codes", "centroids"}) and rounding is None
        fixed = integral or name == POSITIONS or (not encoder and name.startswith(ENCODER))
        if rounding is not None and "left_codes" in form.parts:
            form = DENSE
        mask = biases.get(name) if tensor.ndim == 1 else mask_of(form, tensor.shape)
        made[name] = Latent(tensor, form, rounding, mask, fixed=fixed)
    return made


def _bias_masks(model: Model) -> dict[str, Tensor]:
    """Where the biases of weights with dropped rows may differ from zero, bool [N]."""
    masks = {}
    for name, form in model.forms.items():
        if "kept_rows" in form.parts:
            mask = torch.zeros(model.tensors[name].shape[0], dtype=torch.bool)
            mask[form.parts["kept_rows"]] = True
            masks[bias_of(name)] = mask
    return masks


def values(made: Mapping[str, Latent]) -> dict[str, Tensor]:
    """The tensors to compute with, the tied head among them."""
    computed = {name: latent.value() for name, latent in made.items()}
    return computed | {HEAD: computed[EMBEDDING]}


def finished(model: Model, made: Mapping[str, Latent]) -> Model:
    """The model with what was trained."""
    tensors, forms = {}, {}
    for name, latent in made.items():
        if latent.trained:
            tensors[name], forms[name] = latent.finished()
    return model.changed({name: tensor.contiguous() for name, tensor in tensors.items()}, forms)
