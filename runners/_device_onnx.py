"""ONNX Runtime on another processor than the host's: keys and values stay in its memory, and each step appends its own there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from asr_core.artifact import Artifact
from asr_core.decode import Mel
from asr_core.errors import UnavailableError
from runners.onnx import LOGITS_AT, STATES, Ports, Steps, session_options

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# The memory that a provider computes in, and the providers of encoder and decoder, in order of preference. TensorRT builds an
# engine for each shape, and a decoder's change at every token: those are CUDA's.
PROVIDERS: Mapping[str, tuple[str, list[str], list[str]]] = {
    "cuda": ("cuda", [CUDA, CPU], [CUDA, CPU]),
    "tensorrt": ("cuda", ["TensorrtExecutionProvider", CUDA, CPU], [CUDA, CPU]),
}


@dataclass
class State:
    """By input name: the cache, whose rows before ``position`` are valid, and the cross-attention K/V, in the device's memory.

    ``origin`` [B] tells which encoded window each row is.
    """

    position: int
    past: dict[str, ort.OrtValue]
    cross: dict[str, ort.OrtValue]
    origin: NDArray[np.int64]


class DeviceRunner(Steps):
    """The encoder's and the decoder step's sessions over one artifact, bound to buffers on a device."""

    def __init__(self, artifact: Artifact, threads: int, device: str, encoder: Sequence[str], decoder: Sequence[str]) -> None:
        manifest = artifact.manifest
        self.folder, self.dims, self.tokens = artifact.path, manifest.dims, manifest.tokens
        self.alignment_heads, self.short_windows = manifest.alignment_heads, manifest.short_windows
        self._device, self._ports = device, Ports.read(artifact)
        options = session_options(threads)
        self._encoder, self._decoder = (
            ort.InferenceSession(str(artifact.path / f"{name}.onnx"), options, providers=list(providers))
            for name, providers in (("encoder", encoder), ("decoder", decoder))
        )

    def encode(self, mel: Mel) -> State:
        """Run the encoder; what it made stays where it is."""
        made = self._encoded(mel, self._ports.cross, self._device)
        return self._begin(dict(zip(self._ports.cross, made, strict=True)), len(mel))

    def cross_keys(self, state: State, layer: int) -> NDArray[np.float32]:
        """As the encoder made them."""
        keys: NDArray[np.float32] = state.cross[f"cross_k_{layer}"].numpy().astype(np.float32)
        return keys

    def reorder(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather batch rows by way of the host's memory: ONNX Runtime moves no parts of its values."""
        origin = state.origin[rows]
        same = np.array_equal(origin, state.origin)
        past = {name: self._put(value.numpy()[:, rows]) for name, value in state.past.items()}
        return State(state.position, past, state.cross if same else self._gathered(state.cross, rows), origin)

    def restart(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather the windows' cross-attention K/V; the cache starts empty."""
        same = np.array_equal(rows, state.origin)
        return self._begin(state.cross if same else self._gathered(state.cross, rows), len(rows))

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        states: NDArray[np.float32] = self._encoded(mel, [STATES], "cpu")[0].numpy()
        return states

    def _encoded(self, mel: Mel, wanted: Sequence[str], device: str) -> list[ort.OrtValue]:
        binding = self._encoder.io_binding()
        binding.bind_cpu_input("mel", np.ascontiguousarray(mel))
        for name in wanted:
            binding.bind_output(name, device)
        self._encoder.run_with_iobinding(binding)
        made: list[ort.OrtValue] = binding.get_outputs()
        return made

    def _step(self, tokens: NDArray[np.int64], state: State, outputs: list[str], wanted: Sequence[int]) -> list[NDArray[Any]]:
        binding = self._decoder.io_binding()
        binding.bind_cpu_input("tokens", np.ascontiguousarray(tokens))
        binding.bind_cpu_input(LOGITS_AT, np.array(wanted, np.int64))
        for name in outputs:
            binding.bind_output(name)
        for name, value in state.cross.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in state.past.items():
            self._bind_rows(binding, name, value, state.position, tokens.shape[1])
        self._decoder.run_with_iobinding(binding)
        state.position += tokens.shape[1]
        return [value.numpy() for value in binding.get_outputs()[: len(outputs)]]

    def _bind_rows(self, binding: Any, name: str, value: ort.OrtValue, position: int, new: int) -> None:
        """Let the step read the rows before a position and write the ones from it on."""
        row, dtype = list(value.shape()[1:]), self._ports.cache_dtype
        begin = value.data_ptr()
        end = begin + position * int(np.prod(row)) * dtype.itemsize
        binding.bind_input(name, self._device, 0, dtype, [position, *row], begin)
        binding.bind_output(self._ports.new_of(name), self._device, 0, dtype, [new, *row], end)

    def _begin(self, cross: dict[str, ort.OrtValue], batch: int) -> State:
        shape = [self.dims.n_text_ctx, batch, self.dims.decoder_heads, self.dims.head_dim]
        past = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(shape, self._ports.cache_dtype, self._device)
            for name in self._ports.past
        }
        return State(0, past, cross, np.arange(batch))

    def _gathered(self, values: Mapping[str, ort.OrtValue], rows: NDArray[np.int64]) -> dict[str, ort.OrtValue]:
        return {name: self._put(value.numpy()[rows]) for name, value in values.items()}

    def _put(self, array: NDArray[Any]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device)


def open(path: Path, threads: int, provider: str) -> DeviceRunner:
    """Open and verify an artifact folder on a provider of ONNX Runtime.

    Raises :class:`UnavailableError` where the installed ONNX Runtime lacks it.
    """
    device, encoder, decoder = PROVIDERS[provider]
    if encoder[0] not in ort.get_available_providers():
        raise UnavailableError(
            f"the ONNX Runtime that is installed has no {encoder[0]}: on a machine with an NVIDIA GPU, put onnxruntime-gpu "
            "in its place."
        )
    return DeviceRunner(Artifact.open(path), threads, device, encoder, decoder)
