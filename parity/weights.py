"""The weights axis: encoder states and teacher-forced logits of the probes against the reference's, position by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr_core.decode import log_softmax

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Probe:
    """One probe's errors by position; the four logits arrays are None where the runtime shows no logits.

    ``encoder_*`` float64 [F] over the encoder's positions: largest absolute error, and the energies (sums of squares) of the
    error and of the reference. ``logits_max_abs``, ``kl`` (nats, reference against candidate), ``margin`` (the reference's
    top-2 logit margin) float64 [T] and ``agreed`` bool [T] over the forced positions. Scales are the reference's largest
    magnitudes.
    """

    encoder_max_abs: Floats
    encoder_error_energy: Floats
    encoder_energy: Floats
    encoder_scale: float
    logits_max_abs: Floats | None = None
    kl: Floats | None = None
    agreed: NDArray[np.bool_] | None = None
    margin: Floats | None = None
    logits_scale: float = 1.0


def weights_file(folder: Path, index: int) -> Path:
    """Where a measurement keeps a probe's encoder states and logits."""
    return folder / f"weights-{index}.npz"


def positions_file(folder: Path, index: int) -> Path:
    """Where a comparison keeps a probe's errors by position."""
    return folder / f"positions-{index}.npz"


def compare_probes(reference: Path, candidate: Path) -> dict[int, Probe]:
    """Every probe of two measurement folders, by utterance index."""
    probes = {}
    for file in sorted(reference.glob("weights-*.npz"), key=_index):
        with np.load(file) as expected, np.load(candidate / file.name) as got:
            probes[_index(file)] = probe(expected, got)
    return probes


def probe(expected: Arrays, got: Arrays) -> Probe:
    """Compare the arrays of one probe: ``encoder`` float32 [F, D] and, where there are any, ``logits`` float32 [T, vocab]."""
    states = expected["encoder"].astype(np.float64)
    error = got["encoder"] - states
    encoder = {
        "encoder_max_abs": np.abs(error).max(-1),
        "encoder_error_energy": np.square(error).sum(-1),
        "encoder_energy": np.square(states).sum(-1),
        "encoder_scale": float(np.abs(states).max()),
    }
    if "logits" not in got:
        return Probe(**encoder)
    logits, candidate = expected["logits"], got["logits"]
    return Probe(
        **encoder,
        logits_max_abs=np.abs(candidate.astype(np.float64) - logits).max(-1),
        kl=divergence(logits, candidate),
        agreed=logits.argmax(-1) == candidate.argmax(-1),
        margin=top2_margin(logits),
        logits_scale=float(np.abs(logits).max()),
    )


def divergence(expected: NDArray[np.float32], got: NDArray[np.float32]) -> Floats:
    """Kullback-Leibler divergence KL(expected || got) of the softmaxes of logits [..., vocab], in nats, float64 [...]."""
    p, q = log_softmax(expected), log_softmax(got)
    # Never below zero (Gibbs); what rounding leaves below it is none.
    divergence: Floats = np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
    return divergence


def top2_margin(logits: NDArray[np.float32]) -> Floats:
    """How far the best logit [..., vocab] is above the second best: float64 [...]."""
    best = np.partition(logits, -2, axis=-1)[..., -2:].astype(np.float64)
    margin: Floats = best[..., 1] - best[..., 0]
    return margin


def figures(probes: Iterable[Probe]) -> dict[str, float]:
    """The axis in numbers: the worst over all probes, but for the mean KL and the share of agreeing positions.

    ``*_error`` is the absolute error in units of the reference's largest magnitude where that is above 1. A NaN in any
    probe is a NaN here. Logits figures are missing where a runtime shows none.
    """
    every = list(probes)
    if not every:
        return {}
    relative = np.array([np.sqrt(one.encoder_error_energy.sum() / one.encoder_energy.sum()) for one in every])
    worst = float(relative.max())
    found = {
        "encoder_max_abs": _worst(one.encoder_max_abs for one in every),
        "encoder_error": _worst(one.encoder_max_abs / max(1.0, one.encoder_scale) for one in every),
        "encoder_rel_l2": worst,
        "encoder_snr_db": float(-20 * np.log10(worst)) if worst else np.inf,
    }
    scored = [(one.logits_max_abs, one.logits_scale) for one in every if one.logits_max_abs is not None]
    if not scored:
        return found
    kl = np.concatenate([one.kl for one in every if one.kl is not None])
    agreed = np.concatenate([one.agreed for one in every if one.agreed is not None])
    return found | {
        "logits_max_abs": _worst(errors for errors, _ in scored),
        "logits_error": _worst(errors / max(1.0, scale) for errors, scale in scored),
        "logits_kl_mean": float(kl.mean()),
        "logits_kl_max": float(kl.max()),
        "top1_agreement": float(agreed.mean()),
    }


def top1_breaks(probes: Iterable[Probe], tie: float) -> int | None:
    """Forced positions whose best token is another although the reference's margin is at least ``tie``.

    None where the runtime shows no logits.
    """
    scored = ((one.agreed, one.margin) for one in probes if one.agreed is not None and one.margin is not None)
    counts = [int((~agreed & (margin >= tie)).sum()) for agreed, margin in scored]
    return sum(counts) if counts else None


def save_positions(probes: Mapping[int, Probe], folder: Path) -> None:
    """Keep every probe's errors by position below ``folder``, one file a probe, its arrays named as in :class:`Probe`."""
    for index, one in probes.items():
        np.savez(positions_file(folder, index), **{name: value for name, value in vars(one).items() if value is not None})


def load_positions(folder: Path) -> dict[int, Probe]:
    """What :func:`save_positions` kept, by utterance index."""
    probes = {}
    for file in sorted(folder.glob("positions-*.npz"), key=_index):
        with np.load(file) as kept:
            arrays: dict[str, Any] = {name: kept[name] if kept[name].ndim else float(kept[name]) for name in kept}
        probes[_index(file)] = Probe(**arrays)
    return probes


def _worst(errors: Iterable[Floats]) -> float:
    # A NaN must fail every bound: np.max carries it on, and max() of Python would lose it.
    return float(np.max([one.max() for one in errors]))


def _index(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])
