"""The reference as PyTorch's users speed it up: other attention, compiled, in bfloat16, quantised by its own tools, pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import EncoderDecoderCache, StaticCache

from asr_core.checkpoint import Checkpoint
from asr_core.decode import Logits, Mel
from asr_core.errors import UnavailableError
from runners.pytorch import PyTorchRunner, State

PRUNED = 0.5  # share of zeros
GROUP = 32  # weights that share a scale at 4 bits
GPU = "-gpu"  # how the names of variants end that run on a GPU


class Eager(PyTorchRunner):
    """Attention written out, as before scaled_dot_product_attention."""

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        super().__init__(checkpoint, threads, attention="eager")


class BFloat16(PyTorchRunner):
    """Under autocast: weights stay float32."""

    def encode(self, mel: Mel) -> State:
        """As the reference's."""
        with self._autocast():
            return super().encode(mel)

    def step(self, tokens: NDArray[np.int64], state: State) -> Logits:
        """As the reference's."""
        with self._autocast():
            return super().step(tokens, state)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16)


class Compiled(PyTorchRunner):
    """``torch.compile`` for reduced overhead, which means CUDA graphs on a GPU; caches of a fixed size, or each step compiles."""

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        super().__init__(checkpoint, threads)
        self.model.model.encoder.forward = torch.compile(self.model.model.encoder.forward, mode="reduce-overhead")
        self.model.forward = torch.compile(self.model.forward, mode="reduce-overhead")

    def encode(self, mel: Mel) -> State:
        """As the reference's, with empty caches."""
        state = super().encode(mel)
        config = self.model.config
        state.encoded = state.encoded.clone()  # a CUDA graph's output is overwritten by its next run
        lengths = (self.dims.n_text_ctx, self.dims.n_audio_ctx)
        state.cache = EncoderDecoderCache(*(StaticCache(config, max_cache_len=length) for length in lengths))
        return state


def _dynamic_int8(model: nn.Module) -> nn.Module:
    quantised: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return quantised


def _torchao(configuration: Callable[[], Any], multiple: int = 1) -> Callable[[nn.Module], nn.Module]:
    """Linear layers in torchao's way, as far as it has kernels: their outputs a multiple of so many."""

    def wanted(layer: nn.Module, _: str) -> bool:
        return isinstance(layer, nn.Linear) and layer.out_features % multiple == 0

    def quantise(model: nn.Module) -> nn.Module:
        try:
            from torchao.quantization import quantize_

            quantize_(model, configuration(), filter_fn=wanted)
        except ImportError as error:
            raise UnavailableError(f"torchao: {error}") from error
        return model

    return quantise


def _int8_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4_weights() -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP)


def _pruned(model: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer is not model.proj_out:
            prune.l1_unstructured(layer, "weight", PRUNED)
            prune.remove(layer, "weight")
    return model


CLASSES: dict[str, type[PyTorchRunner]] = {"eager": Eager, "compiled": Compiled, "bfloat16": BFloat16}
CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dynamic-int8": _dynamic_int8,
    "torchao-int8": _torchao(_int8_weights),
    "torchao-int4": _torchao(_int4_weights, multiple=16),
    "pruned": _pruned,
}
ON_GPU = ("sdpa", *CLASSES)
NAMES = (*CLASSES, *CHANGES, *(f"{name}{GPU}" for name in ON_GPU))


def open(path: Path, threads: int, variant: str) -> PyTorchRunner:
    """Open a checkpoint folder as one of :data:`NAMES`; raises :class:`UnavailableError` where this machine cannot run it."""
    name = variant.removesuffix(GPU)
    if name != variant and not torch.cuda.is_available():
        raise UnavailableError("there is no GPU here")
    runner = CLASSES.get(name, PyTorchRunner)(Checkpoint.open(path), threads)
    if name in CHANGES:
        runner.model = CHANGES[name](runner.model)
    if name != variant:
        runner.model.to("cuda")
    return runner
