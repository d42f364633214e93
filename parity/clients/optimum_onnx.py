"""optimum-onnx over an ONNX artifact in its layout, in an environment of its own: it wants an older transformers than ours."""

from __future__ import annotations

from pathlib import Path

from parity.clients._elsewhere import PROGRAMS, Elsewhere, place

CLIENT = "optimum-onnx"
TARGET = "onnx.optimum"
VARIABLE = "ASR_EXPORT_OPTIMUM_PYTHON"
INSTALL = "pip install optimum-onnx onnxruntime torch in a virtual environment"


def open(path: Path, threads: int) -> Elsewhere:
    """The client, told our decode policy."""
    return Elsewhere(CLIENT, [place(CLIENT, VARIABLE, INSTALL), PROGRAMS / "optimum_onnx.py", path.absolute(), str(threads)])
