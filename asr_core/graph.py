"""The export graph: thin torch modules that every exporter shares, the project's only torch modelling code.

Parameter names are those of Hugging Face's Whisper, so a checkpoint's tensors load without renaming. Every fixed size is
a Python constant because tracers stumble on ``x.shape``. Whisper's shapes: Radford et al. 2022, section 2.2.

Axes: B batch, T new tokens, P past tokens, F audio positions (1500), D model width, H heads, E = D / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint
    from asr_core.dims import Dims
    from asr_core.graph_weights import GraphWeights

# The output of a decoder step that :meth:`Decoder.choose_heads` makes.
ALIGNMENT_QUERIES = "alignment_queries"

Heads = Sequence[tuple[int, int]]  # (decoder layer, head)

# Large enough to vanish in a softmax, small enough for float16 (largest value 65504).
MASKED = -1e4


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] → [B, H, T, E]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, E] → [B, T, D]."""
    return x.transpose(1, 2).flatten(2)


def _runs(heads: Heads) -> list[tuple[int, int, int]]:
    """Heads in their order as runs of neighbours: layer, first, one after the last."""
    runs: list[tuple[int, int, int]] = []
    for layer, head in heads:
        if runs and (runs[-1][0], runs[-1][2]) == (layer, head):
            runs[-1] = (layer, runs[-1][1], head + 1)
        else:
            runs.append((layer, head, head + 1))
    return runs


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of [B, H, T, E] queries over [B, H, S, E]; the scale is already in ``q``."""
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


class Factored(nn.Module):
    """A linear layer whose weight [N, K] is left [N, R] @ right [R, K]: two smaller ones in a row."""

    def __init__(self, inputs: int, rank: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.right = nn.Linear(inputs, rank, bias=False)
        self.left = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[…, K] → […, N]."""
        y: Tensor = self.left(self.right(x))
        return y


class Attention(nn.Module):
    """The four projections of one attention block (Whisper's key projection has no bias)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def query(self, x: Tensor) -> Tensor:
        """Scaled queries [B, H, T, E]."""
        return split_heads(self.q_proj(x) * self.scale, self.heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, E] of the attended sequence."""
        return split_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads)

    def output(self, attended: Tensor) -> Tensor:
        """Project attended heads back to the model width."""
        projected: Tensor = self.out_proj(merge_heads(attended))
        return projected


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform hidden states [B, F, D]."""
        h = self.self_attn_layer_norm(x)
        k, v = self.self_attn.keys_values(h)
        x = x + self.self_attn.output(attend(self.self_attn.query(h), k, v))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nn.Module):
    """Log-mel → encoder states; state-dict prefix ``model.encoder.``."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        width = dims.d_model
        self.conv1 = nn.Conv1d(dims.n_mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(dims.n_audio_ctx, width)
        self.layers = nn.ModuleList(EncoderLayer(width, dims.encoder_heads, dims.encoder_ffn) for _ in range(dims.encoder_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode float [B, n_mels, 2F] log-mel into float [B, F, D] states."""
        x = self.stem(mel)
        return self.transform(x + self.embed_positions.weight[: x.shape[1]])

    def stem(self, mel: Tensor) -> Tensor:
        """The convolutions: float [B, n_mels, 2F] → [B, F, D]."""
        return F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)

    def transform(self, x: Tensor) -> Tensor:
        """Everything after the positions were added: [B, F, D] → states [B, F, D]."""
        for layer in self.layers:
            x = layer(x)
        states: Tensor = self.layer_norm(x)
        return states


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention over past and new rows, cross-attention, feed-forward."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = Attention(width, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def cross_and_ffn(self, x: Tensor, cross_k: Tensor, cross_v: Tensor) -> tuple[Tensor, Tensor]:
        """Everything after self-attention; cross keys and values are [B, H, F, E]. Also returns the queries [B, H, T, E]."""
        q = self.encoder_attn.query(self.encoder_attn_layer_norm(x))
        x = x + self.encoder_attn.output(attend(q, cross_k, cross_v))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))), q


class Decoder(nn.Module):
    """The text decoder's weights and embedding; state-dict prefix ``model.decoder.``.

    Exporters wrap it in the form that their runtime wants, as :class:`DynamicStep` does. The head is tied to the embedding,
    as in every Whisper.
    """

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        width = dims.d_model
        self.dims = dims
        self.embed_tokens = nn.Embedding(dims.vocab, width)
        self.embed_positions = nn.Embedding(dims.n_text_ctx, width)
        self.layers = nn.ModuleList(DecoderLayer(width, dims.decoder_heads, dims.decoder_ffn) for _ in range(dims.decoder_layers))
        self.layer_norm = nn.LayerNorm(width)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token plus learned position embeddings: int [B, T] and int [T] → [B, T, D]."""
        embedded: Tensor = self.embed_tokens(tokens) + self.embed_positions(positions)
        return embedded

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, D] → logits [B, T, vocab]."""
        return self.layer_norm(x) @ self.embed_tokens.weight.t()

    def choose_heads(self, queries: Sequence[Tensor], heads: Heads) -> Tensor:
        """Each layer's cross-attention queries [B, H, T, E] → those of the given heads, [B, heads, T, E].

        That is what word timestamps need of a decoder: whoever has the cross-attention keys multiplies them with it. The
        products themselves would be 1500 numbers a head and token, written at every step and read by nobody while decoding.
        """
        every = (0, self.dims.decoder_heads)
        pieces = [
            queries[layer] if (first, after) == every else queries[layer][:, first:after] for layer, first, after in _runs(heads)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    @property
    def blocks(self) -> list[DecoderLayer]:
        """The layers, typed."""
        return cast("list[DecoderLayer]", list(self.layers))

    def cross_keys_values(self, states: Tensor) -> list[Tensor]:
        """Cross-attention K then V of every layer, [B, H, F, E] each: [k0, v0, k1, v1, …]."""
        pairs = (layer.encoder_attn.keys_values(states) for layer in self.blocks)
        return [tensor for pair in pairs for tensor in pair]


class EncodeWithCross(nn.Module):
    """Mel of any length up to a window → encoder states and the cross-attention K/V of every decoder layer, computed once."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, mel: Tensor) -> tuple[Tensor, ...]:
        """[B, n_mels, 2F] → (states [B, F, D], k0, v0, k1, v1, …) with K/V [B, H, F, E]."""
        states = self.encoder(mel)
        return (states, *self.decoder.cross_keys_values(states))


class DynamicStep(nn.Module):
    """Decoder step for runtimes with dynamic shapes: T ≥ 1 new tokens after P ≥ 0 past ones, one graph for both.

    It returns only the *new* K/V rows (delta cache); whoever runs it owns the cache. Rows are laid out [P, B, H, E], so that
    the first P rows of a longer buffer are contiguous memory.
    """

    def __init__(self, decoder: Decoder, heads: Heads) -> None:
        super().__init__()
        self.decoder = decoder
        self.heads = heads

    def forward(self, tokens: Tensor, logits_at: Tensor, past: Sequence[Tensor], cross: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One step.

        Tokens int [B, T]; logits_at int [R], the new tokens whose logits are wanted; past 2L × [P, B, H, E]; cross
        2L × [B, H, F, E] → (logits [B, R, vocab], alignment queries [B, heads, T, E], new rows 2L × [T, B, H, E]).
        """
        p = past[0].shape[0]
        t = tokens.shape[1]
        positions = torch.arange(p, p + t, device=tokens.device)
        mask = (torch.arange(p + t, device=tokens.device)[None, :] > positions[:, None]) * MASKED
        x = self.decoder.embed(tokens, positions)
        mask = mask.to(x.dtype)
        new: list[Tensor] = []
        queries: list[Tensor] = []
        for i, layer in enumerate(self.decoder.blocks):
            attn = layer.self_attn
            h = layer.self_attn_layer_norm(x)
            k_new = attn.k_proj(h).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
            v_new = attn.v_proj(h).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
            k = torch.cat([past[2 * i], k_new]).permute(1, 2, 0, 3)
            v = torch.cat([past[2 * i + 1], v_new]).permute(1, 2, 0, 3)
            x = x + attn.output(attend(attn.query(h), k, v, mask))
            x, q = layer.cross_and_ffn(x, cross[2 * i], cross[2 * i + 1])
            queries.append(q)
            new += [k_new, v_new]
        logits = self.decoder.logits(x.index_select(1, logits_at))
        return (logits, self.decoder.choose_heads(queries, self.heads), *new)


class EncodeShort(nn.Module):
    """Mel of any length up to a window → the cross-attention K and V of all layers, heads not split, and the states."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n_mels, T] → K and V [L, B, F, D], states [B, F, D]."""
        states = self.encoder(mel)
        keys = torch.stack([layer.encoder_attn.k_proj(states) for layer in self.decoder.blocks])
        values = torch.stack([layer.encoder_attn.v_proj(states) for layer in self.decoder.blocks])
        return keys, values, states


class FixedStep(nn.Module):
    """Decoder step over caches of the full text context, which it returns with the new rows in their places."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor, cross_keys: Tensor, cross_values: Tensor, offset: Tensor
    ) -> tuple[Tensor, ...]:
        """Tokens int [B, T] at ``offset`` int [1]; caches [L, B, n_text_ctx, D]; cross [L, B, F, D]; heads are not split."""
        decoder = self.decoder
        positions = offset + torch.arange(tokens.shape[1], device=tokens.device)
        slots = torch.arange(decoder.dims.n_text_ctx, device=tokens.device)
        x = decoder.embed(tokens, positions)
        mask = ((slots[None, :] > positions[:, None]) * MASKED).to(x.dtype)
        made: list[tuple[Tensor, Tensor]] = []
        for i, layer in enumerate(decoder.blocks):
            attn, h = layer.self_attn, layer.self_attn_layer_norm(x)
            k = keys[i].index_copy(1, positions, attn.k_proj(h))
            v = values[i].index_copy(1, positions, attn.v_proj(h))
            x = x + attn.output(attend(attn.query(h), split_heads(k, attn.heads), split_heads(v, attn.heads), mask))
            cross = (split_heads(rows[i], attn.heads) for rows in (cross_keys, cross_values))
            x, _ = layer.cross_and_ffn(x, *cross)
            made.append((k, v))
        return (decoder.logits(x), *(torch.stack(rows) for rows in zip(*made, strict=True)))


class GrowingStep(nn.Module):
    """Decoder step in the form that Hugging Face's clients pass a cache: [B, H, P, E] in, the whole [B, H, P + T, E] out."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, past: Sequence[Tensor], cross: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tokens int [B, T]; past 2L × [B, H, P, E]; cross 2L × [B, H, F, E] → (logits [B, T, vocab], 2L × [B, H, P + T, E])."""
        p = past[0].shape[2]
        t = tokens.shape[1]
        positions = torch.arange(p, p + t, device=tokens.device)
        mask = (torch.arange(p + t, device=tokens.device)[None, :] > positions[:, None]) * MASKED
        x = self.decoder.embed(tokens, positions)
        mask = mask.to(x.dtype)
        present: list[Tensor] = []
        for i, layer in enumerate(self.decoder.blocks):
            h = layer.self_attn_layer_norm(x)
            new = layer.self_attn.keys_values(h)
            k, v = (torch.cat([old, rows], 2) for old, rows in zip(past[2 * i : 2 * i + 2], new, strict=True))
            x = x + layer.self_attn.output(attend(layer.self_attn.query(h), k, v, mask))
            x, _ = layer.cross_and_ffn(x, cross[2 * i], cross[2 * i + 1])
            present += [k, v]
        return (self.decoder.logits(x), *present)


class CrossKeysValues(nn.Module):
    """Encoder states → the cross-attention K/V of every decoder layer, where a graph of its own computes them."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """[B, F, D] → (k0, v0, k1, v1, …), [B, H, F, E] each."""
        return tuple(self.decoder.cross_keys_values(states))


ENCODER = "model.encoder."
DECODER = "model.decoder."


def encoder(checkpoint: Checkpoint) -> Encoder:
    """The encoder with the layers that ``checkpoint.graph_weights`` has tensors for, as yet without their values."""
    module = Encoder(checkpoint.dims)
    _shape(module, ENCODER, checkpoint.graph_weights)
    return module


def decoder(checkpoint: Checkpoint) -> Decoder:
    """The decoder with the layers that ``checkpoint.graph_weights`` has tensors for, as yet without their values."""
    module = Decoder(checkpoint.dims)
    _shape(module, DECODER, checkpoint.graph_weights)
    return module


def _shape(module: nn.Module, prefix: str, weights: GraphWeights) -> None:
    """Give a module's attentions and linear layers the sizes of the tensors below ``prefix``, factored ones as two."""
    names = set(weights.names)
    for path, attention in list(module.named_modules()):
        if isinstance(attention, Attention) and f"{prefix}{path}.out_proj.weight" in names:
            width = attention.q_proj.out_features // attention.heads
            attention.heads = weights.shape(f"{prefix}{path}.out_proj.weight")[1] // width
    for path, linear in list(module.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        parent, _, name = path.rpartition(".")
        stem, bias = f"{prefix}{path}", linear.bias is not None
        if f"{stem}.right.weight" in names:
            rank, k = weights.shape(f"{stem}.right.weight")
            setattr(module.get_submodule(parent), name, Factored(k, rank, linear.out_features, bias=bias))
        elif weights.shape(f"{stem}.weight") != tuple(linear.weight.shape):
            n, k = weights.shape(f"{stem}.weight")
            setattr(module.get_submodule(parent), name, nn.Linear(k, n, bias=bias))


def load_weights(module: nn.Module, prefix: str, state: dict[str, Tensor]) -> None:
    """Copy ``prefix``-ed tensors of a Whisper state dict into ``module``; a missing one is an error."""
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    module.load_state_dict(own, strict=True)
