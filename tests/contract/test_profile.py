"""What runtimes tell about their operations is what the network has, and fits into the time of its calls."""

import json

import pytest
from click.testing import CliRunner

from asr_export.profile import profile as command
from parity.profile import OUTSIDE, measure, shares

LINEARS = {"addmm": 5, "mm": 1}  # of an encoder layer: all but the key projection have a bias


@pytest.fixture(scope="module")
def calls(artifacts, trained):
    def profile(name: str):
        target = name.partition("-")[0]
        path = trained.path if target == "pytorch" else artifacts / "reference" / name
        return measure(target, str(path), 1, 2, 3)["calls"]

    return profile


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        *(("pytorch-fp32", f"aten::{kind}", 3 * count) for kind, count in LINEARS.items()),
        ("onnx-fp32", "Conv", 2),
        ("onnx-int8", "Conv", 2),
        ("openvino-fp32", "Convolution", 2),
        ("tflite-fp32", "Convolution", 2),
        ("tflite-int8", "Convolution", 2),
    ],
)
def test_operations_are_those_of_the_network(name, kind, count, calls):
    told = calls(name)
    assert [call["part"] for call in told] == ["encode"] * 2 + ["step"] * 3
    for call in told[:2]:
        assert sum(event["kind"].startswith(kind) for event in call["events"]) == count
    if not name.startswith("openvino"):  # which tells means
        for call in told:
            assert 0 < sum(event["own"] for event in call["events"]) <= call["seconds"]
            assert all(0 <= event["start"] <= call["seconds"] for event in call["events"])
    for part in ("encode", "step"):
        assert sum(share.share for share in shares(told) if share.part == part) == pytest.approx(1)


def test_the_command_writes_a_trace(artifacts, tmp_path):
    folders = [str(artifacts / "reference" / name) for name in ("onnx-int8", "ctranslate2-int8")]
    result = CliRunner().invoke(command, [*folders, "--windows", "1", "--steps", "2", "--trace", str(tmp_path / "trace.json")])
    assert result.exit_code == 0, result.output
    assert "ctranslate2-int8: not available" in result.output
    assert "MatMulNBits" in result.output
    assert OUTSIDE in result.output
    entries = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {entry["args"]["name"] for entry in entries if entry["ph"] == "M"} == {"pytorch-fp32", "onnx-int8"}
    calls = [entry for entry in entries if entry["name"] in ("encode", "step")]
    assert [entry["name"] for entry in calls] == ["encode", "step", "step"] * 2
    assert all(entry["dur"] > 0 for entry in calls)
