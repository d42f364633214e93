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
        """Logits of the last positions, from the end of the prompt on [T - prompt + 1, vocab]: it tells none before.

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
        return np.stack([np.array(position) for position in result.logits[0][: len(tokens) - prompt + 1]])


def open(path: Path, threads: int) -> Closed:
    """Open an artifact folder."""
    return Closed(Runner(path, threads), HIDDEN)
