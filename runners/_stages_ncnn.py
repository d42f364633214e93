"""The stages of an ncnn artifact: blobs of its own networks, asked for by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ncnn
import numpy as np

from asr_core.artifact import Artifact
from runners._stages import (
    ADD,
    CARRY,
    STATES,
    Op,
    Recorder,
    Stepped,
    Values,
    cross_stage,
    decoder_stream,
    encoder_stream,
    residual_stream,
)
from runners.ncnn import NcnnRunner, Row

KINDS = {"BinaryOp": ADD, "Split": CARRY, "Reshape": CARRY, "Noop": CARRY}
ADDITION = "0=0"  # of the parameters of a BinaryOp, and their default


class Network:
    """A network whose extractors record the stages."""

    def __init__(self, network: ncnn.Net, param: Path, stages: list[str], recorder: Recorder) -> None:
        self._network = network
        # Else what was used is gone before it can be asked for.
        network.opt.lightmode = False
        layers = [line.split() for line in param.read_text(encoding="utf-8").splitlines()[2:]]
        given = [layer[4] for layer in layers if layer[0] == "Input"]
        self._blobs = dict(
            zip(stages, residual_stream(map(_operation, layers), given, len(stages) - 1, param.name), strict=True)
        ) | ({STATES: "encoder_states"} if param.stem == "encoder" else {})
        self._recorder = recorder

    def create_extractor(self) -> Extractor:
        """One computation."""
        return Extractor(self._network.create_extractor(), self._blobs, self._recorder)


class Extractor:
    """Records the stages before the first of the outputs is given."""

    def __init__(self, extractor: Any, blobs: dict[str, str], recorder: Recorder) -> None:
        self._extractor = extractor
        self._waiting = dict(blobs)
        self._recorder = recorder

    def input(self, name: str, value: ncnn.Mat) -> None:
        """Set an input."""
        self._extractor.input(name, value)

    def extract(self, name: str) -> tuple[int, ncnn.Mat]:
        """An error code and the blob."""
        for stage, blob in self._waiting.items():
            self._recorder.add(stage, np.array(self._extractor.extract(blob)[1]))
        self._waiting = {}
        result: tuple[int, ncnn.Mat] = self._extractor.extract(name)
        return result


def _operation(layer: list[str]) -> Op:
    """A layer of a .param file, in words: type, name, two counts, blobs, parameters."""
    count_in, count_out = int(layer[2]), int(layer[3])
    inputs, outputs, parameters = layer[4 : 4 + count_in], layer[4 + count_in :][:count_out], layer[4 + count_in + count_out :]
    sums = not any(p.startswith("0=") and p != ADDITION for p in parameters)
    kind = KINDS.get(layer[0], "")
    return Op(kind if kind != ADD or sums else "", inputs, outputs)


class Runner(NcnnRunner):
    """The runner over recording networks."""

    def __init__(self, artifact: Artifact, threads: int, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__(artifact, threads)

    def cross_of(self, state: list[Row]) -> Values:
        """Cross-attention K and V [H, F, E] by stage."""
        return {cross_stage(name): np.array(value, np.float32) for name, value in state[0].cross.items()}

    def _open(self, folder: Path, name: str, threads: int) -> Network:
        stream = encoder_stream if name == "encoder" else decoder_stream
        return Network(super()._open(folder, name, threads), folder / f"{name}.param", stream(self.dims), self._recorder)


def open(path: Path, threads: int) -> Stepped:
    """Open and verify an artifact folder."""
    recorder = Recorder()
    return Stepped(Runner(Artifact.open(path), threads, recorder), recorder)
