"""What every stage should have made of what it was given: the reference's weights in the export graph's modules.

A stage is judged alone. It gets what the artifact's stage before it has shown, so that an error that was made before, or what
quantisation did to all stages before, is not laid to its charge. A stage that is not shown is computed, and so counts to the
next one that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from asr_core import graph
from asr_core.checkpoint import Checkpoint
from asr_core.decode import Mel
from runners._stages import LOGITS, STATES, Values

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Expected:
    """What a stage should have shown, and of that what it has only passed on (zeros where it passes on nothing)."""

    stage: str
    value: Array
    carried: Array


class Oracle:
    """The stages of a checkpoint, one window at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        weights = checkpoint.state_dict()
        self._encoder, self._decoder = graph.Encoder(checkpoint.dims).eval(), graph.Decoder(checkpoint.dims).eval()
        graph.load_weights(self._encoder, "model.encoder.", weights)
        graph.load_weights(self._decoder, "model.decoder.", weights)

    @torch.inference_mode()
    def expected(self, mel: Mel, tokens: Sequence[int], shown: Values) -> Iterator[Expected]:
        """Every shown stage in order, for a window [1, n_mels, 3000] and the tokens that were fed."""
        walk = _Walk(shown)
        x = self._encode(walk, torch.from_numpy(np.ascontiguousarray(mel)))
        cross = self._cross(walk, x)
        self._decode(walk, torch.tensor([list(tokens)]), cross)
        yield from walk.found

    def _encode(self, walk: _Walk, mel: Tensor) -> Tensor:
        encoder = self._encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2) + encoder.embed_positions.weight
        x = walk.at("encoder.stem", x)
        for i, layer in enumerate(cast("list[graph.EncoderLayer]", list(encoder.layers))):
            h = layer.self_attn_layer_norm(x)
            k, v = layer.self_attn.keys_values(h)
            made = layer.self_attn.output(graph.attend(layer.self_attn.query(h), k, v))
            x = walk.at(f"encoder.{i}.attention", x + made, x)
            x = walk.at(f"encoder.{i}.mlp", x + _feed_forward(layer, x), x)
        return walk.at(STATES, encoder.layer_norm(x))

    def _cross(self, walk: _Walk, states: Tensor) -> list[Tensor]:
        made = iter(self._decoder.cross_keys_values(states))
        layers = range(len(self._decoder.blocks))
        return [walk.at(f"cross.{i}.{kind}", next(made)) for i in layers for kind in ("keys", "values")]

    def _decode(self, walk: _Walk, tokens: Tensor, cross: list[Tensor]) -> None:
        decoder, count = self._decoder, tokens.shape[1]
        later = torch.full((count, count), graph.MASKED).triu(1)
        x = walk.at("decoder.embedding", decoder.embed(tokens, torch.arange(count)))
        for i, layer in enumerate(decoder.blocks):
            h = layer.self_attn_layer_norm(x)
            k, v = layer.self_attn.keys_values(h)
            made = layer.self_attn.output(graph.attend(layer.self_attn.query(h), k, v, later))
            x = walk.at(f"decoder.{i}.attention", x + made, x)
            q = layer.encoder_attn.query(layer.encoder_attn_layer_norm(x))
            made = layer.encoder_attn.output(graph.attend(q, cross[2 * i], cross[2 * i + 1]))
            x = walk.at(f"decoder.{i}.cross", x + made, x)
            x = walk.at(f"decoder.{i}.mlp", x + _feed_forward(layer, x), x)
        walk.at(LOGITS, decoder.logits(x))


class _Walk:
    """Compares at every stage, and goes on with what was shown there."""

    def __init__(self, shown: Values) -> None:
        self._shown = shown
        self.found: list[Expected] = []

    def at(self, stage: str, made: Tensor, carried: Tensor | None = None) -> Tensor:
        """Pass a stage with what the reference makes, [1, …]; returns what the next stage is given."""
        if stage not in self._shown:
            return made
        passed = torch.zeros_like(made) if carried is None else carried
        self.found.append(Expected(stage, made[0].numpy(), passed[0].numpy()))
        return torch.from_numpy(np.ascontiguousarray(self._shown[stage]))[None]


def _feed_forward(layer: graph.EncoderLayer | graph.DecoderLayer, x: Tensor) -> Tensor:
    made: Tensor = layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    return made
