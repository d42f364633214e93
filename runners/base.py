"""What a runner is: encode, generate and score over one opened artifact.

A runner is a module with ``open(path, threads) -> Runner``. It reads the artifact's manifest and files and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from asr_core import decode, registry
from asr_core.checkpoint import Dims
from asr_core.decode import Decoded, DecodeOptions, Logits, Mel
from asr_core.tokens import TokenIds


class Runner(Protocol):
    """One opened model on one runtime.

    ``decoder`` is ``step`` where our decode loop drives it and ``native`` where the runtime decodes by itself. ``timed`` tells
    whether its time is the runtime's; where it is not, ``timing_needs`` says what that would take.
    """

    decoder: str
    timed: bool
    timing_needs: str
    dims: Dims
    tokens: TokenIds

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """Float32 [B, n_mels, 3000] → encoder states float32 [B, 1500, D]."""

    def generate(self, mel: Mel, options: DecodeOptions) -> list[Decoded]:
        """Decode a batch of windows, float32 [B, n_mels, 3000]."""

    def score(self, mel: Mel, tokens: list[int]) -> Logits | None:
        """Teacher-forced logits float32 [T, vocab] of one window [1, n_mels, 3000]; None where the runtime has none to show."""

    def close(self) -> None:
        """Free the model."""


class StepRunner(ABC):
    """A runner over a runtime that exposes single decode steps; subclasses implement :class:`asr_core.decode.Stepper`."""

    decoder = "step"
    timed = True
    timing_needs = ""
    dims: Dims
    tokens: TokenIds

    @abstractmethod
    def encode(self, mel: Mel) -> Any:
        """Float32 [B, n_mels, 3000] → a fresh state at position 0."""

    @abstractmethod
    def step(self, tokens: NDArray[np.int64], state: Any) -> Logits:
        """Int64 [B, T] → logits float32 [B, T, vocab], valid until the next step; advances the state by T."""

    @abstractmethod
    def reorder(self, state: Any, rows: NDArray[np.int64]) -> Any:
        """The state of the given batch rows, in their order (rows may repeat or be left out)."""

    @abstractmethod
    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """Float32 [B, n_mels, 3000] → encoder states float32 [B, 1500, D]."""

    def generate(self, mel: Mel, options: DecodeOptions) -> list[Decoded]:
        """Decode a batch of windows with the shared loop."""
        return decode.greedy(self, mel, options)

    def score(self, mel: Mel, tokens: list[int]) -> Logits:
        """Teacher-forced logits of one window, through the same steps as decoding."""
        return decode.teacher_forced(self, self.encode(mel), tokens)

    def close(self) -> None:  # noqa: B027 - most runtimes free the model with their objects
        """Free the model."""


def open_runner(target: str, path: Path, threads: int) -> Runner:
    """Open an artifact folder (or, for ``pytorch``, a checkpoint folder) with its runtime.

    Raises :class:`~asr_core.errors.UnavailableError` where the runtime is not installed.
    """
    registry.require(target)
    return cast("Runner", registry.load("runners", target).open(path, threads))
