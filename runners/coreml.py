"""Core ML programs with the cache in the host's or in the runtime's hands, by what the artifact's decoder is.

On macOS the programs run on Core ML itself, on the units that the environment variable ``ASR_EXPORT_COMPUTE_UNITS`` names.
Elsewhere the interpreter in :mod:`runners._mil` runs them: the numbers stand for the artifact, the time for nothing.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asr_core import registry
from asr_core.artifact import Artifact
from asr_core.decode import Logits, Mel
from asr_core.errors import UnavailableError, UsageError
from runners.base import StepRunner

COMPUTE_UNITS = "ASR_EXPORT_COMPUTE_UNITS"
UNITS = ("all", "cpu_and_ne", "cpu_only")
MACOS = sys.platform == "darwin"
# The first macOS that runs a program, and one with states or of a precision with weights that came later.
FIRST_MACOS, NEWER_MACOS = 13, 15
NEWER = ("int4",)
# What coremltools imports wherever it finds it, and what nothing here needs.
NEIGHBOURS = ("executorch", "sklearn", "tensorflow", "torchao", "torchvision", "transformers", "xgboost")


class Model(Protocol):
    """A program that can run: Core ML's or the interpreted one."""

    def adopt(self, name: str, array: Any) -> Any:
        """An array, or another program's output, in the form that costs nothing to pass again and again to an input."""

    def predict(self, inputs: Mapping[str, Any], state: Any = None) -> Mapping[str, Any]:
        """Run the program; ``state`` is changed in place."""

    def make_state(self) -> Any:
        """A fresh state, filled with zeros."""

    def copy_state(self, state: Any) -> Any:
        """The state once more, to go on from separately."""


class Native:
    """A program on Core ML."""

    def __init__(self, package: Path, state_names: list[str]) -> None:
        ct = registry.import_alone("coremltools", without=NEIGHBOURS)
        self._model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit[_units().upper()])
        self._state_names = state_names

    def adopt(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """As float32: coremltools takes float16 for inputs so, and would convert it at every step."""
        return np.asarray(array, np.float32)

    def predict(self, inputs: Mapping[str, Any], state: Any = None) -> Mapping[str, Any]:
        """Run the program."""
        outputs: Mapping[str, Any] = self._model.predict(dict(inputs), state)
        return outputs

    def make_state(self) -> Any:
        """Core ML fills new states with zeros."""
        return self._model.make_state()

    def copy_state(self, state: Any) -> Any:
        """Read every state and write it into a new one."""
        copy = self.make_state()
        for name in self._state_names:
            copy.write_state(name, state.read_state(name))
        return copy


@dataclass
class Row:
    """One window: cross-attention K/V, and the cache [1, H, n_text_ctx, E] as inputs by name or as the runtime's state."""

    position: int
    cross: dict[str, Any]
    past: dict[str, Any]
    memory: Any


class CoreMLRunner(StepRunner):
    """Encoder and decoder step of one artifact; the programs take one window and one token at a time."""

    timed = MACOS
    timing_needs = f"macOS {FIRST_MACOS}+"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.folder = artifact.path
        self.dims = artifact.manifest.dims
        self.tokens = artifact.manifest.tokens
        self.alignment_heads = artifact.manifest.alignment_heads
        inputs = [spec for spec in artifact.manifest.tensors if spec.graph == "decoder" and spec.role == "input"]
        self._past = [spec for spec in inputs if spec.name.startswith("past_")]
        self._cross = [spec.name for spec in inputs if spec.name.startswith("cross_")]
        states = [] if self._past else [name.replace("cross_", "past_", 1) for name in self._cross]
        check_system(newer=bool(states) or artifact.manifest.precision in NEWER)
        self._encoder = self._open(artifact.path / "encoder.mlpackage", [], threads)
        self._decoder = self._open(artifact.path / "decoder.mlpackage", states, threads)

    def encode(self, mel: Mel) -> list[Row]:
        """Run the encoder on every window; the caches start empty."""
        return [self._begin(window[None]) for window in mel]

    def step(self, tokens: NDArray[np.int64], state: list[Row]) -> Logits:
        """Feed every row's new tokens, one at a time."""
        logits = np.empty((*tokens.shape, self.dims.vocab), np.float32)
        for own, row, out in zip(tokens.astype(np.int32), state, logits, strict=True):
            for i, token in enumerate(own):
                out[i] = _float32(self._feed(token, row)["logits"]).reshape(-1)
        return logits

    def step_with_queries(self, tokens: NDArray[np.int64], state: list[Row]) -> tuple[Logits, NDArray[np.float32]]:
        """The same with one output more."""
        fed = [[self._feed(token, row) for token in own] for own, row in zip(tokens.astype(np.int32), state, strict=True)]
        logits, queries = (
            np.stack([np.concatenate([_float32(made[name])[0] for made in row], axis) for row in fed])
            for name, axis in (("logits", 0), ("alignment_queries", 1))
        )
        return logits, queries

    def cross_keys(self, state: list[Row], layer: int) -> NDArray[np.float32]:
        """As the encoder made them."""
        return np.concatenate([_float32(row.cross[f"cross_k_{layer}"]) for row in state])

    def reorder(self, state: list[Row], rows: NDArray[np.int64]) -> list[Row]:
        """The chosen rows; one that is chosen again gets a copy of the cache, cross-attention K/V are shared."""
        chosen: list[Row] = []
        for row in (state[index] for index in rows):
            chosen.append(self._copy(row) if any(row is other for other in chosen) else row)
        return chosen

    def restart(self, state: list[Row], rows: NDArray[np.int64]) -> list[Row]:
        """The chosen windows, which share their cross-attention K/V; the caches start empty."""
        return [self._empty(state[row].cross) for row in rows]

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        return np.concatenate([_float32(self._encode(window[None])["encoder_states"]) for window in mel])

    def _open(self, package: Path, state_names: list[str], threads: int) -> Model:
        return open_model(package, state_names, threads)

    def _encode(self, window: Mel) -> Mapping[str, Any]:
        return self._encoder.predict({"mel": np.ascontiguousarray(window)})

    def _begin(self, window: Mel) -> Row:
        encoded = self._encode(window)
        return self._empty({name: self._decoder.adopt(name, encoded[name]) for name in self._cross})

    def _empty(self, cross: dict[str, Any]) -> Row:
        empty = {spec.name: np.zeros(tuple(map(int, spec.shape)), spec.dtype) for spec in self._past}
        past = {name: self._decoder.adopt(name, rows) for name, rows in empty.items()}
        memory = None if past else self._decoder.make_state()
        return Row(0, cross, past, memory)

    def _feed(self, token: np.int32, row: Row) -> Mapping[str, Any]:
        """The decoder's outputs after one more token."""
        here = {"token": np.array([[token]], np.int32), "position": np.array([row.position], np.int32)}
        made = self._decoder.predict({**here, **row.past, **row.cross}, row.memory)
        for name, cache in row.past.items():
            cache[:, :, row.position] = made[name.replace("past_", "new_", 1)][:, :, 0]
        row.position += 1
        return made

    def _copy(self, row: Row) -> Row:
        memory = None if row.past else self._decoder.copy_state(row.memory)
        return Row(row.position, row.cross, deepcopy(row.past), memory)


def _float32(array: Any) -> NDArray[np.float32]:
    return np.asarray(array, np.float32)


def open_model(package: Path, state_names: list[str], threads: int) -> Model:
    """A program on Core ML, or elsewhere in the interpreter."""
    if MACOS:
        return Native(package, state_names)
    import torch

    from runners import _mil

    torch.set_num_threads(threads)
    return _mil.Program(package)


def check_system(*, newer: bool) -> None:
    """Raise :class:`UnavailableError` where neither Core ML nor the interpreter can run the artifact."""
    if not MACOS:
        registry.require("coreml", "pytorch")
        return
    needed = NEWER_MACOS if newer else FIRST_MACOS
    version = platform.mac_ver()[0]
    if int(version.partition(".")[0]) < needed:
        raise UnavailableError(f"this artifact needs macOS {needed}+; this is {version}.")


def _units() -> str:
    units = os.environ.get(COMPUTE_UNITS, UNITS[0])
    if units not in UNITS:
        raise UsageError(f"{COMPUTE_UNITS} is {units!r}; it can be {', '.join(UNITS)}.")
    return units


def open(path: Path, threads: int) -> CoreMLRunner:
    """Open and verify an artifact folder."""
    return CoreMLRunner(Artifact.open(path), threads)
