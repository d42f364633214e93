"""The stages of a Core ML artifact, as the interpreter of its programs computes them (on a Mac too: Core ML shows none)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from asr_core.artifact import Artifact
from runners import _mil
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
from runners.coreml import CoreMLRunner, Row

KINDS = {"add": ADD, "cast": CARRY, "reshape": CARRY, "squeeze": CARRY, "expand_dims": CARRY}


class Program(_mil.Program):
    """A program that records the stages at every run."""

    def __init__(self, package: Path, stages: list[str], recorder: Recorder) -> None:
        self._ops: list[Op] = []
        super().__init__(package)
        given = [*self.inputs, *(op.outputs[0] for op in self._ops if op.kind == "read_state")]
        stream = residual_stream(self._ops, given, len(stages) - 1, package.name)
        self._shown = dict(zip(stages, stream, strict=True))
        if "encoder_states" in self.outputs:
            self._shown[STATES] = "encoder_states"
        self.outputs += stream
        self._plan_release()
        self._recorder = recorder

    def predict(self, inputs: Mapping[str, Any], state: _mil.State | None = None) -> _mil.Values:
        """Run the program."""
        outputs = super().predict(inputs, state)
        for stage, name in self._shown.items():
            self._recorder.add(stage, outputs[name])
        return outputs

    def _compile(self, op: Any) -> _mil.Step:
        step = super()._compile(op)
        self._ops.append(Op(KINDS.get(op.op_type, op.op_type), _names(op.inputs.values()), [var.name for var in op.outputs]))
        return step


def _names(given: Any) -> list[str]:
    several = [item if isinstance(item, (list, tuple)) else [item] for item in given if item is not None]
    return [var.name for items in several for var in items]


class Runner(CoreMLRunner):
    """The runner over recording programs."""

    def __init__(self, artifact: Artifact, threads: int, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__(artifact, threads)

    def cross_of(self, state: list[Row]) -> Values:
        """Cross-attention K and V [H, F, E] by stage."""
        return {cross_stage(name): value[0].float().numpy() for name, value in state[0].cross.items()}

    def _open(self, package: Path, state_names: list[str], threads: int) -> Program:
        torch.set_num_threads(threads)
        stream = encoder_stream if package.stem == "encoder" else decoder_stream
        return Program(package, stream(self.dims), self._recorder)


def open(path: Path, threads: int) -> Stepped:
    """Open and verify an artifact folder."""
    recorder = Recorder()
    return Stepped(Runner(Artifact.open(path), threads, recorder), recorder)
