"""The stages that CTranslate2 shows: the encoder's states, and the logits of tokens that it is told to generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from asr_core.decode import Logits, Mel
from runners._stages import Closed
from runners.ctranslate2 import CTranslate2Runner

HIDDEN = (
    "CTranslate2 shows the encoder's states, the logits and the tokens, neither layers nor cross-attention K/V: a fault before "
    "one of these is named as its stage"
)


class Runner(CTranslate2Runner):
    """The runner, with logits."""

    def score(self, mel: Mel, tokens: list[int]) -> Logits:
        """Logits [T, vocab] of which those after the prompt are CTranslate2's; it tells none before, so they are NaN.

        Tokens that follow a prompt are taken for the beginning of the transcript, which it generates as it is told.
        """
        prompt = len(self.tokens.prompt())
        result = self._model.generate(
            self._encode(mel),
            [tokens],
            beam_size=1,
            max_length=self.dims.n_text_ctx,
            suppress_tokens=[],
            suppress_blank=False,
            return_logits_vocab=True,
        )[0]
        told = np.stack([np.array(position) for position in result.logits[0][: len(tokens) - prompt + 1]])
        return np.concatenate([np.full((prompt - 1, self.dims.vocab), np.nan, np.float32), told])


def open(path: Path, threads: int) -> Closed:
    """Open an artifact folder."""
    return Closed(Runner(path, threads), HIDDEN)
