"""Reports of several machines as one: every row stays, with its host; what cannot stand side by side is refused by name."""

import json

import pytest

from asr_core.errors import UsageError
from parity import merge
from tests.support import report, run_command

UNTIMED = {"target": "coreml", "precision": "fp16", "speedup": None, "rtfx": None}


def test_a_mac_adds_a_row_to_one_that_was_not_measured():
    linux, mac = report(**UNTIMED), report(system="Darwin", target="coreml", precision="fp16", speedup=3.0)
    merged = merge.merge([("linux.json", linux), ("mac.json", mac)])
    assert [(row["host"].split()[0], row["speedup"]) for row in merged["rows"]] == [("Linux", None), ("Darwin", 3.0)]
    assert list(merged["hosts"]) == [row["host"] for row in merged["rows"]]
    assert merged["schema"] == 1
    assert merged["checkpoint"] == linux["checkpoint"]


def test_an_artifacts_rows_stand_side_by_side():
    linux, mac = (report(system=system) for system in ("Linux", "Darwin"))
    for document in (linux, mac):
        document["rows"] = [document["rows"][0] | {"target": target} for target in ("pytorch", "onnx")]
    merged = merge.merge([("linux.json", linux), ("mac.json", mac)])
    assert [row["target"] for row in merged["rows"]] == ["pytorch", "pytorch", "onnx", "onnx"]


def test_merging_in_two_steps_is_merging_in_one():
    documents = [(system, report(system=system)) for system in ("Linux", "Darwin", "FreeBSD")]
    two_steps = merge.merge([("both", merge.merge(documents[:2])), documents[2]])
    assert two_steps == merge.merge(documents)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"fingerprint": "e" * 64}, "a.json and b.json are about different checkpoints"),
        ({"data": "c" * 64}, "a.json and b.json are about different data"),
        ({"system": "Linux"}, "a.json and b.json come from the same host"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(other, says):
    with pytest.raises(UsageError, match=says):
        merge.merge([("a.json", report()), ("b.json", report(**{"system": "Darwin"} | other))])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "b.json is not a report"),
        ("[]", "b.json is not a report"),
        (json.dumps(report() | {"schema": 2}), "b.json is a report of schema 2"),
        ('{"schema": 1}', "b.json is not a report of asr-parity: it has no checkpoint"),
        (None, "b.json: no such report"),
    ],
)
def test_a_file_that_is_no_report_ends_in_a_sentence(tmp_path, content, says):
    (tmp_path / "a.json").write_text(json.dumps(report()))
    if content is not None:
        (tmp_path / "b.json").write_text(content)
    done = run_command("asr-parity", "merge", tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "out.json")
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_the_command_writes_one_report(tmp_path):
    for name, system in (("a", "Linux"), ("b", "Darwin")):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(system=system)))
    done = run_command("asr-parity", "merge", tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2
