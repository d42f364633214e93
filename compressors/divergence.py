"""How far a model's predictions are from another's: the mean KL divergence under teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    ours, theirs = parent.module(), candidate.module()
    found = [weights.divergence(logits(ours, window).numpy(), logits(theirs, window).numpy()) for window in heard]
    return float(np.concatenate(found).mean())
