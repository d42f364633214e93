import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asr_core import isolate
from asr_core.errors import AudioError, ExportError, StorageError

CALLS = """
import ctypes, os, signal, sys, time
from asr_core.errors import AudioError

def add(a, b):
    return {"sum": a + b, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}

def report(count, progress):
    for i in range(count):
        progress(f"stage {i}")
    return {}

def complain():
    raise AudioError("sound.wav: no such file.")

def fail():
    raise ZeroDivisionError("by nothing")

def refuse(path):
    open(path, "w")

def leave():
    sys.exit(3)

def unspeakable():
    return {"value": object()}

def segfault():
    print("about to crash", flush=True)
    ctypes.string_at(0)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def sleep(path=None):
    if path:
        with open(path, "w") as stream:
            stream.write(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def gone(pid: int, within: float = 10) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # A killed orphan waits for whoever adopted it; it runs no more.
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_ok():
    outcome = isolate.run("calls:add", {"a": 1, "b": 2}, threads=3)
    assert (outcome.status, outcome.result["sum"], outcome.reason, outcome.error) == ("ok", 3, "", None)
    assert outcome.result["pid"] != os.getpid()
    assert outcome.result["threads"] == "3"
    assert outcome.seconds > 0
    assert isolate.result_or_raise(outcome, "adding") == outcome.result


def test_progress_arrives_in_order():
    seen: list[str] = []
    assert isolate.run("calls:report", {"count": 3}, progress=seen.append).status == "ok"
    assert seen == ["stage 0", "stage 1", "stage 2"]


def test_our_own_errors_pass_through():
    outcome = isolate.run("calls:complain", {})
    assert outcome.status == "error"
    with pytest.raises(AudioError, match=r"^sound\.wav: no such file\.$"):
        isolate.result_or_raise(outcome, "listening")


def test_an_exception_keeps_its_traceback():
    outcome = isolate.run("calls:fail", {})
    assert outcome.status == "error"
    assert "in fail" in outcome.reason
    with pytest.raises(ExportError, match=r"the export error: (.|\n)*ZeroDivisionError: by nothing"):
        isolate.result_or_raise(outcome, "the export")


def test_the_file_systems_refusal(tmp_path):
    outcome = isolate.run("calls:refuse", {"path": str(tmp_path)})
    with pytest.raises(StorageError, match=rf"Is a directory: {tmp_path}"):
        isolate.result_or_raise(outcome, "writing")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("segfault", "killed by SIGSEGV; its last words: about to crash"),
        ("kill", r"killed by SIGKILL \(out of memory\?\)"),
        ("leave", "exit code 3"),
        ("unspeakable", r"exit code 1; its last words: (.|\n)*not JSON serializable"),
    ],
)
def test_a_death_costs_only_the_call(function, reason):
    outcome = isolate.run(f"calls:{function}", {})
    assert outcome.status == "crashed"
    with pytest.raises(ExportError, match=f"the export crashed: {reason}"):
        isolate.result_or_raise(outcome, "the export")


def test_an_unknown_function():
    assert "AttributeError" in isolate.run("calls:nothing", {}).reason


def test_timeout(tmp_path):
    outcome = isolate.run("calls:sleep", {"path": str(tmp_path / "pid")}, timeout=3)
    assert (outcome.status, outcome.reason) == ("timeout", "no answer within 3 s")
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_dies_with_its_parent(tmp_path, number):
    pid = tmp_path / "pid"
    # A shell's background job inherits SIGINT as ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += f"from asr_core import isolate; isolate.run('calls:sleep', {{'path': {str(pid)!r}}})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as parent:
        until = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        parent.send_signal(number)
        parent.wait(10)
    assert gone(int(pid.read_text()))


def test_peak_rss_is_this_programs():
    import resource

    megabytes = isolate.peak_rss_mb()
    assert 10 < megabytes <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 * 1.01
