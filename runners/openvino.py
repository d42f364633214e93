"""OpenVINO's CPU plugin over the layout of ``openvino_genai.WhisperPipeline``, with our decode loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from asr_core.artifact import Artifact
from asr_core.decode import Logits, Mel
from runners.base import StepRunner

ENCODER = "openvino_encoder_model.xml"
DECODER = "openvino_decoder_model.xml"
CROSS = "cross."  # how the names of the cross-attention states begin


@dataclass
class State:
    """What the next step continues; the keys and values themselves live in the decoder's request.

    ``windows`` float32 [B, 1500, D] are the encoder states of each row, ``origin`` [B] tells which encoded window that is,
    ``past`` int32 [B] which row of the last step it goes on from.
    """

    windows: NDArray[np.float32]
    origin: NDArray[np.int64]
    past: NDArray[np.int32]


class OpenVINORunner(StepRunner):
    """Encoder and stateful decoder, one request each: only the newest state can go on."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.folder = artifact.path
        self.dims = artifact.manifest.dims
        self.tokens = artifact.manifest.tokens
        self.alignment_heads = artifact.manifest.alignment_heads
        self.short_windows = artifact.manifest.short_windows
        self._encoder = self._open(artifact.path / ENCODER, threads)
        self._decoder = self._open(artifact.path / DECODER, threads)
        self._newest: State | None = None

    def encode(self, mel: Mel) -> State:
        """Run the encoder and empty the decoder."""
        return self._begin(self.encoder_states(mel))

    def step(self, tokens: NDArray[np.int64], state: State) -> Logits:
        """One pass of the decoder over the new tokens."""
        self._check(state)
        tokens = np.ascontiguousarray(tokens)  # the shared tensor borrows its memory until the end of this call
        self._decoder.set_tensor("input_ids", ov.Tensor(tokens, shared_memory=True))
        self._decoder.infer()
        state.past[:] = range(len(tokens))
        logits: Logits = self._decoder.get_output_tensor(0).data
        return logits

    def step_with_queries(self, tokens: NDArray[np.int64], state: State) -> tuple[Logits, NDArray[np.float32]]:
        """The decoder's second output, after a step."""
        return self.step(tokens, state), self._decoder.get_tensor("alignment_queries").data

    def cross_keys(self, state: State, layer: int) -> NDArray[np.float32]:
        """From the runtime's state, in which they lie as [B, H, E, F]."""
        self._check(state)
        held = next(held for held in self._decoder.query_state() if held.name == f"{CROSS}{layer}.k")
        keys: NDArray[np.float32] = np.asarray(held.state.data, np.float32).swapaxes(2, 3)
        return keys

    def reorder(self, state: State, rows: NDArray[np.int64]) -> State:
        """Self-attention follows ``beam_idx``; cross-attention is projected anew where rows change their window.

        It can't be copied instead: writing such a state corrupts the plugin's memory when the next window is larger.
        """
        self._check(state)
        origin = state.origin[rows]
        windows = state.windows
        if not np.array_equal(origin, state.origin):
            windows = windows[rows]
            for held in self._decoder.query_state():
                if held.name.startswith(CROSS):
                    held.reset()
        return self._continue_with(State(windows, origin, state.past[rows]))

    def restart(self, state: State, rows: NDArray[np.int64]) -> State:
        """Empty the decoder; it projects the windows anew."""
        return self._begin(state.windows[rows])

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        mel = np.ascontiguousarray(mel)
        self._encoder.set_tensor("input_features", ov.Tensor(mel, shared_memory=True))
        self._encoder.infer()
        states: NDArray[np.float32] = self._encoder.get_output_tensor().data
        return states.copy()

    def _open(self, file: Path, threads: int) -> Any:
        return request(file, threads)

    def _begin(self, windows: NDArray[np.float32]) -> State:
        self._decoder.reset_state()
        return self._continue_with(State(windows, np.arange(len(windows)), np.arange(len(windows), dtype=np.int32)))

    def _continue_with(self, state: State) -> State:
        self._decoder.set_tensor("encoder_hidden_states", ov.Tensor(state.windows, shared_memory=True))
        self._decoder.set_tensor("beam_idx", ov.Tensor(state.past, shared_memory=True))
        self._newest = state
        return state

    def _check(self, state: State) -> None:
        if state is not self._newest:
            raise RuntimeError("this state was replaced by a later one: the decoder holds one at a time.")


def request(model: Path | ov.Model, threads: int, *, counters: bool = False) -> Any:
    """A request of a model, compiled as this runner does; with ``counters``, it times its operations."""
    config = {
        "PERF_COUNT": counters,
        # The plugin's own choices are bfloat16 where the processor has it and an 8-bit cache: both can change the text.
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_HYPER_THREADING": False,
        "ENABLE_CPU_PINNING": False,
    }
    return ov.Core().compile_model(model, "CPU", config).create_infer_request()


def open(path: Path, threads: int) -> OpenVINORunner:
    """Open and verify an artifact folder."""
    return OpenVINORunner(Artifact.open(path), threads)
