"""Our own runners: features, decode loop and all, over an artifact (or, for ``pytorch``, a checkpoint)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asr_core import audio
from asr_core.artifact import read_manifest
from asr_core.decode import DecodeOptions
from asr_core.tokens import load_tokenizer, text_of
from runners.base import open_runner

PEER = "ours"
Hear = Callable[[NDArray[np.float32], str, int | None], tuple[str, int]]


def open(folder: Path, precision: str, threads: int, scratch: Path) -> Hear:
    """Greedy, without timestamps, as every peer is asked for."""
    runner = open_runner(read_manifest(folder).target, folder, threads)
    tokenizer, filters = load_tokenizer(folder), np.load(folder / "mel_filters.npy")

    def hear(samples: NDArray[np.float32], language: str, tokens: int | None) -> tuple[str, int]:
        # Others go on after a timestamp, which random weights may say.
        beyond = range(runner.tokens.no_timestamps + 1, runner.dims.vocab)
        never_ends = None if tokens is None else (*runner.tokens.suppress, runner.tokens.end, *beyond)
        options = DecodeOptions(language=language, suppress=never_ends, max_new_tokens=tokens)
        (decoded,) = runner.generate(audio.log_mel(samples, filters)[None], options)
        return text_of(tokenizer, decoded.tokens), len(decoded.tokens)

    return hear
