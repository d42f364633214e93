"""A production client's row, from what it heard."""

import json
from pathlib import Path

import pytest

from asr_core.errors import UnavailableError
from asr_core.isolate import Outcome
from parity import data, measure, witness


@pytest.fixture
def measured(tmp_path) -> Path:
    lines = [json.dumps({"tokens": [], "text": text}) for text in ("one", "two", "three")]
    (tmp_path / measure.DECODED).write_text("\n".join(lines))
    return tmp_path


def row_of(measured: Path, monkeypatch, outcome: Outcome):
    monkeypatch.setattr(witness.isolate, "run", lambda function, arguments, threads: outcome)
    utterances = [data.Utterance(name, Path(f"{name}.flac"), "") for name in "abc"]
    return witness.testify("ctranslate2", "int8", Path("artifact"), measured, utterances, [0, 2], 1)


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
    assert witness.has_client("openvino")
    assert not witness.has_client("ncnn")
