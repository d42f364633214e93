"""The reference: transformers' own Whisper in float32, scaled-dot-product attention, KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asr_core import registry
from asr_core.checkpoint import Checkpoint
from asr_core.decode import Logits, Mel
from asr_core.tokens import TokenIds
from runners.base import StepRunner

# A neighbour that one of the converters installs: importing it takes seconds and says so in dozens of lines.
registry.import_alone("transformers.models.whisper.modeling_whisper", without=["torchao"])
from transformers import EncoderDecoderCache, WhisperForConditionalGeneration  # noqa: E402
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402


@dataclass
class State:
    """Encoder states [B, 1500, D] and transformers' cache."""

    encoded: torch.Tensor
    cache: Any


class PyTorchRunner(StepRunner):
    """transformers' model behind the step interface."""

    def __init__(
        self, checkpoint: Checkpoint, threads: int, *, weights: str = "float32", compute: str = "float32", attention: str = "sdpa"
    ) -> None:
        torch.set_num_threads(threads)
        disable_progress_bar()
        self.dims = checkpoint.dims
        self.tokens = TokenIds.read(checkpoint.path, checkpoint.generation, checkpoint.dims.n_text_ctx)
        self.model = WhisperForConditionalGeneration.from_pretrained(
            checkpoint.path, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        ).eval()
        self.model.to(getattr(torch, weights)).to(getattr(torch, compute))

    @torch.inference_mode()
    def encode(self, mel: Mel) -> State:
        """Run the encoder; the cache starts empty."""
        features = torch.from_numpy(np.ascontiguousarray(mel)).to(self.model.dtype)
        encoded = self.model.model.encoder(features).last_hidden_state
        return State(encoded, None)

    @torch.inference_mode()
    def step(self, tokens: NDArray[np.int64], state: State) -> Logits:
        """One forward pass of the decoder over the new tokens."""
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=state.encoded),
            decoder_input_ids=torch.from_numpy(tokens),
            past_key_values=state.cache,
            use_cache=True,
        )
        state.cache = out.past_key_values
        logits: Logits = out.logits.float().numpy()
        return logits

    def reorder(self, state: State, rows: NDArray[np.int64]) -> State:
        """Select rows of the encoder states and of both caches."""
        index = torch.from_numpy(rows)
        cache: EncoderDecoderCache = state.cache
        cache.self_attention_cache.batch_select_indices(index)
        cache.cross_attention_cache.batch_select_indices(index)
        return State(state.encoded[index], cache)

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """The encoder alone."""
        states: NDArray[np.float32] = self.encode(mel).encoded.float().numpy()
        return states


def open(
    path: Path, threads: int, *, weights: str = "float32", compute: str = "float32", attention: str = "sdpa"
) -> PyTorchRunner:
    """Open a checkpoint folder.

    The reference is the default. ``weights`` and ``compute`` name torch's types that the weights are rounded to and that the
    model then computes in, ``attention`` is one of transformers' implementations: what the reference's own noise is made of.
    """
    return PyTorchRunner(Checkpoint.open(path), threads, weights=weights, compute=compute, attention=attention)
