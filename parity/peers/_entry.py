"""Run by the interpreter of any environment: ``_entry.py ADAPTER FOLDER PRECISION THREADS SCRATCH``.

First it says, in one line of JSON, ``{"ready": true}`` or why it cannot: ``{"absent": …}``. Then it answers each line
``{"samples": file of raw float32 at 16 kHz, "language": code, "tokens": number or null}`` with
``{"text": …, "tokens": …, "wall_s": …, "cpu_s": …}``; the second is the time of all of its threads.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main(adapter: str, folder: str, precision: str, threads: str, scratch: str) -> None:
    """Open the peer and answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    peer = runpy.run_path(adapter)
    try:
        hear = peer["open"](Path(folder), precision, int(threads), Path(scratch))
    except (ImportError, ValueError) as error:
        say({"absent": str(error)})
        return
    say({"ready": True})
    take = peer.get("take", np.asarray)
    for line in sys.stdin:
        asked = json.loads(line)
        samples = take(np.fromfile(asked["samples"], "<f4"))
        started, used = time.perf_counter(), time.process_time()
        text, tokens = hear(samples, asked["language"], asked["tokens"])
        wall, cpu = time.perf_counter() - started, time.process_time() - used
        say({"text": text, "tokens": tokens, "wall_s": wall, "cpu_s": cpu})


if __name__ == "__main__":
    main(*sys.argv[1:])
