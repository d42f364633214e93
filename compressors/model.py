"""A Whisper in memory, as methods see it: tensors, the compact forms that some of them stand for, and the configs."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asr_core import registry
from asr_core.checkpoint import Checkpoint
from asr_core.compressed import Size
from asr_core.dims import EMBEDDING, HEAD, Dims
from asr_core.errors import UsageError
from compressors import ranges

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

FLOAT_BITS = 32
NO_PARTS: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Form:
    """A weight's compact form: parts as in :data:`asr_core.compressed.PARTS`, and the bits of a code."""

    parts: Mapping[str, Tensor]
    bits: int | None = None


DENSE = Form(NO_PARTS)


@dataclass(frozen=True)
class Model:
    """A checkpoint's tensors (float32, Hugging Face's names, no tied head), forms and configs; methods return changed copies."""

    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: Mapping[str, Tensor]
    forms: Mapping[str, Form] = field(default_factory=dict)

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Model:
        """Read a checkpoint, and the compact forms of one that is compressed already."""
        forms = {name: Form(checkpoint.forms.read(name), checkpoint.forms.bits(name)) for name in checkpoint.forms.names}
        return cls(checkpoint.config, checkpoint.generation, checkpoint.state_dict(), forms)

    @cached_property
    def dims(self) -> Dims:
        """The sizes."""
        return Dims.from_config(self.config)

    @property
    def blocks(self) -> list[list[str]]:
        """The weights of the linear layers, a list for every encoder and decoder layer, in the order of computation."""
        prefixes = [f"model.encoder.layers.{i}." for i in range(self.dims.encoder_layers)]
        prefixes += [f"model.decoder.layers.{i}." for i in range(self.dims.decoder_layers)]
        return [[name for name in self.tensors if name.startswith(prefix) and self.is_linear(name)] for prefix in prefixes]

    def is_linear(self, name: str) -> bool:
        """Whether a tensor is the weight [N, K] of a linear layer."""
        return name.endswith(
            (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight")
        )

    def chosen(self, only: Sequence[str]) -> list[str]:
        """The linear weights that any of the patterns matches (all, where there are none); raises for an idle pattern."""
        linears = [name for block in self.blocks for name in block]
        for pattern in only:
            if not fnmatch.filter(linears, pattern):
                raise UsageError(f"no linear layer's weight matches {pattern!r}; they are named as {linears[0]}.")
        return [name for name in linears if not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)]

    def form(self, name: str) -> Form:
        """The compact form of a weight."""
        return self.forms.get(name, DENSE)

    def changed(self, tensors: Mapping[str, Tensor], forms: Mapping[str, Form]) -> Model:
        """A copy with other values of some tensors, and their forms; a changed weight whose form is not given is dense."""
        kept = {name: form for name, form in self.forms.items() if name not in tensors}
        kept |= {name: form for name, form in forms.items() if form.parts}
        return replace(self, tensors={**self.tensors, **tensors}, forms=kept)

    def bytes_of(self, name: str) -> int:
        """What a tensor takes up in its compact form."""
        return form_bytes(self.tensors[name], self.form(name))

    @property
    def size(self) -> Size:
        """Parameters and bytes, the embedding apart."""
        body = [name for name in self.tensors if name != EMBEDDING]
        return Size(
            body_parameters=sum(self.tensors[name].numel() for name in body),
            body_bytes=sum(self.bytes_of(name) for name in body),
            embedding_parameters=self.tensors[EMBEDDING].numel(),
            embedding_bytes=self.bytes_of(EMBEDDING),
        )

    def module(self) -> WhisperForConditionalGeneration:
        """The model in transformers, over these very tensors (no copies), for evaluation.

        Inputs that have a range are rounded to its steps, as they will be where the range is used.
        """
        # As the PyTorch runner imports it: without a neighbour that takes seconds.
        whisper = registry.import_alone("transformers.models.whisper.modeling_whisper", without=["torchao"])
        config = whisper.WhisperConfig.from_dict(self.config)
        config._attn_implementation = "sdpa"  # noqa: SLF001 - from_config's only way to say it
        with torch.device("meta"):
            module: WhisperForConditionalGeneration = whisper.WhisperForConditionalGeneration(config)
        module.load_state_dict({**self.tensors, HEAD: self.tensors[EMBEDDING]}, strict=True, assign=True)
        for name, form in self.forms.items():
            if "input_scale" in form.parts:
                layer = module.get_submodule(name.removesuffix(".weight"))
                layer.register_forward_pre_hook(lambda _, given, parts=form.parts: ranges.rounded(given[0], parts))
        return module.eval()


def form_bytes(tensor: Tensor, form: Form) -> int:
    """Bytes of a tensor in its compact form: codes and indices packed to their bits, everything else float32."""
    parts = form.parts
    if "centroids" in parts:
        centroids = parts["centroids"]
        return _packed(tensor.numel(), math.log2(centroids.shape[1])) + 4 * centroids.numel()
    if "left_codes" in parts:
        return sum(_integer(parts[f"{side}_codes"].numel(), parts[f"{side}_scales"], form.bits) for side in ("left", "right"))
    if "left" in parts:
        return 4 * (parts["left"].numel() + parts["right"].numel())
    count = tensor.numel()
    for axis, part in enumerate(("kept_rows", "kept_columns")):
        if part in parts:
            count = count // tensor.shape[axis] * parts[part].numel()
    return _integer(count, parts["scales"], form.bits) if "codes" in parts else 4 * count


def _integer(count: int, scales: Tensor, bits: int | None) -> int:
    return _packed(count, bits or 8) + 4 * scales.numel()


def _packed(count: int, bits: float) -> int:
    return math.ceil(count * bits / 8)


def mask_of(form: Form, shape: Sequence[int]) -> Tensor | None:
    """Where a weight of a pruned form may differ from zero, bool [N, K]; None where it may everywhere."""
    parts = form.parts
    if not parts.keys() & {"mask", "kept_rows", "kept_columns"}:
        return None
    mask = parts["mask"].clone() if "mask" in parts else torch.ones(*shape, dtype=torch.bool)
    for axis, part in enumerate(("kept_rows", "kept_columns")):
        if part in parts:
            dropped = torch.ones(shape[axis], dtype=torch.bool)
            dropped[parts[part]] = False
            mask[(slice(None),) * axis + (dropped,)] = False
    return mask


def pruned_parts(form: Form) -> dict[str, Tensor]:
    """The parts that say where a weight is zero, which outlive a change of its values."""
    return {part: form.parts[part] for part in ("mask", "kept_rows", "kept_columns") if part in form.parts}
