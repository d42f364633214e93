"""@huggingface/transformers on Node over an ONNX artifact in Optimum's layout, from a folder where npm has installed it."""

from __future__ import annotations

import shutil
from pathlib import Path

from asr_core.artifact import Artifact
from asr_core.errors import UnavailableError
from parity.clients._elsewhere import PROGRAMS, Elsewhere, place

CLIENT = "transformers.js"
TARGET = "onnx.optimum"
VARIABLE = "ASR_EXPORT_NODE_FOLDER"
INSTALL = "npm install @huggingface/transformers in a folder"
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # its names of the files' suffixes


def open(path: Path, threads: int) -> Elsewhere:
    """The client, told our decode policy."""
    folder, node = place(CLIENT, VARIABLE, INSTALL), shutil.which("node")
    if node is None:
        raise UnavailableError(f"the witness {CLIENT} needs node on the PATH")
    dtype = DTYPES[Artifact.open(path).manifest.precision]
    return Elsewhere(CLIENT, [node, PROGRAMS / "transformers_js.cjs", folder.absolute(), path.absolute(), dtype, str(threads)])
