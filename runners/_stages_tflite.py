"""The stages of a TFLite artifact: LiteRT's interpreter keeps every tensor of its graphs.

It can do so only without the XNNPACK delegate, so the built-in kernels compute here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray

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
from runners.tflite import Arrays, Row, TFLiteRunner

KINDS = {
    schema.BuiltinOperator.ADD: ADD,
    schema.BuiltinOperator.CAST: CARRY,
    schema.BuiltinOperator.RESHAPE: CARRY,
}


class Graphs:
    """Of every signature: its subgraph's index, and the residual stream in it."""

    def __init__(self, file: Path) -> None:
        self._model = schema.Model.GetRootAsModel(file.read_bytes(), 0)
        found = [self._model.SignatureDefs(i) for i in range(self._model.SignatureDefsLength())]
        self.subgraphs = {signature.SignatureKey().decode(): signature.SubgraphIndex() for signature in found}
        self._name = file.name

    def stream(self, signature: str, additions: int) -> list[int]:
        """Tensor indices in the signature's subgraph."""
        graph = self._model.Subgraphs(self.subgraphs[signature])
        operators = (graph.Operators(i) for i in range(graph.OperatorsLength()))
        ops = [Op(self._kind(op), op.InputsAsNumpy().tolist(), op.OutputsAsNumpy().tolist()) for op in operators]
        return residual_stream(ops, graph.InputsAsNumpy().tolist(), additions, f"{self._name}, {signature}")

    def _kind(self, operator: Any) -> str:
        return KINDS.get(self._model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode(), "")


class Runner(TFLiteRunner):
    """The runner over an interpreter that keeps its tensors."""

    def __init__(self, artifact: Artifact, threads: int, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__(artifact, threads)
        self._graphs = Graphs(artifact.path / "model.tflite")

    def cross_of(self, state: list[Row]) -> Values:
        """Cross-attention K and V [H, F, E] by stage (K lie there as [H, E, F])."""
        return {
            cross_stage(name): value[0].swapaxes(1, 2) if name.startswith("cross_k_") else value[0]
            for name, value in state[0].cross.items()
        }

    def _open(self, model: Path, threads: int) -> Interpreter:
        interpreter = Interpreter(
            str(model),
            num_threads=threads,
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        interpreter.allocate_tensors()
        return interpreter

    def _encode_row(self, window: NDArray[np.float32]) -> Row:
        row = super()._encode_row(window)
        self._record("encode", encoder_stream(self.dims), self.dims.n_audio_ctx)
        return row

    def _call(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        outputs = super()._call(signature, inputs)
        if signature == "encode":
            self._recorder.add(STATES, outputs["encoder_states"])
        return outputs

    def _prefill_row(self, tokens: NDArray[np.int64], row: Row) -> Arrays:
        outputs = super()._prefill_row(tokens, row)
        self._record(self._prefill, decoder_stream(self.dims), len(tokens))
        return outputs

    def _decode_row(self, token: int, row: Row) -> Arrays:
        outputs = super()._decode_row(token, row)
        self._record("decode", decoder_stream(self.dims), 1)
        return outputs

    def _record(self, signature: str, stages: list[str], rows: int) -> None:
        """Keep the first rows of every stage: what pads a prefill comes after them."""
        subgraph = self._graphs.subgraphs[signature]
        for stage, index in zip(stages, self._graphs.stream(signature, len(stages) - 1), strict=True):
            value = self._interpreter.get_tensor(index, subgraph)
            self._recorder.add(stage, value.reshape(-1, value.shape[-1])[:rows])


def open(path: Path, threads: int) -> Stepped:
    """Open and verify an artifact folder."""
    recorder = Recorder()
    return Stepped(Runner(Artifact.open(path), threads, recorder), recorder)
