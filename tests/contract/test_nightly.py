"""Interrupted runs, the history and its exit codes by the real commands; the nightly workflow by GitHub's own schema."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from asr_export import parity
from parity.history import History
from parity.resume import DONE
from tests.support import report, run_command

PROJECT = Path(__file__).parents[2]
WORKFLOW = PROJECT / ".github" / "workflows" / "nightly.yml"


@pytest.fixture(scope="session")
def two_artifacts(copies) -> Path:
    return copies("onnx-fp32", "ctranslate2-fp32")


def finished(root: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in (root / parity.WORK).glob(f"*/*/{DONE}")}


def test_a_killed_run_is_taken_up_where_it_ended(two_artifacts, few_clips, tmp_path):
    arguments = ["--artifacts", str(two_artifacts), "--data", str(few_clips)]
    command = [str(Path(sys.executable).with_name("asr-parity")), *arguments]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(finished(two_artifacts)) < 2 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = finished(two_artifacts)
    assert sorted(before) == ["ctranslate2-fp32", "pytorch"]
    (record,) = (two_artifacts / parity.WORK).glob(f"*/ctranslate2-fp32/{DONE}")
    load_s = json.loads(record.read_text())["outcome"]["result"]["load_s"]

    done = run_command("asr-parity", *arguments, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Resumed: pytorch, ctranslate2-fp32" in done.stderr
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["resumed"] is True
    assert [row["load_s"] for row in content["rows"] if row["target"] == "ctranslate2"] == [load_s]
    assert {row["target"] for row in content["rows"]} == {"pytorch", "ctranslate2", "onnx"}
    assert finished(two_artifacts) == {}  # a finished run leaves nothing to take up


def test_regressions_have_an_exit_code_of_their_own(two_artifacts, few_clips, tmp_path):
    """After a past in which the artifacts were half as large; that they were slower then is no complaint."""
    file, out = tmp_path / "history.sqlite", tmp_path / "report.json"
    arguments = ["--artifacts", two_artifacts, "--data", few_clips, "--history", file, "--json", out]
    done = run_command("asr-parity", *arguments)
    assert done.returncode == 0, done.stderr
    assert "not enough history: pytorch-fp32 (0 of 5 runs)" in done.stdout
    assert json.loads(out.read_text())["regressions"]["judged"] == 0

    past = json.loads(out.read_text())
    for row in past["rows"]:
        row.update({"size_mb": 2.0, "speedup": 0.01} if row["target"] != "pytorch" else {})
    with History(file) as opened:
        for _ in range(5):
            opened.append(past)
    done = run_command("asr-parity", *arguments)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "regression: onnx-fp32 size_mb: " in done.stdout
    assert "2 ± 0.0008 over 6 runs before" in done.stdout
    named = [(found["target"], found["figure"]) for found in json.loads(out.read_text())["regressions"]["regressions"]]
    assert named == [("ctranslate2", "size_mb"), ("onnx", "size_mb")]


def test_the_history_is_listed_filtered_and_drawn(tmp_path):
    file = tmp_path / "history.sqlite"
    with History(file) as opened:
        for speedup in (2.0, 2.125):
            opened.append(report(speedup=speedup))
    done = run_command("asr-parity", "history", "--history", file, "--plot", tmp_path / "plot.svg")
    assert done.returncode == 0, done.stderr
    assert "Linux x86_64, Some CPU, 2 cores, 1 thread" in done.stdout
    assert "2.125" in done.stdout
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    done = run_command("asr-parity", "history", "--history", file, "--json", "--target", "onnx", "--figure", "speedup")
    assert [row["figures"] for run in json.loads(done.stdout)["runs"] for row in run["rows"]] == [
        {"speedup": 2.0}, {"speedup": 2.125},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["history", "--history", "missing.sqlite"], "no history yet"),
        (["--threads", "2", "history"], "--threads belongs to a parity run"),
    ],
)
def test_wrong_use_of_a_command_ends_in_a_sentence(arguments, says):
    done = run_command("asr-parity", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("statuses", "regressed", "code"),
    [
        ({"pass"}, False, 0),
        ({"pass"}, True, 3),
        ({"pass", "unavailable"}, False, 5),
        ({"pass", "unavailable"}, True, 3),
        ({"pass", "undecided", "unavailable"}, True, 10),
        ({"pass", "fail", "undecided", "unavailable"}, True, 1),
        ({"pass", "crashed"}, True, 1),
        ({"pass", "timeout"}, False, 1),
    ],
)
def test_the_worst_decides_the_exit_code(statuses, regressed, code):
    assert parity.exit_code(statuses, regressed=regressed) == code


def test_help_names_the_run_and_its_commands():
    done = run_command("asr-parity", "--help")
    assert done.returncode == 0
    for name in ("--artifacts", "--history", "history", "merge"):
        assert name in done.stdout


def test_the_workflow_is_valid():
    done = run_command("check-jsonschema", "--builtin-schema", "vendor.github-workflows", WORKFLOW)
    assert done.returncode == 0, done.stdout
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    for name, job in jobs.items():
        assert set([job.get("needs")] if isinstance(job.get("needs"), str) else job.get("needs", [])) <= jobs.keys(), name
        for step in job["steps"]:
            if "run" in step:
                subprocess.run(["bash", "-n", "-c", step["run"]], check=True)
    hosts = {entry["runner"] for entry in jobs["parity"]["strategy"]["matrix"]["include"]}
    assert any("arm" in host for host in hosts)
    assert any(host.startswith("macos") for host in hosts)


def test_make_and_the_workflow_agree():
    """What the workflow uploads is what `make nightly` writes."""
    recipe = subprocess.run(["make", "-n", "nightly"], capture_output=True, text=True, check=True, cwd=PROJECT).stdout
    workflow = WORKFLOW.read_text()
    for name in ("nightly.json", "nightly.html", "history.sqlite"):
        assert f"artifacts/{name}" in recipe
        assert f"artifacts/{name}" in workflow
