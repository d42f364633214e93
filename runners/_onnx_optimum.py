"""ONNX Runtime over the layout of Optimum and transformers.js: the merged decoder, called as those clients call it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from asr_core.artifact import Artifact
from asr_core.decode import Logits, Mel
from runners.base import WithoutAttention
from runners.onnx import PROVIDERS, session_options


@dataclass
class State:
    """Encoder states [B, F, D], and every cache [B, H, rows, E] by input name; ``fresh`` until the first step."""

    encoded: NDArray[np.float32]
    caches: dict[str, NDArray[Any]]
    fresh: bool = True


class OptimumRunner(WithoutAttention):
    """The encoder's and the merged decoder's sessions over one artifact."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.folder = artifact.path
        self.dims = artifact.manifest.dims
        self.tokens = artifact.manifest.tokens
        self._encoder = _open(artifact.path, "encoder_model", threads)
        self._decoder = _open(artifact.path, "decoder_model_merged", threads)
        specs = [spec for spec in artifact.manifest.tensors if spec.graph == "decoder_model_merged"]
        self._inputs = {s.name: s.dtype for s in specs if s.role == "input" and s.name.startswith("past_key_values.")}
        self._outputs = [spec.name for spec in specs if spec.role == "output"]

    def encode(self, mel: Mel) -> State:
        """Run the encoder; the caches are of length 0, as the first pass wants them."""
        return self._begin(self.encoder_states(mel))

    def step(self, tokens: NDArray[np.int64], state: State) -> Logits:
        """Run the decoder over the new tokens; it returns the caches that the next step passes."""
        feeds = {"input_ids": tokens, "encoder_hidden_states": state.encoded, "use_cache_branch": np.array([not state.fresh])}
        logits, *present = self._decoder.run(self._outputs, feeds | state.caches)
        state.caches, state.fresh = dict(zip(self._inputs, present, strict=True)), False
        result: Logits = logits
        return result

    def reorder(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather batch rows of all caches."""
        return State(state.encoded[rows], {name: cache[rows] for name, cache in state.caches.items()}, state.fresh)

    def restart(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather the windows' encoder states; the caches are of length 0 again."""
        return self._begin(state.encoded[rows])

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        states: NDArray[np.float32] = self._encoder.run(None, {"input_features": np.ascontiguousarray(mel)})[0]
        return states

    def _begin(self, encoded: NDArray[np.float32]) -> State:
        shape = (len(encoded), self.dims.decoder_heads, 0, self.dims.head_dim)
        return State(encoded, {name: np.zeros(shape, dtype) for name, dtype in self._inputs.items()})


def _open(folder: Path, graph: str, threads: int) -> Any:
    (file,) = (folder / "onnx").glob(f"{graph}*.onnx")  # its ending tells the precision
    return ort.InferenceSession(str(file), session_options(threads), providers=PROVIDERS)


def open(path: Path, threads: int) -> OptimumRunner:
    """Open and verify an artifact folder."""
    return OptimumRunner(Artifact.open(path), threads)
