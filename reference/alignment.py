"""Finds the cross-attention heads that look at the sentence they are writing."""

from random import Random

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import WhisperForConditionalGeneration

from reference.batches import POSITION, STAGES, Utterance, collate, draw_utterance
from reference.synth import SAMPLE_RATE

Shares = npt.NDArray[np.float64]  # [layer, head], each from 0 to 1

_WINDOWS = 12
_CLOSE_TO_BEST = 0.9


def alignment_heads(model: WhisperForConditionalGeneration, tokenizer: Tokenizer, seed: int = 7) -> list[tuple[int, int]]:
    """Return (layer, head) of the heads whose share inside the right sentence is near the best."""
    shares = head_shares(model, tokenizer, seed)
    enough = _CLOSE_TO_BEST * shares.max()
    return [(int(layer), int(head)) for layer, head in np.argwhere(shares >= enough)]


@torch.no_grad()
def head_shares(model: WhisperForConditionalGeneration, tokenizer: Tokenizer, seed: int) -> Shares:
    """Return each head's mean attention inside the sentence of the next token, [layer, head]."""
    random = Random(seed)
    attention = model.config._attn_implementation  # noqa: SLF001  (it has no public name)
    model.set_attn_implementation("eager")  # the fused kernels do not return their weights
    try:
        drawn = [draw_utterance(random, STAGES[-1], {}, held_out=True) for _ in range(_WINDOWS)]
        shares = [_shares(model, tokenizer, u) for u in drawn if len(u.segments) > 1]
    finally:
        model.set_attn_implementation(attention)
    mean: Shares = np.stack(shares).mean(axis=0)
    return mean


def _shares(model: WhisperForConditionalGeneration, tokenizer: Tokenizer, utterance: Utterance) -> Shares:
    batch = collate([utterance], tokenizer, full=True)
    output = model(batch.mel, decoder_input_ids=batch.inputs, output_attentions=True)
    weights = torch.cat(output.cross_attentions).double().numpy()  # [layer, head, token, position]
    row = batch.inputs.shape[1] - 1  # the last input predicts the end; text tokens come before it
    inside: list[Shares] = []
    for segment in reversed(utterance.segments):
        first, last = (round(t * SAMPLE_RATE / POSITION) for t in (segment.start, segment.end))
        for _ in tokenizer.encode(f" {segment.text}", add_special_tokens=False).ids:
            row -= 1  # the input before a token is the one that predicts it
            inside.append(weights[:, :, row, first : last + 1].sum(-1))
    mean: Shares = np.stack(inside).mean(axis=0)
    return mean
