from typing import NamedTuple

import pytest
import torch
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from asr_core import graph
from asr_core.checkpoint import Checkpoint

# Float32 sums in another order; encoder states and logits of these weights are of the order of 1.
TOLERANCE = 1e-5
SHAPES = ["mini", "mini.en", "mini-turbo", "mini-large-v3", "tiny"]


class Pair(NamedTuple):
    """Our modules and transformers' model with the same weights; ours has encoded a window."""

    decoder: graph.Decoder
    theirs: WhisperForConditionalGeneration
    mel: torch.Tensor
    states: torch.Tensor
    cross: list[torch.Tensor]


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, shape_folder) -> Pair:
    checkpoint = Checkpoint.open(shape_folder(request.param))
    encoder, decoder = graph.Encoder(checkpoint.dims), graph.Decoder(checkpoint.dims)
    state = checkpoint.state_dict()
    graph.load_weights(encoder, "model.encoder.", state)
    graph.load_weights(decoder, "model.decoder.", state)
    theirs = WhisperForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    mel = torch.rand((1, checkpoint.dims.n_mels, 3000), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        states, *cross = graph.EncodeWithCross(encoder, decoder)(mel)
    return Pair(decoder, theirs, mel, states, cross)


@torch.inference_mode()
def test_encoder_is_transformers(pair):
    expected = pair.theirs.model.encoder(pair.mel).last_hidden_state
    torch.testing.assert_close(pair.states, expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_steps_are_transformers_full_pass(pair):
    """Prompt, several tokens at once, single tokens: logits and attention are those of one pass over the whole sequence."""
    dims = pair.decoder.dims
    tokens = torch.randint(0, dims.vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    states = BaseModelOutput(last_hidden_state=pair.states.expand(2, -1, -1))
    pair.theirs.set_attn_implementation("eager")  # the others do not show their attention
    expected = pair.theirs(encoder_outputs=states, decoder_input_ids=tokens, output_attentions=True)
    cross = [rows.expand(2, -1, -1, -1) for rows in pair.cross]
    past = [torch.zeros(0, 2, dims.decoder_heads, dims.head_dim) for _ in cross]
    heads = [(dims.decoder_layers - 1, head) for head in range(dims.decoder_heads)] + [(0, dims.decoder_heads - 1)]
    step = graph.DynamicStep(pair.decoder, heads)
    produced, asked = [], []
    for piece in tokens.split([4, 3, 1, 1, 1, 1, 1], dim=1):
        logits, queries, *new = step(piece, torch.arange(piece.shape[1]), past, cross)
        last, *_ = step(piece, torch.tensor([piece.shape[1] - 1]), past, cross)
        torch.testing.assert_close(last, logits[:, -1:], rtol=0, atol=TOLERANCE)
        asked.append(queries)
        assert [tuple(rows.shape) for rows in new] == [(piece.shape[1], *past[0].shape[1:])] * len(past)
        past = [torch.cat(rows) for rows in zip(past, new, strict=True)]
        produced.append(logits)
    torch.testing.assert_close(torch.cat(produced, 1), expected.logits, rtol=0, atol=TOLERANCE)
    keys = torch.stack([cross[2 * layer][:, head] for layer, head in heads], 1)
    attention = (torch.cat(asked, 2) @ keys.mT).softmax(-1)
    theirs = torch.stack([expected.cross_attentions[layer][:, head] for layer, head in heads], 1)
    torch.testing.assert_close(attention, theirs, rtol=0, atol=TOLERANCE)


def test_load_weights_refuses_a_missing_tensor(shape_folder):
    checkpoint = Checkpoint.open(shape_folder("mini"))
    state = checkpoint.state_dict()
    del state["model.encoder.conv1.bias"]
    with pytest.raises(RuntimeError, match=r"conv1\.bias"):
        graph.load_weights(graph.Encoder(checkpoint.dims), "model.encoder.", state)
