"""LiteRT's interpreter on the CPU, with XNNPACK: one file, the key/value cache in the host's hands.

Its graphs have fixed shapes and batch 1, so a batch is a loop over rows that each have a cache of their own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from asr_core.artifact import Artifact
from asr_core.decode import Logits, Mel
from runners.base import StepRunner

Arrays = dict[str, NDArray[np.float32]]
# From how many new tokens on one prefill is faster than single steps: it costs about two of them.
PREFILL_PAYS = 3
STDERR = 2  # file descriptor
QUERIES = "alignment_queries"
# Outputs of a step that are not rows of the cache, and their axis of tokens.
TOKEN_AXES = {"logits": 1, QUERIES: 2}


@dataclass
class Row:
    """One window, by input name: cross K/V and a cache whose entries are valid before ``position``.

    Keys are [1, H, E, rows], values [1, H, rows, E].
    """

    position: int
    past: Arrays
    cross: Arrays


class TFLiteRunner(StepRunner):
    """The interpreter over one artifact.

    The decode graph reads K/V where they lie, in its own input tensors. Those hold one row's, the resident's, and are filled
    only when another row's turn comes; with a single window that is once.
    """

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.folder = artifact.path
        self.dims = artifact.manifest.dims
        self.tokens = artifact.manifest.tokens
        self.alignment_heads = artifact.manifest.alignment_heads
        self._interpreter = self._open(artifact.path / "model.tflite", threads)
        signature = self._interpreter.get_signature_runner("decode")
        self._inputs = {name: details["index"] for name, details in signature.get_input_details().items()}
        self._outputs = {name: details["index"] for name, details in signature.get_output_details().items()}
        inputs = [spec for spec in artifact.manifest.tensors if spec.role == "input"]
        past = [spec for spec in inputs if spec.graph == "decode" and spec.name.startswith("past_")]
        self._past = {spec.name: [int(size) for size in spec.shape] for spec in past}
        self._prefill, self._prefill_tokens = next(
            (spec.graph, int(spec.shape[1])) for spec in inputs if spec.graph.startswith("prefill_") and spec.name == "tokens"
        )
        self._resident: Row | None = None

    def encode(self, mel: Mel) -> list[Row]:
        """Run the encoder and keep the cross-attention K/V; the caches start empty."""
        return [self._encode_row(window) for window in mel]

    def step(self, tokens: NDArray[np.int64], state: list[Row]) -> Logits:
        """Run every row's new tokens through prefill and decode and add their K/V to its cache."""
        return np.concatenate([self._step_row(new, row)["logits"] for new, row in zip(tokens, state, strict=True)])

    def step_with_queries(self, tokens: NDArray[np.int64], state: list[Row]) -> tuple[Logits, NDArray[np.float32]]:
        """The same with one output more."""
        made = [self._step_row(new, row) for new, row in zip(tokens, state, strict=True)]
        logits, queries = (np.concatenate([outputs[name] for outputs in made]) for name in ("logits", QUERIES))
        return logits, queries

    def cross_keys(self, state: list[Row], layer: int) -> NDArray[np.float32]:
        """As the encoder made them, which is [1, H, E, F]."""
        return np.concatenate([row.cross[f"cross_k_{layer}"].swapaxes(2, 3) for row in state])

    def reorder(self, state: list[Row], rows: NDArray[np.int64]) -> list[Row]:
        """The chosen rows; one that is chosen again gets a copy of the cache, cross-attention K/V are shared."""
        chosen: list[Row] = []
        for row in (state[index] for index in rows):
            taken = any(row is other for other in chosen)
            chosen.append(Row(row.position, {name: k.copy() for name, k in row.past.items()}, row.cross) if taken else row)
        return chosen

    def restart(self, state: list[Row], rows: NDArray[np.int64]) -> list[Row]:
        """The chosen windows, which share their cross-attention K/V; the caches start empty."""
        return [self._begin(state[row].cross) for row in rows]

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        return np.concatenate([self._call("encode", {"mel": window[None]})["encoder_states"] for window in mel])

    def _open(self, model: Path, threads: int) -> Interpreter:
        return _interpreter(model, threads)

    def _encode_row(self, window: NDArray[np.float32]) -> Row:
        cross = self._call("encode", {"mel": window[None]})
        del cross["encoder_states"]
        return self._begin(cross)

    def _begin(self, cross: Arrays) -> Row:
        # Zeros, not whatever the memory holds: a mask hides numbers, but not a NaN.
        return Row(0, {name: np.zeros(shape, np.float32) for name, shape in self._past.items()}, cross)

    def _step_row(self, tokens: NDArray[np.int64], row: Row) -> Arrays:
        """Logits [1, T, vocab] and queries [1, heads, T, E]."""
        pieces = []
        while len(tokens) >= PREFILL_PAYS:
            pieces.append(self._prefill_row(tokens[: self._prefill_tokens], row))
            tokens = tokens[self._prefill_tokens :]
        pieces += [self._decode_row(token, row) for token in tokens.tolist()]
        if len(pieces) == 1:
            return pieces[0]
        return {name: np.concatenate([piece[name] for piece in pieces], axis=axis) for name, axis in TOKEN_AXES.items()}

    def _prefill_row(self, tokens: NDArray[np.int64], row: Row) -> Arrays:
        """Several tokens at once; what pads them comes after them, so that they do not see it."""
        count = len(tokens)
        padded = np.zeros((1, self._prefill_tokens), np.int32)
        padded[0, :count] = tokens
        position = np.array([row.position], np.int32)
        outputs = self._call(self._prefill, {"tokens": padded, "position": position, **row.past, **row.cross})
        self._append(outputs, count, row)
        return {"logits": outputs["logits"][:, :count], QUERIES: outputs[QUERIES][:, :, :count]}

    def _decode_row(self, token: int, row: Row) -> Arrays:
        self._make_resident(row)
        self._interpreter.set_tensor(self._inputs["tokens"], np.array([[token]], np.int32))
        self._interpreter.set_tensor(self._inputs["position"], np.array([row.position], np.int32))
        self._interpreter.invoke()
        outputs: Arrays = {name: self._interpreter.get_tensor(index) for name, index in self._outputs.items()}
        self._append(outputs, 1, row)
        return outputs

    def _append(self, outputs: Arrays, count: int, row: Row) -> None:
        """Add the first ``count`` new rows to the cache, and to its copy in the interpreter if that is there."""
        start, end = row.position, row.position + count
        for name, held in row.past.items():
            new = outputs[name.replace("past_", "new_", 1)]
            for rows in (held, self._tensor(name)) if row is self._resident else (held,):
                if name.startswith("past_k_"):
                    rows[..., start:end] = new[..., :count]
                else:
                    rows[..., start:end, :] = new[..., :count, :]
        row.position = end

    def _make_resident(self, row: Row) -> None:
        if row is not self._resident:
            same_window = self._resident is not None and self._resident.cross is row.cross
            for name, array in (row.past if same_window else row.past | row.cross).items():
                self._interpreter.set_tensor(self._inputs[name], array)
            self._resident = row

    def _tensor(self, name: str) -> NDArray[np.float32]:
        """An input of the decode graph, in place. The interpreter refuses to run while such an array is alive."""
        array: NDArray[np.float32] = self._interpreter.tensor(self._inputs[name])()
        return array

    def _call(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        # Not kept: the interpreter takes a living signature runner for such an array, too.
        outputs: Arrays = self._interpreter.get_signature_runner(signature)(**inputs)
        return outputs


def _interpreter(model: Path, threads: int) -> Interpreter:
    with without_greeting():
        interpreter = Interpreter(str(model), num_threads=threads)
        interpreter.allocate_tensors()
    return interpreter


@contextlib.contextmanager
def without_greeting() -> Iterator[None]:
    """The runtime writes to the standard error, past Python's, that it made a delegate; its errors come as exceptions."""
    kept = os.dup(STDERR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    try:
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(nowhere)
        os.close(kept)


def open(path: Path, threads: int) -> TFLiteRunner:
    """Open and verify an artifact folder."""
    return TFLiteRunner(Artifact.open(path), threads)
