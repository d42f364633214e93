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
    """Encoder states [B, 1500, D], transformers' cache, and of each row which encoded window it is, [B]."""

    encoded: torch.Tensor
    cache: Any
    origin: NDArray[np.int64]


class PyTorchRunner(StepRunner):
    """transformers' model behind the step interface."""

    def __init__(
        self, checkpoint: Checkpoint, threads: int, *, weights: str = "float32", compute: str = "float32", attention: str = "sdpa"
    ) -> None:
        torch.set_num_threads(threads)
        disable_progress_bar()
        self.folder = checkpoint.path
        self.dims = checkpoint.dims
        self.alignment_heads: list[tuple[int, int]] = checkpoint.alignment_heads
        self.tokens = TokenIds.read(checkpoint.path, checkpoint.generation, checkpoint.dims.n_text_ctx)
        self.model = (
            WhisperForConditionalGeneration.from_pretrained(
                checkpoint.path, dtype=torch.float32, attn_implementation=attention, local_files_only=True
            )
            .eval()
            .requires_grad_(requires_grad=False)
        )
        self.model.to(getattr(torch, weights)).to(getattr(torch, compute))

    @torch.inference_mode()
    def encode(self, mel: Mel) -> State:
        """Run the encoder; the cache starts empty."""
        features = torch.from_numpy(np.ascontiguousarray(mel)).to(self.model.device, self.model.dtype)
        encoded = self.model.model.encoder(features).last_hidden_state
        return State(encoded, None, np.arange(len(mel)))

    @torch.inference_mode()
    def step(self, tokens: NDArray[np.int64], state: State) -> Logits:
        """One forward pass of the decoder over the new tokens."""
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=state.encoded),
            decoder_input_ids=torch.from_numpy(tokens).to(self.model.device),
            past_key_values=state.cache,
            use_cache=True,
        )
        state.cache = out.past_key_values
        logits: Logits = out.logits.float().cpu().numpy()
        return logits

    def step_with_queries(self, tokens: NDArray[np.int64], state: State) -> tuple[Logits, NDArray[np.float32]]:
        """A step during which the query projections tell what they make."""
        made: dict[int, torch.Tensor] = {}
        blocks = [layer.encoder_attn for layer in self.model.model.decoder.layers]
        hooks = [
            block.q_proj.register_forward_hook(lambda _, __, out, layer=layer: made.__setitem__(layer, out))
            for layer, block in enumerate(blocks)
        ]
        try:
            logits = self.step(tokens, state)
        finally:
            for hook in hooks:
                hook.remove()
        heads = self.dims.decoder_heads
        chosen = [made[layer].unflatten(-1, (heads, -1))[:, :, head] for layer, head in self.alignment_heads]
        queries = torch.stack(chosen, 1).float() * self.dims.head_dim**-0.5
        return logits, queries.numpy()

    def evidence(self, mel: Mel, tokens: list[int]) -> NDArray[np.float32]:
        """How much each audio position says for each token but the first, of one window: float32 [tokens - 1, F].

        The size of the gradient of the token's log-probability by the position's encoder state.
        """
        states = torch.from_numpy(self.encoder_states(mel)).to(self.model.dtype).requires_grad_()
        with torch.enable_grad():
            out = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=torch.tensor([tokens[:-1]])
            )
            chances = out.logits[0].log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
        gradients = [torch.autograd.grad(chance, states, retain_graph=True)[0][0].norm(dim=-1) for chance in chances]
        sizes: NDArray[np.float32] = torch.stack(gradients).float().numpy()
        return sizes

    @torch.inference_mode()
    def cross_keys(self, state: State, layer: int) -> NDArray[np.float32]:
        """Projected anew: transformers' cache has them only where its kind holds them."""
        keys = self.model.model.decoder.layers[layer].encoder_attn.k_proj(state.encoded)
        split: NDArray[np.float32] = keys.unflatten(-1, (self.dims.decoder_heads, -1)).transpose(1, 2).float().numpy()
        return split

    def reorder(self, state: State, rows: NDArray[np.int64]) -> State:
        """Select rows of the cache and, where rows change their window, of all that belongs to windows."""
        index = torch.from_numpy(rows)
        cache: EncoderDecoderCache = state.cache
        cache.self_attention_cache.batch_select_indices(index)
        origin = state.origin[rows]
        if np.array_equal(origin, state.origin):
            return State(state.encoded, cache, origin)
        cache.cross_attention_cache.batch_select_indices(index)
        return State(state.encoded[index], cache, origin)

    def restart(self, state: State, rows: NDArray[np.int64]) -> State:
        """The same encoder states, with a new cache."""
        return State(state.encoded[torch.from_numpy(rows)], None, np.arange(len(rows)))

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
