"""Finds the cross-attention heads that look at the word they are writing."""

from random import Random

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import WhisperForConditionalGeneration

from reference.batches import STAGES, Pool, Utterance, Writer, collate, draw_utterance

Shares = npt.NDArray[np.float64]  # [layer, head], each from 0 to 1

_WINDOWS = 16
_CLOSE_TO_BEST = 0.9


def alignment_heads(model: WhisperForConditionalGeneration, tokenizer: Tokenizer, seed: int = 7) -> list[tuple[int, int]]:
    """Return (layer, head) of the heads whose share inside the right word is near the best."""
    shares = head_shares(model, tokenizer, seed)
    enough = _CLOSE_TO_BEST * shares.max()
    return [(int(layer), int(head)) for layer, head in np.argwhere(shares >= enough)]


@torch.no_grad()
def head_shares(model: WhisperForConditionalGeneration, tokenizer: Tokenizer, seed: int) -> Shares:
    """Return each head's mean attention inside the next token, in held-out transcribed windows, [layer, head]."""
    random, writer = Random(seed), Writer(tokenizer)
    pool = Pool(random, held_out=True)
    attention = model.config._attn_implementation  # noqa: SLF001  (it has no public name)
    model.set_attn_implementation("eager")  # the fused kernels do not return their weights
    inside: list[npt.NDArray[np.float64]] = []  # [layer, head, tokens]
    try:
        while len(inside) < _WINDOWS:
            utterance = draw_utterance(random, STAGES[-1], pool)
            if utterance.segments and not utterance.translated:
                inside.append(_inside(model, writer, [utterance]))
    finally:
        model.set_attn_implementation(attention)
    mean: Shares = np.concatenate(inside, axis=-1).mean(axis=-1)
    return mean


def _inside(model: WhisperForConditionalGeneration, writer: Writer, window: list[Utterance]) -> npt.NDArray[np.float64]:
    """Return each head's attention inside the next token, for the tokens of a window's text, [layer, head, tokens]."""
    batch = collate(window, writer, full=True)
    output = model(batch.mel, decoder_input_ids=batch.inputs, output_attentions=True)
    weights = torch.cat(output.cross_attentions).double()  # [layer, head, token, position]
    words = (batch.labels[0] < writer.end) & ~batch.spans[0, :, 0].isnan()
    places = torch.arange(weights.shape[-1])
    spans = batch.spans[0][words]
    mask = (places >= spans[:, :1]) & (places <= spans[:, 1:])
    mass: npt.NDArray[np.float64] = (weights[:, :, words] * mask).sum(-1).numpy()
    return mass
