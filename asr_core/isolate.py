"""Run one function in a process of its own: whatever happens to it costs that call, never the caller.

Exports need this for memory (a converter's gigabytes go when its process goes), parity for honesty (one runtime a process,
threads pinned, its own peak memory).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from asr_core import errors

STDERR_TAIL = 2000  # characters of a dead process's last words that are kept
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How an isolated call ended: ``status`` is ``ok``, ``error`` (it raised), ``crashed`` (it died) or ``timeout``."""

    status: str
    result: dict[str, Any]
    reason: str
    seconds: float
    error: errors.AsrExportError | None = None
    own_s: float = 0.0


def run(
    function: str,
    arguments: Mapping[str, Any],
    *,
    progress: Progress = lambda stage: None,
    threads: int | None = None,
    timeout: float | None = None,
) -> Outcome:
    """Call ``module:name`` with JSON-able keyword arguments in a new process and wait for its JSON-able dictionary.

    A function that wants to report takes a ``progress`` argument. ``threads`` pins the numeric libraries' pools; ``timeout``
    is in seconds.
    """
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    if threads is not None:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="asr-export-") as scratch, tempfile.TemporaryFile() as log:
        answer = Path(scratch) / "answer.json"
        call = json.dumps({"function": function, "arguments": dict(arguments), "answer": str(answer)})
        read_end, write_end = os.pipe()
        # -P: a folder called `parity` where the user stands must not shadow ours.
        command = [sys.executable, "-P", "-m", "asr_core.isolate", call, str(write_end)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=(write_end,),
            start_new_session=True,  # a group of its own: converters leave helper processes behind
        ) as process:
            os.close(write_end)
            listener = threading.Thread(target=_listen, args=(read_end, progress), daemon=True)
            listener.start()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                late = f"no answer within {timeout:.0f} s{_tail(log)}"
                return Outcome("timeout", {}, late, time.perf_counter() - started)
            finally:
                _kill_group(process.pid)
                process.wait()
            listener.join()
        seconds = time.perf_counter() - started
        if not answer.exists():
            return Outcome("crashed", {}, _last_words(process.returncode, log), seconds)
        return _outcome(json.loads(answer.read_text(encoding="utf-8")), seconds)


def result_or_raise(outcome: Outcome, what: str) -> dict[str, Any]:
    """The result of a good outcome; else the error, as the child raised it or as an :class:`~asr_core.errors.ExportError`."""
    if outcome.status == "ok":
        return outcome.result
    if outcome.error is not None:
        raise outcome.error
    raise errors.ExportError(f"{what} {outcome.status}: {outcome.reason}")


def peak_rss_mb() -> float:
    """This process's peak resident memory in MB (10⁶ bytes).

    Linux's VmHWM belongs to this program alone; ru_maxrss would begin at the size of whatever process started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _listen(read_end: int, progress: Progress) -> None:
    with os.fdopen(read_end, encoding="utf-8") as stream:
        for line in stream:
            progress(line.rstrip("\n"))


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _last_words(code: int | None, log: Any) -> str:
    if code is not None and code < 0:
        end = f"killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            end += " (out of memory?)"
    else:
        end = f"exit code {code}"
    return end + _tail(log)


def _tail(log: Any) -> str:
    log.seek(0)
    tail = log.read().decode("utf-8", "replace").strip()[-STDERR_TAIL:]
    return f"; its last words: {tail}" if tail else ""


def _outcome(answer: dict[str, Any], seconds: float) -> Outcome:
    if "result" in answer:
        return Outcome("ok", answer["result"], "", seconds, own_s=answer["own_s"])
    kind = getattr(errors, answer["error"], None)
    if kind is None:
        return Outcome("error", {}, answer["traceback"][-STDERR_TAIL:], seconds)
    return Outcome("error", {}, answer["message"], seconds, kind(answer["message"]))


def _die_with_parent() -> None:
    """The parent holds our standard input open; its end means that nobody waits for us any more."""
    # Not through sys.stdin: its lock, held by a waiting thread, aborts an interpreter that ends by an exception.
    os.read(0, 1)
    _kill_group(os.getpgrp())


def _call(call: dict[str, Any], progress: Progress) -> dict[str, Any]:
    module, _, name = call["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        wants_progress = "progress" in function.__code__.co_varnames[: function.__code__.co_argcount]
        started = time.perf_counter()
        result = function(**call["arguments"], **({"progress": progress} if wants_progress else {}))
        return {"result": result, "own_s": time.perf_counter() - started}
    except errors.AsrExportError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # noqa: BLE001 - an isolated call must always answer
        if isinstance(error, OSError) and error.errno in errors.REFUSALS:
            return {"error": "StorageError", "message": f"{error.strerror}: {error.filename or 'the output folder'}"}
        return {"error": "", "message": str(error), "traceback": traceback.format_exc()}


def _main(argv: list[str]) -> NoReturn:
    call = json.loads(argv[1])
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with os.fdopen(int(argv[2]), "w", buffering=1, encoding="utf-8") as stream:
        answer = _call(call, lambda stage: print(stage, file=stream))
    path = Path(call["answer"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.rename(path)
    # Leave without the runtimes' own shutdown: some of them crash there after all the work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv)
