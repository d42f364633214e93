"""ONNX Runtime on the CPU: two sessions, the key/value cache in the host's hands."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from asr_core.artifact import Artifact
from asr_core.decode import Logits, Mel
from asr_core.errors import ArtifactError
from runners.base import StepRunner

PROVIDERS = ["CPUExecutionProvider"]
LOGITS_AT = "logits_at"  # the decoder's input of the new tokens whose logits are wanted
QUERIES, STATES = "alignment_queries", "encoder_states"  # outputs
ERRORS_ONLY = 3  # ONNX Runtime's log severity


@dataclass
class State:
    """Per-layer K and V by input name: cache rows [n_text_ctx, B, H, E], valid before ``position``, and cross [B, H, F, E].

    The cache's first axis is time, so that the rows seen so far are one piece of memory that the runtime reads in place.
    ``origin`` [B] tells which encoded window each row is.
    """

    position: int
    past: dict[str, NDArray[Any]]
    cross: dict[str, NDArray[Any]]
    origin: NDArray[np.int64]


@dataclass(frozen=True)
class Ports:
    """Names of the decoder's inputs, the cached ones of its self-attention and those of its cross-attention; the caches' type."""

    past: list[str]
    cross: list[str]
    cache_dtype: np.dtype[Any]

    @classmethod
    def read(cls, artifact: Artifact) -> Ports:
        """Those that the manifest has; raises :class:`ArtifactError` for another form of decoder."""
        inputs = {one.name: one.dtype for one in artifact.manifest.tensors if (one.graph, one.role) == ("decoder", "input")}
        if LOGITS_AT not in inputs:
            raise ArtifactError(f"{artifact.path} was made by an earlier version, whose decoder had other inputs. Export again.")
        past, cross = ([name for name in inputs if name.startswith(kind)] for kind in ("past_", "cross_"))
        return cls(past, cross, np.dtype(inputs[past[0]]))

    @staticmethod
    def new_of(name: str) -> str:
        """The output that has the new rows of a cache."""
        return name.replace("past_", "new_", 1)


class Steps(StepRunner):
    """What a step shows, by names of the decoder's outputs; subclasses run it."""

    def step(self, tokens: NDArray[np.int64], state: Any) -> Logits:
        """Run the decoder over the new tokens and add their K/V rows to the cache."""
        return self.step_at(tokens, state, range(tokens.shape[1]))

    def step_at(self, tokens: NDArray[np.int64], state: Any, wanted: Sequence[int]) -> Logits:
        """The same with the head on the wanted tokens alone."""
        return self._step(tokens, state, ["logits"], wanted)[0]

    def step_with_queries(self, tokens: NDArray[np.int64], state: Any) -> tuple[Logits, NDArray[np.float32]]:
        """The same with one output more."""
        logits, queries = self._step(tokens, state, ["logits", QUERIES], range(tokens.shape[1]))
        return logits, queries.astype(np.float32)

    @abstractmethod
    def _step(self, tokens: NDArray[np.int64], state: Any, outputs: list[str], wanted: Sequence[int]) -> list[NDArray[Any]]:
        """The named outputs of a step, logits of the wanted tokens."""


class OnnxRunner(Steps):
    """The encoder's and the decoder step's sessions over one artifact."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.folder = artifact.path
        self.dims = artifact.manifest.dims
        self.tokens = artifact.manifest.tokens
        self.alignment_heads = artifact.manifest.alignment_heads
        self.short_windows = artifact.manifest.short_windows
        self._encoder = self._open(artifact.path / "encoder.onnx", threads)
        self._decoder = self._open(artifact.path / "decoder.onnx", threads)
        self._ports = Ports.read(artifact)
        self._new = [self._ports.new_of(name) for name in self._ports.past]

    def encode(self, mel: Mel) -> State:
        """Run the encoder and keep the cross-attention K/V; the cache starts empty."""
        shape = (len(mel), self.dims.decoder_heads, mel.shape[2] // 2, self.dims.head_dim)
        cross = {name: np.empty(shape, self._ports.cache_dtype) for name in self._ports.cross}
        # Window by window: their activations then stay in the processor's cache, and in 8 bits each has its own scale.
        for i in range(len(mel)):
            self._encode_into({name: rows[i : i + 1] for name, rows in cross.items()}, mel[i : i + 1])
        return self._begin(cross, len(mel))

    def cross_keys(self, state: State, layer: int) -> NDArray[np.float32]:
        """As the encoder made them."""
        return state.cross[f"cross_k_{layer}"].astype(np.float32)

    def _step(self, tokens: NDArray[np.int64], state: State, outputs: list[str], wanted: Sequence[int]) -> list[NDArray[Any]]:
        start, end = state.position, state.position + tokens.shape[1]
        past = {name: rows[:start] for name, rows in state.past.items()}
        given = {"tokens": tokens, LOGITS_AT: np.array(wanted, np.int64)}
        made = self._decoder.run([*outputs, *self._new], {**given, **past, **state.cross})
        for rows, added in zip(state.past.values(), made[len(outputs) :], strict=True):
            rows[start:end] = added
        state.position = end
        shown: list[NDArray[Any]] = made[: len(outputs)]
        return shown

    def reorder(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather batch rows of the cache and, where rows change their window, of the cross-attention K/V."""
        past = {name: np.empty((len(old), len(rows), *old.shape[2:]), old.dtype) for name, old in state.past.items()}
        for name, old in state.past.items():
            past[name][: state.position] = old[: state.position, rows]
        origin = state.origin[rows]
        same = np.array_equal(origin, state.origin)
        cross = state.cross if same else {name: old[rows] for name, old in state.cross.items()}
        return State(state.position, past, cross, origin)

    def restart(self, state: State, rows: NDArray[np.int64]) -> State:
        """Gather the windows' cross-attention K/V; the cache starts empty."""
        same = np.array_equal(rows, state.origin)
        return self._begin(state.cross if same else {name: old[rows] for name, old in state.cross.items()}, len(rows))

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        states: NDArray[np.float32] = self._encoder.run([STATES], {"mel": np.ascontiguousarray(mel)})[0]
        return states

    def _encode_into(self, cross: dict[str, NDArray[Any]], mel: Mel) -> None:
        binding = self._encoder.io_binding()
        binding.bind_cpu_input("mel", np.ascontiguousarray(mel))
        for name, rows in cross.items():
            binding.bind_output(name, "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
        self._encoder.run_with_iobinding(binding)

    def _begin(self, cross: dict[str, NDArray[Any]], batch: int) -> State:
        shape = (self.dims.n_text_ctx, batch, self.dims.decoder_heads, self.dims.head_dim)
        past = {name: np.empty(shape, self._ports.cache_dtype) for name in self._ports.past}
        return State(0, past, cross, np.arange(batch))

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
