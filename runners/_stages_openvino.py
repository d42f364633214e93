"""The stages of an OpenVINO artifact: its own graphs, with the residual stream as further results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from asr_core.artifact import Artifact
from runners._stages import ADD, CARRY, STATES, Op, Recorder, Stepped, Values, decoder_stream, encoder_stream, residual_stream
from runners.openvino import ENCODER, OpenVINORunner, State, request

KINDS = {"Add": ADD, "Convert": CARRY, "Reshape": CARRY, "Squeeze": CARRY, "Unsqueeze": CARRY}
GIVEN = ("Parameter", "ReadValue")


class Request:
    """A request that records the stages after every inference; for the rest it is the runtime's own."""

    def __init__(self, file: Path, threads: int, stages: list[str], recorder: Recorder) -> None:
        model = ov.Core().read_model(file)
        nodes = model.get_ordered_ops()
        ops = [
            Op(
                KINDS.get(node.get_type_name(), ""),
                [_port(value.get_source_output()) for value in node.inputs()],
                [_port(value) for value in node.outputs()],
            )
            for node in nodes
        ]
        given = [_port(node.output(0)) for node in nodes if node.get_type_name() in GIVEN]
        named = {node.get_friendly_name(): node for node in nodes}
        stream = residual_stream(ops, given, len(stages) - 1, file.name)
        own = len(model.outputs)
        model.add_outputs([named[name].output(index) for name, index in stream])
        self._stages = [*([STATES] if file.name == ENCODER else [""] * own), *stages]
        self._recorder = recorder
        self._request = request(model, threads)

    def infer(self) -> None:
        """Run the model."""
        self._request.infer()
        for index, stage in enumerate(self._stages):
            if stage:
                self._recorder.add(stage, self._request.get_output_tensor(index).data)

    def get_output_tensor(self, index: int = 0) -> Any:
        """One of the model's outputs: its own come first."""
        return self._request.get_output_tensor(index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def _port(output: Any) -> tuple[str, int]:
    return output.get_node().get_friendly_name(), output.get_index()


class Runner(OpenVINORunner):
    """The runner over recording requests."""

    def __init__(self, artifact: Artifact, threads: int, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__(artifact, threads)

    def cross_of(self, state: State) -> Values:
        """Cross-attention K and V [H, F, E] by stage, from the runtime's states (K lie there as [H, E, F])."""
        found = {}
        for held in self._decoder.query_state():
            kind, layer, what = held.name.split(".")
            if kind == "cross":
                rows = np.array(held.state.data[0], np.float32)
                found[f"cross.{layer}.{'keys' if what == 'k' else 'values'}"] = rows.swapaxes(1, 2) if what == "k" else rows
        return found

    def _open(self, file: Path, threads: int) -> Request:
        stream = encoder_stream if file.name == ENCODER else decoder_stream
        return Request(file, threads, stream(self.dims), self._recorder)


def open(path: Path, threads: int) -> Stepped:
    """Open and verify an artifact folder."""
    recorder = Recorder()
    return Stepped(Runner(Artifact.open(path), threads, recorder), recorder)
