"""Which cross-attention heads follow the sound: found by what they look at, for checkpoints that do not say.

A head tells when a word is said if it looks where the model hears it. Where that is, the model's own gradient shows: how much
each audio position's state changes the probability of the token. A head that runs through the sound in order but one word late,
as small models have, looks just as tidy; what tells it apart is that it agrees better with the token before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asr_core.align import FRAMES_A_POSITION, AlignRequest, Scores, softmax
from asr_core.errors import UsageError

# Heads this close to the best are taken, too: averaging several evens out their errors.
CLOSE_TO_BEST = 0.8

Head = tuple[int, int]  # decoder layer, head


def agreement(scores: Scores, evidence: NDArray[np.float32], request: AlignRequest) -> NDArray[np.float64]:
    """How much better each head agrees with what its own token is heard from than with what the others are, [heads].

    ``scores`` [heads, tokens, F] are raw attention and ``evidence`` [tokens, F] sizes of gradients, both at the inputs that
    predict the request's tokens, of which there are two at least. Agreement is the overlap (Bhattacharyya coefficient) of the
    two as distributions over the positions that hold sound; a head that looks everywhere agrees with all tokens alike: 0.
    """
    heard = max(1, request.frames // FRAMES_A_POSITION)
    wanted = evidence[:, :heard] + np.finfo(np.float32).tiny
    wanted = np.sqrt(wanted / wanted.sum(-1, keepdims=True))
    overlaps = np.stack([np.sqrt(softmax(head[:, :heard])) @ wanted.T for head in scores])  # [heads, looking, heard]
    own = overlaps.trace(axis1=1, axis2=2)
    tokens = len(wanted)
    mean: NDArray[np.float64] = own / tokens - (overlaps.sum((1, 2)) - own) / (tokens * (tokens - 1))
    return mean


def choose(heads: Sequence[Head], agreements: NDArray[np.float64]) -> list[Head]:
    """The heads whose agreement is close to the best one's, in their order."""
    enough = CLOSE_TO_BEST * agreements.max()
    return [head for head, agreed in zip(heads, agreements, strict=True) if agreed >= enough]


def parse(text: str) -> list[Head]:
    """``layer:head,layer:head`` → pairs; raises :class:`UsageError` for anything else."""
    try:
        pairs = [tuple(int(number) for number in pair.split(":")) for pair in text.split(",")]
        return [(layer, head) for layer, head in pairs]
    except ValueError:
        raise UsageError(f"{text!r} is no list of alignment heads: layer:head, separated by commas, as in 3:0,3:2.") from None
