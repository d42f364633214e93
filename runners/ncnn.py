"""ncnn on the CPU: two networks, the key/value cache in tensors that go from one step into the next.

ncnn has no batch axis, so a batch is a loop over rows that each have a cache of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
from numpy.typing import NDArray

from asr_core.artifact import Artifact, Manifest
from asr_core.decode import Logits, Mel
from runners.base import StepRunner

Mats = dict[str, ncnn.Mat]
STORED_DTYPES = {"fp32": np.float32, "fp16": np.float16}
MASKED = -1e4
# Whatever the processor offers, compute in float32: what was compared with PyTorch is what runs.
NARROW_OPTIONS = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")


@dataclass
class Row:
    """One window, by input name: cross K/V [H, F, E] and the past [H, 1 + position, E], whose first row is no token's.

    No network ever writes into one of these tensors, so rows may share them.
    """

    position: int
    past: Mats
    cross: Mats


class NcnnRunner(StepRunner):
    """The encoder's and the decoder step's networks over one artifact."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        manifest = artifact.manifest
        self.folder = artifact.path
        self.dims = manifest.dims
        self.tokens = manifest.tokens
        self.alignment_heads = manifest.alignment_heads
        self._encoder = self._open(artifact.path, "encoder", threads)
        self._decoder = self._open(artifact.path, "decoder", threads)
        self._embedding = _embedding(artifact.path / "decoder.bin", manifest)
        self._positions = np.load(artifact.path / "positions.npy")
        inputs = [spec.name for spec in manifest.tensors if (spec.graph, spec.role) == ("decoder", "input")]
        self._cross = [name for name in inputs if name.startswith("cross_")]
        self._past = [name for name in inputs if name.startswith("past_")]

    def encode(self, mel: Mel) -> list[Row]:
        """Run the encoder and keep the cross-attention K/V; the caches start empty."""
        past = self._nothing()
        return [Row(0, past, _run(self._encoder, {"mel": _mat(window)}, self._cross)) for window in mel]

    def step(self, tokens: NDArray[np.int64], state: list[Row]) -> Logits:
        """Run the decoder over every row's new tokens, all of them at once."""
        return np.stack([self._step_row(new, row, ["logits"])[0] for new, row in zip(tokens, state, strict=True)])

    def step_with_queries(self, tokens: NDArray[np.int64], state: list[Row]) -> tuple[Logits, NDArray[np.float32]]:
        """The same with one output more."""
        made = [self._step_row(new, row, ["logits", "alignment_queries"]) for new, row in zip(tokens, state, strict=True)]
        logits, queries = (np.stack(rows) for rows in zip(*made, strict=True))
        return logits, queries

    def cross_keys(self, state: list[Row], layer: int) -> NDArray[np.float32]:
        """As the encoder made them."""
        return np.stack([np.array(row.cross[f"cross_k_{layer}"]) for row in state])

    def reorder(self, state: list[Row], rows: NDArray[np.int64]) -> list[Row]:
        """The chosen rows; they share their tensors."""
        return [Row(row.position, row.past, row.cross) for row in (state[index] for index in rows)]

    def restart(self, state: list[Row], rows: NDArray[np.int64]) -> list[Row]:
        """The chosen windows, which share their cross-attention K/V; the caches start empty."""
        past = self._nothing()
        return [Row(0, past, state[row].cross) for row in rows]

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        name = "encoder_states"
        return np.stack([np.array(_run(self._encoder, {"mel": _mat(window)}, [name])[name]) for window in mel])

    def _nothing(self) -> Mats:
        """A past of no tokens."""
        nothing = _mat(np.zeros((self.dims.decoder_heads, 1, self.dims.head_dim), np.float32))
        return dict.fromkeys(self._past, nothing)

    def _open(self, folder: Path, name: str, threads: int) -> Any:
        return _network(folder, name, threads)

    def _step_row(self, tokens: NDArray[np.int64], row: Row, wanted: list[str]) -> list[NDArray[np.float32]]:
        """Logits [T, vocab], queries [heads, T, E]."""
        end = row.position + len(tokens)
        embedded = self._embedding[tokens].astype(np.float32) + self._positions[row.position : end]
        inputs = {"embedded": _mat(embedded), "mask": _mat(_mask(row.position, end)), **row.past, **row.cross}
        outputs = _run(self._decoder, inputs, [*wanted, *(name.replace("past_", "present_", 1) for name in self._past)])
        row.past = {name: outputs[name.replace("past_", "present_", 1)] for name in self._past}
        row.position = end
        shapes = {"logits": (len(tokens), self.dims.vocab), "alignment_queries": (-1, len(tokens), self.dims.head_dim)}
        return [np.array(outputs[name]).reshape(shapes[name]) for name in wanted]


def _mask(start: int, end: int) -> NDArray[np.float32]:
    """Float [1, T, 1 + end]: tokens see neither the row that is no token's nor the tokens after them."""
    mask = np.triu(np.full((end - start, 1 + end), MASKED, np.float32), 2 + start)
    mask[:, 0] = MASKED
    return mask[None]


def _mat(array: NDArray[np.float32]) -> ncnn.Mat:
    """A tensor with memory of its own.

    One made of an array borrows its memory without keeping it alive, and a layer that works in place crashes on it.
    """
    array = np.ascontiguousarray(array)
    return ncnn.Mat(array).clone()


def _run(network: ncnn.Net, inputs: Mats, outputs: list[str]) -> Mats:
    """Compute the named outputs; raises :class:`RuntimeError` where ncnn answers with an error code."""
    extractor = network.create_extractor()
    for name, value in inputs.items():
        extractor.input(name, value)
    results = {}
    for name in outputs:
        code, results[name] = extractor.extract(name)
        if code:
            raise RuntimeError(f"ncnn could not compute {name} (code {code}).")
    return results


def _network(folder: Path, name: str, threads: int) -> ncnn.Net:
    network = ncnn.Net()
    network.opt.num_threads = threads
    for option in NARROW_OPTIONS:
        setattr(network.opt, option, False)
    for load, file in ((network.load_param, f"{name}.param"), (network.load_model, f"{name}.bin")):
        if load(str(folder / file)):
            raise RuntimeError(f"ncnn could not load {folder / file}.")
    return network


def _embedding(file: Path, manifest: Manifest) -> NDArray[Any]:
    """The embedding [vocab, D] where it lies: the decoder's file ends with it, as the head's matrix."""
    dtype = np.dtype(STORED_DTYPES[manifest.precision])
    shape = (manifest.dims.vocab, manifest.dims.d_model)
    return np.memmap(file, dtype, "r", file.stat().st_size - shape[0] * shape[1] * dtype.itemsize, shape)


def open(path: Path, threads: int) -> NcnnRunner:
    """Open and verify an artifact folder."""
    return NcnnRunner(Artifact.open(path), threads)
