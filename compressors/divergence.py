"""How far a model's predictions are from another's: the mean KL divergence under teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asr_core.decode import Logits
from asr_core.errors import UsageError
from compressors.calibration import Window, logits
from compressors.model import Model
from parity import weights


def mean_kl(parent: Model, candidate: Model, heard: Sequence[Window], seen: Sequence[str] = ()) -> float:
    """Mean KL(parent || candidate) in nats over every position of the texts and their ends, forced with the windows' tokens.

    ``seen`` are the clips that the candidate was calibrated on, as its record lists them; :class:`UsageError` where one of them
    is to judge.
    """
    shared = {window.clip for window in heard} & set(seen)
    if shared:
        raise UsageError(f"{len(shared)} of the {len(heard)} clips were used to calibrate: judge on others.")
    return mean(predictions(parent, heard), predictions(candidate, heard))


def predictions(model: Model, heard: Sequence[Window]) -> list[Logits]:
    """A model's logits for the text of every window, forced with its tokens."""
    module = model.module()
    return [logits(module, window).numpy() for window in heard]


def mean(ours: Sequence[Logits], theirs: Sequence[Logits]) -> float:
    """Mean KL(ours || theirs) in nats over every position of every window."""
    return float(np.concatenate(list(map(weights.divergence, ours, theirs))).mean())
