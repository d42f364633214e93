"""What a runner is: encode, generate and score over one opened artifact.

A runner is a module with ``open(path, threads) -> Runner``. It reads the artifact's manifest and files and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from asr_core import align, capacity, decode, registry
from asr_core.align import Alignment, AlignRequest, Scores
from asr_core.artifact import read_manifest
from asr_core.decode import Decoded, DecodeOptions, Logits, Mel
from asr_core.dims import Dims
from asr_core.errors import UsageError
from asr_core.tokens import TokenIds, load_tokenizer, written_out

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = NDArray[np.float32]


class Runner(Protocol):
    """One opened model on one runtime.

    ``decoder`` is ``step`` where our decode loop drives it and ``native`` where the runtime decodes by itself. ``timed`` tells
    whether its time is the runtime's; where it is not, ``timing_needs`` says what that would take. With ``short_windows``,
    :meth:`generate`, :meth:`detect_language` and :meth:`align` take windows of fewer than 3000 frames, an even number of them.
    """

    decoder: str
    timed: bool
    timing_needs: str
    short_windows: bool
    dims: Dims
    tokens: TokenIds

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """Float32 [B, n_mels, 3000] → encoder states float32 [B, 1500, D]."""

    def generate(self, mel: Mel, options: DecodeOptions) -> list[Decoded]:
        """Decode a batch of windows, float32 [B, n_mels, 3000]."""

    def detect_language(self, mel: Mel) -> list[dict[str, float]]:
        """The probability of every language by code, for each window of float32 [B, n_mels, 3000].

        A model without language tokens is sure that it hears English.
        """

    def score(self, mel: Mel, tokens: list[int]) -> Logits | None:
        """Teacher-forced logits float32 [T, vocab] of one window [1, n_mels, 3000]; None where the runtime has none to show."""

    def align(self, mel: Mel, requests: Sequence[AlignRequest]) -> list[Alignment]:
        """Find given tokens in their windows, float32 [B, n_mels, 3000].

        Raises :class:`UsageError` where the artifact does not show its cross-attention.
        """

    def close(self) -> None:
        """Free the model."""


class Written:
    """A runner that can read the tokenizer of its folder, which it does when first asked for text."""

    folder: Path

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones written out and timestamps left out."""
        return written_out(self._tokenizer, tokens)


class StepRunner(Written, ABC):
    """A runner over a runtime that exposes single decode steps; subclasses implement :class:`asr_core.decode.Stepper`."""

    decoder = "step"
    timed = True
    timing_needs = ""
    short_windows = False
    dims: Dims
    tokens: TokenIds
    # (decoder layer, head) in the order of the step's output; None where the artifact has no such output.
    alignment_heads: list[tuple[int, int]] | None

    @abstractmethod
    def encode(self, mel: Mel) -> Any:
        """Float32 [B, n_mels, 3000] → a fresh state at position 0."""

    @abstractmethod
    def step(self, tokens: NDArray[np.int64], state: Any) -> Logits:
        """Int64 [B, T] → logits float32 [B, T, vocab], valid until the next step; advances the state by T."""

    def step_at(self, tokens: NDArray[np.int64], state: Any, wanted: Sequence[int]) -> Logits:
        """A step of which the logits of some of the new tokens are wanted: float32 [B, wanted, vocab].

        Whatever a runtime spares for it is a subclass's to say; the head is most of what a long prompt costs a small model.
        """
        return self.step(tokens, state)[:, wanted]

    @abstractmethod
    def reorder(self, state: Any, rows: NDArray[np.int64]) -> Any:
        """The state of the given batch rows, in their order (rows may repeat or be left out); ``state`` itself ends here."""

    @abstractmethod
    def restart(self, state: Any, rows: NDArray[np.int64]) -> Any:
        """A state at position 0 over the given windows of ``state``, without encoding them again (rows may repeat).

        ``state`` is one that :meth:`encode` gave, however far it and what followed from it have gone since.
        """

    @abstractmethod
    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """Float32 [B, n_mels, 3000] → encoder states float32 [B, 1500, D]."""

    @abstractmethod
    def step_with_queries(self, tokens: NDArray[np.int64], state: Any) -> tuple[Logits, Array]:
        """A step that shows the alignment heads' scaled cross-attention queries, too, float32 [B, heads, T, E]."""

    @abstractmethod
    def cross_keys(self, state: Any, layer: int) -> Array:
        """A decoder layer's cross-attention keys, float32 [B, H, F, E]."""

    def cross_attention(self, tokens: NDArray[np.int64], state: Any) -> tuple[Scores, Logits]:
        """A step of one window, int64 [1, T] → the alignment heads' raw attention [heads, T, F] and logits [T, vocab].

        Raises :class:`UsageError` where the artifact does not show it.
        """
        if self.alignment_heads is None:
            raise UsageError("this artifact has no word timestamps: its decoder does not show its attention. Export it again.")
        logits, queries = self.step_with_queries(tokens, state)
        keys = {layer: self.cross_keys(state, layer)[0] for layer in {layer for layer, _ in self.alignment_heads}}
        pairs = zip(queries[0], self.alignment_heads, strict=True)
        return np.stack([query @ keys[layer][head].T for query, (layer, head) in pairs]), logits[0]

    def align(self, mel: Mel, requests: Sequence[AlignRequest]) -> list[Alignment]:
        """Find given tokens in their windows, each with one forced pass over prompt, text and end."""
        encoded = self.encode(mel)
        return [self._align(self.restart(encoded, np.array([request.window])), request) for request in requests]

    def _align(self, state: Any, request: AlignRequest) -> Alignment:
        forced = np.array([align.forced_tokens(self.tokens, request)], np.int64)
        scores, logits = self.cross_attention(forced, state)
        return align.from_attention(scores, logits, self.tokens, request)

    def generate(self, mel: Mel, options: DecodeOptions) -> list[Decoded]:
        """Decode a batch of windows with the shared loop."""
        return decode.generate(self, mel, options)

    def detect_language(self, mel: Mel) -> list[dict[str, float]]:
        """The probability of every language by code, for each window of float32 [B, n_mels, 3000]."""
        return decode.detect_language(self, self.encode(mel), len(mel))

    def score(self, mel: Mel, tokens: list[int]) -> Logits:
        """Teacher-forced logits of one window, through the same steps as decoding."""
        return decode.teacher_forced(self, self.encode(mel), tokens)

    def close(self) -> None:
        """Free the model."""


class WithoutAttention(StepRunner):
    """A step runner over a form that does not show its cross-attention as our word timestamps need it."""

    alignment_heads = None

    def step_with_queries(self, tokens: NDArray[np.int64], state: Any) -> tuple[Logits, Array]:
        """Never called: :meth:`cross_attention` refuses."""
        raise NotImplementedError

    def cross_keys(self, state: Any, layer: int) -> Array:
        """Never called: :meth:`cross_attention` refuses."""
        raise NotImplementedError


def open_team(target: str, path: Path, threads: int, batch_size: int, provider: str | None = None) -> list[Runner]:
    """Open an artifact once for every thread, to decode a batch of windows in each; in fewer copies where memory is short.

    Copies with one thread each never wait for each other, as the threads of one session do at every operation. On a provider
    there is one. Raises what :func:`open_runner` raises.
    """
    if batch_size == 1 or provider:
        return [open_runner(target, path, threads, provider)]
    model_mb = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    count = capacity.copies(model_mb, read_manifest(path).dims, batch_size, threads)
    return [open_runner(target, path, (threads + i) // count) for i in range(count)]


def open_runner(target: str, path: Path, threads: int, provider: str | None = None) -> Runner:
    """Open an artifact folder (or, for ``pytorch``, a checkpoint folder) with its runtime, on a provider of it or on the CPU.

    Raises :class:`~asr_core.errors.UnavailableError` where the runtime or the provider is not at hand, :class:`UsageError` where
    the runtime knows no such provider.
    """
    registry.require(target)
    if provider is None:
        return cast("Runner", registry.load("runners", target).open(path, threads))
    known = providers_of(target)
    if provider not in known:
        raise UsageError(f"{target} does not run on {provider!r}; it runs on: {', '.join(('the CPU', *known))}.")
    return cast("Runner", importlib.import_module(_device_module(target)).open(path, threads, provider))


def providers_of(target: str) -> tuple[str, ...]:
    """What a target's runtime can run on beside the CPU, if this machine has it."""
    module = _device_module(target)
    return () if importlib.util.find_spec(module) is None else tuple(importlib.import_module(module).PROVIDERS)


def _device_module(target: str) -> str:
    return f"runners._device_{target.replace(registry.LAYOUT, '_')}"
