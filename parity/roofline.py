"""The roof of decoding: a step cannot be faster than memory hands over what it has to read."""

from __future__ import annotations

import time
from collections.abc import Iterable

from asr_core.artifact import TensorSpec
from asr_core.dims import Dims

# Bytes that a weight takes where it is stored. Scales and codebooks are left out, so that the roof stays one.
STORED = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5, "palette6": 0.75, "palette4": 0.5}
FLOAT32 = 4
BUFFER = 1 << 26  # float32 numbers that are read to time the memory: 268 MB, beyond every cache
READS = 8


def weights(dims: Dims) -> int:
    """How many weights a decode step multiplies with: all matrices of the decoder but the keys and values of the window.

    Of the embedding all rows, as the head; biases, norms and positions are left out.
    """
    width = dims.d_model
    layer = 6 * width * width + 2 * width * dims.decoder_ffn
    return dims.decoder_layers * layer + dims.vocab * width


def step_bytes(dims: Dims, precision: str, cache_bytes: int, past: float) -> int:
    """The fewest bytes that a step of one window reads after ``past`` tokens; ``cache_bytes`` are those of a cached number."""
    cached = 2 * dims.decoder_layers * dims.d_model * (dims.n_audio_ctx + past)
    return round(weights(dims) * STORED[precision.partition("-")[0]] + cached * cache_bytes)


def cache_bytes(tensors: Iterable[TensorSpec]) -> int:
    """Bytes of a number in an artifact's cache: as its decoder's inputs say, float32 where the runtime keeps it."""
    import numpy as np

    dtypes = [spec.dtype for spec in tensors if spec.graph == "decoder" and spec.name.startswith("cross_")]
    return np.dtype(dtypes[0]).itemsize if dtypes else FLOAT32


def bandwidth() -> dict[str, float]:
    """Bytes a second that this process reads from memory, at best; run it with the threads that are to be judged."""
    import numpy as np

    numbers = np.ones(BUFFER, np.float32)
    times = []
    for _ in range(READS):
        started = time.perf_counter()
        np.dot(numbers, numbers)
        times.append(time.perf_counter() - started)
    return {"bytes_per_s": numbers.nbytes / min(times)}
