"""A client in an environment of its own: a program there that is asked, line by line, for the text of one clip after another."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asr_core.errors import UnavailableError

PROGRAMS = Path(__file__).parent / "programs"


def place(client: str, variable: str, install: str) -> Path:
    """Where a person has the client, by an environment variable; raises :class:`UnavailableError` that says what to do."""
    named = os.environ.get(variable)
    if not named:
        raise UnavailableError(f"the witness {client} needs an environment of its own: {install}, and {variable} names it")
    if not Path(named).exists():
        raise UnavailableError(f"the witness {client}: {variable} names {named}, which does not exist")
    return Path(named)


class Elsewhere:
    """A running program; it takes ``{"samples": file, "language": code}`` and answers ``{"text": …}``, one a line.

    ``samples`` is a file of raw float32 at 16 kHz.
    """

    def __init__(self, client: str, command: Sequence[str | Path]) -> None:
        # Its environment is not ours: neither our modules nor a hub are for it.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        self._client = client
        self._scratch = tempfile.TemporaryDirectory(prefix="asr-export-client-")
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, samples: NDArray[np.float32], language: str) -> str:
        """The text of at most 30 s of samples; raises :class:`RuntimeError` where the program ends instead of answering."""
        file = Path(self._scratch.name) / "samples.f32"
        samples.astype("<f4").tofile(file)
        if self._process.stdin is None or self._process.stdout is None:
            raise TypeError("both ends are pipes")
        self._process.stdin.write(json.dumps({"samples": str(file), "language": language}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._client} ended with exit code {self._process.wait()}")
        return str(json.loads(answer)["text"]).strip()
