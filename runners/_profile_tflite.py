"""LiteRT's profiler, which only its C interface has: the artifact's graphs through a compiled model, with XNNPACK's operators.

The kernels are those of the runner's interpreter; the inputs are zeros, which cost as much as anything else in graphs of fixed
shapes.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import ai_edge_litert

from asr_core.artifact import Artifact
from asr_core.errors import UnavailableError, UsageError
from runners._profile import ENCODE, STEP, Event, row
from runners.tflite import without_greeting

CPU = 1  # LiteRtHwAccelerators
# Kinds of events (bits) that are operators: the interpreter's own, a delegate's, and a delegate's in the interpreter's place.
OPERATOR = 2 | 4 | 8
MICROSECOND = 1e-6
TYPE_BYTES = 512  # more than a LiteRtRankedTensorType takes


class Entry(ctypes.Structure):
    """ProfiledEventData."""

    _fields_ = (
        ("tag", c_char_p),
        ("kind", c_int),
        ("start", c_uint64),  # µs
        ("elapsed", c_uint64),  # µs
        ("memory", c_int64 * 6),
        ("metadata", c_uint64 * 2),
        ("source", c_int),
    )


class LiteRT:
    """The C interface; a call that fails raises :class:`UnavailableError`, since another release may have another interface."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(Path(str(ai_edge_litert.__file__)).parent / "libLiteRt.so"))

    def __call__(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        status = "missing" if function is None else function(*arguments)
        if status:
            raise UnavailableError(f"LiteRT's profiler is not what this project knows: {name} gave {status}.")

    def made(self, name: str, *arguments: Any) -> c_void_p:
        """What a function returns through its last argument."""
        handle = c_void_p()
        self(name, *arguments, byref(handle))
        return handle

    def counted(self, name: str, handle: c_void_p) -> int:
        """The same of a number."""
        number = c_size_t()
        self(name, handle, byref(number))
        return number.value


class Graphs:
    """A model with a profiler; stands in for a runner where only time matters."""

    def __init__(self, artifact: Artifact) -> None:
        self.dims, self.tokens = artifact.manifest.dims, artifact.manifest.tokens
        self.calls: dict[str, list[list[Event]]] = {ENCODE: [], STEP: []}
        self._call = call = LiteRT()
        self._environment = call.made("LiteRtCreateEnvironment", 0, None)
        self._model = call.made("LiteRtCreateModelFromFile", self._environment, os.fsencode(artifact.path / "model.tflite"))
        self._compiled = call.made("LiteRtCreateCompiledModel", self._environment, self._model, self._options())
        self._profiler = call.made("LiteRtCompiledModelGetProfiler", self._compiled)
        self._signatures = {key: (index, signature) for index, (key, signature) in enumerate(self._keys())}
        self._buffers = {
            key: [self._allocated(index, signature, side) for side in ("Input", "Output")]
            for key, (index, signature) in self._signatures.items()
        }

    def encode(self, mel: Any) -> None:
        """Run the encoder."""
        self._run("encode", ENCODE)

    def step(self, tokens: Any, state: Any) -> None:
        """Run one decode step."""
        self._run("decode", STEP)

    def _run(self, key: str, part: str) -> None:
        index, _ = self._signatures[key]
        inputs, outputs = self._buffers[key]
        self._call("LiteRtResetProfiler", self._profiler)
        self._call("LiteRtStartProfiler", self._profiler)
        sizes = c_size_t(len(inputs)), c_size_t(len(outputs))
        self._call("LiteRtRunCompiledModel", self._compiled, c_size_t(index), sizes[0], inputs, sizes[1], outputs)
        self._call("LiteRtStopProfiler", self._profiler)
        count = c_int()
        self._call("LiteRtGetNumProfilerEvents", self._profiler, byref(count))
        entries = (Entry * count.value)()
        self._call("LiteRtGetProfilerEvents", self._profiler, count, entries)
        told = [(entry.tag.decode(), entry.elapsed * MICROSECOND) for entry in entries if entry.kind & OPERATOR]
        self.calls[part].append(row([(tag, tag, seconds) for tag, seconds in told]))

    def _options(self) -> c_void_p:
        options = self._call.made("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        libc = ctypes.CDLL(None)
        libc.strdup.restype = c_void_p
        text = c_void_p(libc.strdup(b"enable_profiling = true\n"))  # freed by LiteRT
        opaque = self._call.made("LiteRtCreateOpaqueOptions", b"runtime_options_string", text, libc.free)
        self._call("LiteRtAddOpaqueOptions", options, opaque)
        return options

    def _keys(self) -> list[tuple[str, c_void_p]]:
        found = []
        for index in range(self._call.counted("LiteRtGetNumModelSignatures", self._model)):
            signature = self._call.made("LiteRtGetModelSignature", self._model, c_size_t(index))
            key = c_char_p()
            self._call("LiteRtGetSignatureKey", signature, byref(key))
            found.append(((key.value or b"").decode(), signature))
        return found

    def _allocated(self, index: int, signature: c_void_p, side: str) -> Any:
        """Zeros for every input or output of a signature."""
        count = self._call.counted(f"LiteRtGetNumSignature{side}s", signature)
        buffers = (c_void_p * count)()
        for place in range(count):
            tensor = self._call.made(f"LiteRtGetSignature{side}TensorByIndex", signature, c_size_t(place))
            kind = ctypes.create_string_buffer(TYPE_BYTES)
            self._call("LiteRtGetRankedTensorType", tensor, kind)
            position = c_size_t(index), c_size_t(place)
            wanted = self._call.made(f"LiteRtGetCompiledModel{side}BufferRequirements", self._compiled, *position)
            buffer = self._call.made("LiteRtCreateManagedTensorBufferFromRequirements", self._environment, kind, wanted)
            size = self._call.counted("LiteRtGetTensorBufferSize", buffer)
            ctypes.memset(self._call.made("LiteRtGetTensorBufferHostMemory", buffer), 0, size)
            buffers[place] = buffer
        return buffers


class Watched:
    """The graphs and what their profiler told."""

    def __init__(self, runner: Graphs) -> None:
        self.runner = runner

    def told(self) -> dict[str, list[list[Event]]]:
        """Of every call."""
        return self.runner.calls


def open(path: Path, threads: int) -> Watched:
    """Open and verify an artifact folder."""
    if threads != 1:
        raise UsageError("LiteRT's profiled model computes with one thread; leave --threads out.")
    artifact = Artifact.open(path)
    with without_greeting():
        return Watched(Graphs(artifact))
