"""A production client's row, from what it heard."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from asr_core import registry
from asr_core.errors import UnavailableError
from asr_core.isolate import Outcome
from parity import data, measure, witness
from parity.clients._elsewhere import Elsewhere

PROGRAM = """
import array, json, sys
for line in sys.stdin:
    asked = json.loads(line)
    total = sum(array.array("f", open(asked["samples"], "rb").read()))
    if not total:
        sys.exit(7)
    print(json.dumps({"text": f" {asked['language']} {total}"}), flush=True)
"""


@pytest.fixture
def measured(tmp_path) -> Path:
    lines = [json.dumps({"tokens": [], "text": text}) for text in ("one", "two", "three")]
    (tmp_path / measure.DECODED).write_text("\n".join(lines))
    return tmp_path


def row_of(measured: Path, monkeypatch, outcome: Outcome):
    monkeypatch.setattr(witness.isolate, "run", lambda function, arguments, threads: outcome)
    utterances = [data.Utterance(name, Path(f"{name}.flac"), "") for name in "abc"]
    return witness.testify("faster_whisper", "int8", Path("artifact"), measured, utterances, [0, 2], 1)


def test_agreement_is_a_row_of_its_own(measured, monkeypatch):
    row = row_of(measured, monkeypatch, Outcome("ok", {"texts": ["one", "three"]}, "", 1.0))
    assert (row.target, row.precision, row.decoder, row.status, row.texts_equal) == (
        "faster-whisper",
        "int8",
        "client",
        "pass",
        1,
    )


def test_disagreement_fails_and_is_quoted(measured, monkeypatch):
    row = row_of(measured, monkeypatch, Outcome("ok", {"texts": ["one", "tree"]}, "", 1.0))
    assert (row.status, row.texts_equal) == ("fail", 0.5)
    assert "1 of 2 clips, first c: 'tree', ours 'three'" in row.reason


def test_an_absent_client_is_unavailable_and_a_dead_one_crashed(measured, monkeypatch):
    absent = Outcome("error", {}, "not installed", 0.1, UnavailableError("not installed"))
    assert row_of(measured, monkeypatch, absent).status == "unavailable"
    assert row_of(measured, monkeypatch, Outcome("crashed", {}, "killed by SIGSEGV", 0.1)).status == "crashed"


def test_targets_without_a_client_have_none():
    assert witness.clients("openvino") == ["openvino_genai"]
    assert witness.clients("onnx.optimum") == ["optimum_onnx", "transformers_js"]
    assert witness.clients("ncnn") == []


@pytest.mark.parametrize("client", witness.clients("onnx.optimum"))
def test_a_client_with_an_environment_of_its_own_says_where_it_is_looked_for(monkeypatch, tmp_path, client):
    module = registry.load(witness.CLIENTS, client)
    monkeypatch.delenv(module.VARIABLE, raising=False)
    with pytest.raises(UnavailableError, match=rf"{module.CLIENT} needs .* install .*, and {module.VARIABLE} names it"):
        module.open(tmp_path, 1)
    monkeypatch.setenv(module.VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UnavailableError, match="gone, which does not exist"):
        module.open(tmp_path, 1)


def test_a_program_elsewhere_is_asked_clip_by_clip(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    hear = Elsewhere("counter", [sys.executable, program])
    assert [hear(np.ones(count, np.float32), "es") for count in (3, 5)] == ["es 3.0", "es 5.0"]
    with pytest.raises(RuntimeError, match="counter ended with exit code 7"):
        hear(np.zeros(1, np.float32), "es")
