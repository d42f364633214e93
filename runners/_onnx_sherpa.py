"""ONNX Runtime over the layout of sherpa-onnx, called as that client calls it; texts are read with its own table of tokens."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from asr_core.artifact import Artifact
from asr_core.decode import Logits, Mel
from asr_core.errors import ArtifactError
from asr_core.tokens import load_tokenizer
from runners.base import WithoutAttention
from runners.onnx import PROVIDERS, session_options


@dataclass
class State:
    """K and V of the ``own`` attention [L, B, n_text_ctx, D], ``position`` rows of them valid, and of ``cross`` [L, B, F, D]."""

    position: int
    own: tuple[NDArray[np.float32], NDArray[np.float32]]
    cross: tuple[NDArray[np.float32], NDArray[np.float32]]


class SherpaRunner(WithoutAttention):
    """The encoder's and the decoder's sessions over one artifact."""

    short_windows = True

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.folder = artifact.path
        self.dims = artifact.manifest.dims
        self.tokens = artifact.manifest.tokens
        _check_tokens(artifact.path, self.tokens.end)
        self._encoder = _open(artifact.path, "encoder", threads)
        self._decoder = _open(artifact.path, "decoder", threads)

    def encode(self, mel: Mel) -> State:
        """Run the encoder; the caches start as zeros."""
        keys, values = self._encoder.run(["n_layer_cross_k", "n_layer_cross_v"], {"mel": np.ascontiguousarray(mel)})
        return self._begin((keys, values))

    def step(self, tokens: NDArray[np.int64], state: State) -> Logits:
        """Run the decoder over the new tokens; it returns the caches that the next step passes."""
        feeds = {
            "tokens": tokens,
            "in_n_layer_self_k_cache": state.own[0],
            "in_n_layer_self_v_cache": state.own[1],
            "n_layer_cross_k": state.cross[0],
            "n_layer_cross_v": state.cross[1],
            "offset": np.array([state.position], np.int64),
        }
        logits, keys, values = self._decoder.run(None, feeds)
        state.own = keys, values
        state.position += tokens.shape[1]
        result: Logits = logits
        return result

    def reorder(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather batch rows of all caches."""
        own = state.own[0][:, rows], state.own[1][:, rows]
        return State(state.position, own, (state.cross[0][:, rows], state.cross[1][:, rows]))

    def restart(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather the windows' cross-attention K and V; the caches are zeros again."""
        return self._begin((state.cross[0][:, rows], state.cross[1][:, rows]))

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        states: NDArray[np.float32] = self._encoder.run(["encoder_states"], {"mel": np.ascontiguousarray(mel)})[0]
        return states

    def _begin(self, cross: tuple[NDArray[np.float32], NDArray[np.float32]]) -> State:
        shape = (self.dims.decoder_layers, cross[0].shape[1], self.dims.n_text_ctx, self.dims.d_model)
        return State(0, (np.zeros(shape, np.float32), np.zeros(shape, np.float32)), cross)


def _check_tokens(folder: Path, end: int) -> None:
    """Raise :class:`ArtifactError` where the table of tokens gives another text than the tokenizer.

    sherpa-onnx leaves a token that the table lacks out of the text and says nothing.
    """
    (file,) = folder.glob("*-tokens.txt")
    lines = (line.split(" ") for line in file.read_text(encoding="ascii").splitlines())
    table = {int(index): base64.b64decode(piece) for piece, index in lines}
    tokenizer = load_tokenizer(folder)
    for index in range(end):
        expected = tokenizer.decode([index], skip_special_tokens=False)
        if table.get(index, b"").decode("utf-8", "replace") != expected:
            raise ArtifactError(f"{file}: token {index} is {table.get(index)!r}, the tokenizer has {expected!r}. Export again.")


def _open(folder: Path, graph: str, threads: int) -> Any:
    (file,) = folder.glob(f"*-{graph}*.onnx")  # its beginning tells the checkpoint, its ending the precision
    return ort.InferenceSession(str(file), session_options(threads), providers=PROVIDERS)


def open(path: Path, threads: int) -> SherpaRunner:
    """Open and verify an artifact folder."""
    return SherpaRunner(Artifact.open(path), threads)
