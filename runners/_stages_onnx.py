"""The stages of an ONNX artifact: its own graphs in memory, with the residual stream as further outputs.

ONNX Runtime does not fuse over an output, so kernels may differ from the shipped session's in the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

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
from runners.onnx import PROVIDERS, OnnxRunner, State, session_options

FOLDER = "session.model_external_initializers_file_folder_path"
KINDS = {"Add": ADD, "Cast": CARRY, "Identity": CARRY, "Reshape": CARRY}


class Session:
    """A session that records the stages at every run."""

    def __init__(self, model: Path, threads: int, stages: list[str], recorder: Recorder) -> None:
        proto = onnx.load(str(model), load_external_data=False)
        ops = [Op(KINDS.get(node.op_type, node.op_type), list(node.input), list(node.output)) for node in proto.graph.node]
        stream = residual_stream(ops, [value.name for value in proto.graph.input], len(stages) - 1, model.name)
        outputs = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in stream)
        self._shown = dict(zip(stages, stream, strict=True)) | ({STATES: "encoder_states"} if "encoder_states" in outputs else {})
        self._recorder = recorder
        options = session_options(threads)
        options.add_session_config_entry(FOLDER, str(model.parent.resolve()))
        self._session = ort.InferenceSession(proto.SerializeToString(), options, providers=PROVIDERS)

    def run(self, names: list[str], inputs: Mapping[str, Any]) -> list[Any]:
        """Compute the named outputs."""
        outputs = self._session.run([*names, *self._shown.values()], inputs)
        self._recorder.add_all(self._shown, outputs[len(names) :])
        own: list[Any] = outputs[: len(names)]
        return own


class Runner(OnnxRunner):
    """The runner over recording sessions."""

    def __init__(self, artifact: Artifact, threads: int, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__(artifact, threads)

    def cross_of(self, state: State) -> Values:
        """Cross-attention K and V [H, F, E] by stage."""
        return {cross_stage(name): value[0].astype("float32") for name, value in state.cross.items()}

    def _encode_into(self, cross: dict[str, Any], mel: Any) -> None:
        """By way of the recording session, which binds no buffers."""
        for rows, made in zip(cross.values(), self._encoder.run(list(cross), {"mel": mel}), strict=True):
            rows[:] = made

    def _open(self, model: Path, threads: int) -> Session:
        stream = encoder_stream if model.stem == "encoder" else decoder_stream
        return Session(model, threads, stream(self.dims), self._recorder)


def open(path: Path, threads: int) -> Stepped:
    """Open and verify an artifact folder."""
    recorder = Recorder()
    return Stepped(Runner(Artifact.open(path), threads, recorder), recorder)
