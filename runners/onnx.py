"""ONNX Runtime on the CPU: two sessions, the key/value cache in the host's hands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from asr_core.artifact import Artifact
from asr_core.decode import Logits, Mel
from runners.base import StepRunner

PROVIDERS = ["CPUExecutionProvider"]
ERRORS_ONLY = 3  # ONNX Runtime's log severity


@dataclass
class State:
    """Per-layer K and V by input name: cache rows [n_text_ctx, B, H, E], valid before ``position``, and cross [B, H, F, E].

    The cache's first axis is time, so that the rows seen so far are one piece of memory that the runtime reads in place.
    """

    position: int
    past: dict[str, NDArray[Any]]
    cross: dict[str, NDArray[Any]]


class OnnxRunner(StepRunner):
    """The encoder's and the decoder step's sessions over one artifact."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.dims = artifact.manifest.dims
        self.tokens = artifact.manifest.tokens
        self._encoder = self._open(artifact.path / "encoder.onnx", threads)
        self._decoder = self._open(artifact.path / "decoder.onnx", threads)
        specs = [spec for spec in artifact.manifest.tensors if spec.graph == "decoder"]
        inputs = [spec for spec in specs if spec.role == "input"]
        self._cross = [spec.name for spec in inputs if spec.name.startswith("cross_")]
        self._past = [spec.name for spec in inputs if spec.name.startswith("past_")]
        self._cache_dtype = next(spec.dtype for spec in inputs if spec.name.startswith("past_"))
        self._outputs = ["logits", *(name.replace("past_", "new_", 1) for name in self._past)]

    def encode(self, mel: Mel) -> State:
        """Run the encoder and keep the cross-attention K/V; the cache starts empty."""
        cross = self._encoder.run(self._cross, {"mel": np.ascontiguousarray(mel)})
        shape = (self.dims.n_text_ctx, len(mel), self.dims.decoder_heads, self.dims.head_dim)
        past = {name: np.empty(shape, self._cache_dtype) for name in self._past}
        return State(0, past, dict(zip(self._cross, cross, strict=True)))

    def step(self, tokens: NDArray[np.int64], state: State) -> Logits:
        """Run the decoder over the new tokens and add their K/V rows to the cache."""
        start, end = state.position, state.position + tokens.shape[1]
        past = {name: rows[:start] for name, rows in state.past.items()}
        logits, *new = self._decoder.run(self._outputs, {"tokens": tokens, **past, **state.cross})
        for rows, added in zip(state.past.values(), new, strict=True):
            rows[start:end] = added
        state.position = end
        result: Logits = logits
        return result

    def reorder(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather batch rows of the cache and of the cross-attention K/V."""
        past = {name: np.empty((len(old), len(rows), *old.shape[2:]), old.dtype) for name, old in state.past.items()}
        for name, old in state.past.items():
            past[name][: state.position] = old[: state.position, rows]
        return State(state.position, past, {name: old[rows] for name, old in state.cross.items()})

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        states: NDArray[np.float32] = self._encoder.run(["encoder_states"], {"mel": np.ascontiguousarray(mel)})[0]
        return states

    def _open(self, model: Path, threads: int) -> Any:
        return ort.InferenceSession(str(model), session_options(threads), providers=PROVIDERS)


def session_options(threads: int) -> ort.SessionOptions:
    """How every session of this runner computes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = ERRORS_ONLY
    return options


def open(path: Path, threads: int) -> OnnxRunner:
    """Open and verify an artifact folder."""
    return OnnxRunner(Artifact.open(path), threads)
