"""Stages of a Whisper model, and where they lie in a shipped graph whose names tell nothing.

A pre-norm transformer has one residual stream, which every block adds to. So the outputs of its blocks are the longest chain of
additions in which each takes the sum before it, however norms, products and biases are written, fused or quantised, and also
where one of them is missing. Names, and values that would have to be right, are never asked.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from asr_core import decode, registry
from asr_core.decode import Logits, Mel
from asr_core.dims import Dims
from asr_core.errors import ArtifactError
from runners.base import Runner, open_runner

Array = NDArray[np.float32]
Values = dict[str, Array]

MEL, STATES, LOGITS, CHOICE = "mel", "encoder.states", "logits", "choice"
ADD, CARRY = "add", "carry"  # kinds of operations: elementwise sums, and those whose result is their first input


def encoder_stream(dims: Dims) -> list[str]:
    """The encoder's residual stream, [F, D] each: after the convolutions, then after every block."""
    return ["encoder.stem", *(f"encoder.{i}.{block}" for i in range(dims.encoder_layers) for block in ("attention", "mlp"))]


def decoder_stream(dims: Dims) -> list[str]:
    """The decoder's residual stream, [T, D] each: the embedded tokens, then after every block."""
    return ["decoder.embedding", *(f"decoder.{i}.{b}" for i in range(dims.decoder_layers) for b in ("attention", "cross", "mlp"))]


def cross_names(dims: Dims) -> list[str]:
    """Keys and values of every layer's cross-attention, [H, F, E] each."""
    return [f"cross.{i}.{kind}" for i in range(dims.decoder_layers) for kind in ("keys", "values")]


def cross_stage(name: str) -> str:
    """The stage of a tensor of the exporters' graphs: ``cross_k_0`` → ``cross.0.keys``."""
    _, kind, layer = name.split("_")
    return f"cross.{layer}.{'keys' if kind == 'k' else 'values'}"


def order(dims: Dims) -> list[str]:
    """All stages of the network, as a signal passes them."""
    return [*encoder_stream(dims), STATES, *cross_names(dims), *decoder_stream(dims), LOGITS]


@dataclass(frozen=True)
class Op:
    """One operation of a graph: what it reads and makes, by names of any hashable kind."""

    kind: str
    inputs: Sequence[Any]
    outputs: Sequence[Any]


def residual_stream(ops: Iterable[Op], given: Iterable[Any], additions: int, what: str) -> list[Any]:
    """Names of the residual stream before, between and after its ``additions``; ``ops`` come in the order of execution.

    ``given`` are the graph's inputs (and what its states hold): what does not depend on one is a constant, so that adding it is
    a bias and no block. Raises :class:`ArtifactError`, naming the graph ``what``, where the graph has fewer additions.
    """
    computed = set(given)
    carried: dict[Any, Any] = {}
    chains: dict[Any, list[Any]] = {}
    for op in ops:
        inputs = [carried.get(name, name) for name in op.inputs if name in computed]
        if not inputs:
            continue
        computed.update(op.outputs)
        if op.kind == CARRY:
            carried.update(dict.fromkeys(op.outputs, inputs[0]))
        elif op.kind == ADD and len(inputs) == 2:  # noqa: PLR2004 - a sum of two
            longest = max((chains.get(name, [name]) for name in inputs), key=len)
            chains[op.outputs[0]] = [*longest, op.outputs[0]]
    stream = max(chains.values(), key=len, default=[])
    if len(stream) <= additions:
        raise ArtifactError(
            f"{what}: the model adds to its residual stream {additions} times, this graph {max(0, len(stream) - 1)} times."
        )
    return stream[-additions - 1 :]


@dataclass
class Recorder:
    """Keeps what passes the stages; a stage that is passed at several steps gets one row after the other."""

    pieces: dict[str, list[Array]] = field(default_factory=dict)

    def add(self, stage: str, value: Any) -> None:
        """Keep float [1, rows, D] or [rows, D] of one pass."""
        array = np.array(value, np.float32)  # a copy: runtimes reuse their memory
        self.pieces.setdefault(stage, []).append(array.reshape(-1, array.shape[-1]))

    def add_all(self, stages: Iterable[str], values: Iterable[Any]) -> None:
        """Keep a value for each of several stages."""
        for stage, value in zip(stages, values, strict=True):
            self.add(stage, value)

    def values(self) -> Values:
        """What was kept: stage → float32 [rows, D]."""
        return {stage: np.concatenate(pieces) for stage, pieces in self.pieces.items()}


class Staged(Protocol):
    """A runner that shows what passes its stages. ``hidden`` says in a sentence which stages its runtime does not show."""

    runner: Runner
    hidden: str

    def replay(self, mel: Mel, tokens: list[int]) -> Values:
        """One window [1, n_mels, 3000] and the tokens that are fed, prompt included → values by stage, as :func:`order` has them.

        ``encoder.*`` [F, D], ``cross.*`` [H, F, E], ``decoder.*`` [T, D], ``logits`` [T, vocab]; the stages that it shows.
        """


@dataclass
class Closed:
    """A runtime of which only the interface is known: encoder states and, where it scores, logits."""

    runner: Runner
    hidden: str = "this runtime shows only the encoder's states and the logits: a fault between them is named as their stage"

    def replay(self, mel: Mel, tokens: list[int]) -> Values:
        """Encoder states and logits."""
        logits = self.runner.score(mel, tokens)
        shown = {STATES: self.runner.encoder_states(mel)[0]}
        return shown if logits is None else shown | {LOGITS: logits}


class Stepped:
    """What the staged step runners share: replaying is decoding with given tokens; a subclass records on the way."""

    hidden = ""

    def __init__(self, runner: Any, recorder: Recorder) -> None:
        self.runner = runner
        self._recorder = recorder

    def replay(self, mel: Mel, tokens: list[int]) -> Values:
        """Encode, feed the prompt in one pass and each later token in its own."""
        self._recorder.pieces.clear()
        state = self.runner.encode(mel)
        logits: Logits = decode.teacher_forced(self.runner, state, tokens)
        cross: Values = self.runner.cross_of(state)
        return self._recorder.values() | cross | {LOGITS: logits}


def open_staged(target: str, path: Path, threads: int) -> Staged:
    """Open an artifact (or, for ``pytorch``, a checkpoint) so that it shows its stages, as far as its runtime can."""
    module = f"runners._stages_{target.replace(registry.LAYOUT, '_')}"
    if importlib.util.find_spec(module) is None:
        return Closed(open_runner(target, path, threads))
    return cast("Staged", importlib.import_module(module).open(path, threads))
