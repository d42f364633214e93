"""Run functions in a process of their own: whatever happens to it costs that call, never the caller.

Exports need this for memory (a converter's gigabytes go when its process goes), parity for honesty (one runtime a process,
threads pinned, its own peak memory).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn, Self

from asr_core import errors

STDERR_TAIL = 2000  # characters of a dead process's last words that are kept
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What a line from the process means: a stage, or that the answer to its call is there. Its death is a line, too.
STAGE, ANSWERED, DEAD = "stage ", "answered", "dead"
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
    started = time.perf_counter()
    with Process(threads) as process:
        outcome = process.call(function, arguments, progress=progress, timeout=timeout)
    return replace(outcome, seconds=time.perf_counter() - started)


class Process:
    """A process that answers calls one after another, for those that share what is dear to load.

    One that crashed or ran out of time is ``ended``: it answers no more. Use it as a context, or :meth:`close` it.
    """

    def __init__(self, threads: int | None = None) -> None:
        environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        if threads is not None:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
        self.ended = False
        self._kept = contextlib.ExitStack()
        self._answer = Path(self._kept.enter_context(tempfile.TemporaryDirectory(prefix="asr-export-"))) / "answer.json"
        self._log = self._kept.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        read_end, write_end = os.pipe()
        self._popen = subprocess.Popen(
            # -P: a folder called `parity` where the user stands must not shadow ours.
            [sys.executable, "-P", "-m", "asr_core.isolate", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            pass_fds=(write_end,),
            start_new_session=True,  # a group of its own: converters leave helper processes behind
        )
        os.close(write_end)
        self._listener = threading.Thread(target=self._listen, args=(read_end,), daemon=True)
        self._listener.start()
        threading.Thread(target=self._mourn, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        *,
        progress: Progress = lambda stage: None,
        timeout: float | None = None,
    ) -> Outcome:
        """As :func:`run`, in this process; the seconds are the call's own."""
        started = time.perf_counter()
        call = json.dumps({"function": function, "arguments": dict(arguments), "answer": str(self._answer)})
        with contextlib.suppress(BrokenPipeError):  # waiting finds its death
            self._stdin.write(call.encode() + b"\n")
            self._stdin.flush()
        in_time = self._wait(progress, None if timeout is None else started + timeout)
        seconds = time.perf_counter() - started
        if not in_time:
            late = f"no answer within {timeout:.0f} s{_tail(self._log)}"
            self.end()
            return Outcome("timeout", {}, late, seconds)
        if not self._answer.exists():
            self.end()
            return Outcome("crashed", {}, _last_words(self._popen.returncode, self._log), seconds)
        outcome = _outcome(json.loads(self._answer.read_text(encoding="utf-8")), seconds)
        self._answer.unlink()
        return outcome

    def close(self) -> None:
        """End the process, and all that it started."""
        self.end()
        self._kept.close()

    @property
    def _stdin(self) -> IO[bytes]:
        if self._popen.stdin is None:
            raise TypeError("the process was started with a pipe")
        return self._popen.stdin

    def _wait(self, progress: Progress, until: float | None) -> bool:
        """Pass progress on until the answer is there or the process is dead; False where neither came in time."""
        while True:
            try:
                line = self._lines.get(timeout=None if until is None else max(0.0, until - time.perf_counter()))
            except queue.Empty:
                return False
            if line in {ANSWERED, DEAD}:
                return True
            progress(line.removeprefix(STAGE))

    def _listen(self, read_end: int) -> None:
        with os.fdopen(read_end, encoding="utf-8") as stream:
            for line in stream:
                self._lines.put(line.rstrip("\n"))

    def _mourn(self) -> None:
        self._popen.wait()
        _kill_group(self._popen.pid)  # what it started may hold the pipe open
        self._listener.join()
        self._lines.put(DEAD)

    def end(self) -> None:
        """Kill the process and what it started; a call that another thread waits for comes back as crashed."""
        if self.ended:
            return
        self.ended = True
        _kill_group(self._popen.pid)
        self._popen.wait()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()


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


def _read_calls(calls: queue.SimpleQueue[bytes]) -> None:
    """The parent holds our standard input open and writes a call a line; its end means that nobody waits for us any more."""
    # Not through sys.stdin: its lock, held by a waiting thread, aborts an interpreter that ends by an exception.
    rest = b""
    while piece := os.read(0, 1 << 16):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            calls.put(line)
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
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_calls, args=(calls,), daemon=True).start()
    with os.fdopen(int(argv[1]), "w", buffering=1, encoding="utf-8") as stream:
        # Until the parent ends us, without the runtimes' own shutdown: some of them crash there after all the work is done.
        while True:
            call = json.loads(calls.get())
            answer = _call(call, lambda stage: print(STAGE + stage.replace("\n", " "), file=stream))
            path = Path(call["answer"])
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(answer), encoding="utf-8")
            partial.rename(path)
            print(ANSWERED, file=stream)


if __name__ == "__main__":
    _main(sys.argv)
