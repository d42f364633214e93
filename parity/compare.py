"""Compare measurements with the reference's: a pure function of files, so that machines meet only as JSON."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from asr_core.errors import GateError
from parity import measure
from parity.data import Utterance

Normalise = Callable[[str], str]
Bounds = Mapping[str, Mapping[str, Any]]
# What means nothing where something else than the runtime does its work.
TIMINGS = (
    "rtfx", "latency_p50_s", "latency_p95_s", "ttft_s", "tokens_per_s", "load_s", "peak_rss_mb", "speedup",
)  # fmt: skip


@dataclass(frozen=True)
class WordErrors:
    """Pooled edit counts over a set; what is heard in an empty reference counts as insertions."""

    errors: int
    words: int

    @property
    def rate(self) -> float | None:
        """Errors a reference word; None where the set holds no words at all."""
        return self.errors / self.words if self.words else None


@dataclass(frozen=True)
class Row:
    """One line of the report: an artifact, its verdict, and every figure; None is "not measured".

    Rates are fractions, times seconds, sizes MB (10⁶ bytes). ``first_divergence`` holds the utterance, the position of the
    first differing token and PyTorch's top-2 logit margin there.
    """

    target: str
    precision: str
    status: str
    reason: str = ""
    decoder: str | None = None
    encoder_max_abs: float | None = None
    logits_max_abs: float | None = None
    top1_agreement: float | None = None
    token_match: float | None = None
    near_ties: int | None = None
    first_divergence: dict[str, Any] | None = None
    wer: float | None = None
    delta_wer: float | None = None
    cer: float | None = None
    rtfx: float | None = None
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    load_s: float | None = None
    peak_rss_mb: float | None = None
    size_mb: float | None = None
    speedup: float | None = None


def thresholds(gates: str, precision: str) -> Bounds:
    """The bounds of a precision in one set of gates, ``parity`` or ``export``, from ``thresholds.toml``.

    A variant of a precision, named after a dash, keeps its bounds.
    Raises :class:`GateError` where it has none: an artifact that nothing judges must not pass.
    """
    text = resources.files("parity").joinpath("thresholds.toml").read_text(encoding="utf-8")
    bounds: Bounds | None = tomllib.loads(text)[gates].get(precision.partition("-")[0])
    if bounds is None:
        raise GateError(f"parity/thresholds.toml has no bounds [{gates}.{precision}]; nothing can pass without them.")
    return bounds


def word_errors(references: list[str], hypotheses: list[str]) -> WordErrors:
    """Edit counts between normalised texts, word by word, pooled."""
    return _edits(references, hypotheses, str.split, jiwer.process_words)


def character_errors(references: list[str], hypotheses: list[str]) -> WordErrors:
    """Edit counts between normalised texts, character by character, pooled."""
    return _edits(references, hypotheses, list, jiwer.process_characters)


def _edits(
    references: list[str], hypotheses: list[str], units: Callable[[str], list[str]], process: Callable[..., Any]
) -> WordErrors:
    pairs = list(zip(references, hypotheses, strict=True))
    spoken = [(reference, heard) for reference, heard in pairs if reference]
    invented = sum(len(units(heard)) for reference, heard in pairs if not reference)
    if not spoken:
        return WordErrors(invented, 0)
    out = process([reference for reference, _ in spoken], [heard for _, heard in spoken])
    words = out.hits + out.substitutions + out.deletions
    return WordErrors(out.substitutions + out.deletions + out.insertions + invented, words)


def divergences(reference: Path, candidate: Path) -> dict[int, int]:
    """Index of every utterance whose tokens differ → position of the first difference."""
    pairs = zip(measure.read_decoded(reference), measure.read_decoded(candidate), strict=True)
    return {i: first_difference(a["tokens"], b["tokens"]) for i, (a, b) in enumerate(pairs) if a["tokens"] != b["tokens"]}


def first_difference(a: list[int], b: list[int]) -> int:
    """Position of the first token in which two sequences differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def prefix_match(reference: Path, diverged: Mapping[int, int]) -> float:
    """Mean share of the reference's tokens (the end included) that come out before the first difference."""
    lengths = [len(row["tokens"]) + 1 for row in measure.read_decoded(reference)]
    return float(np.mean([diverged.get(i, length) / length for i, length in enumerate(lengths)]))


def weights_errors(reference: Path, candidate: Path) -> dict[str, float]:
    """The weights axis: encoder and logits errors (absolute, and in units of the reference), top-1 agreement."""
    figures: dict[str, float] = {}
    agreed: list[np.ndarray[Any, Any]] = []
    for file in sorted(reference.glob("weights-*.npz")):
        with np.load(file) as expected, np.load(candidate / file.name) as got:
            for key in ("encoder", "logits"):
                if key in got:
                    # A NaN must fail every bound; np.max carries it on, and max() of Python would lose it.
                    error = float(np.max(np.abs(got[key] - expected[key])))
                    scale = max(1.0, float(np.max(np.abs(expected[key]))))
                    figures[f"{key}_max_abs"] = float(np.maximum(figures.get(f"{key}_max_abs", 0.0), error))
                    figures[f"{key}_error"] = float(np.maximum(figures.get(f"{key}_error", 0.0), error / scale))
            if "logits" in got:
                agreed.append(expected["logits"].argmax(-1) == got["logits"].argmax(-1))
    if agreed:
        figures["top1_agreement"] = float(np.concatenate(agreed).mean())
    return figures


@dataclass(frozen=True)
class Costs:
    """Speed over a set, batch 1: seconds, except RTFx (audio seconds a second) and tokens a second of decoding."""

    total_s: float
    rtfx: float
    latency_p50_s: float
    latency_p95_s: float
    ttft_s: float | None
    tokens_per_s: float


def costs(folder: Path, utterances: list[Utterance]) -> Costs:
    """Speed of a measurement."""
    rows = measure.read_decoded(folder)
    timings = [row["timings"] for row in rows]
    latency = np.array([t["encode_s"] + t["decode_s"] for t in timings])
    first = [t["encode_s"] + t["prompt_s"] for t in timings if t["prompt_s"] is not None]
    produced = sum(len(row["tokens"]) + 1 for row in rows)  # the end token is a step too
    return Costs(
        total_s=float(latency.sum()),
        rtfx=sum(utterance.duration for utterance in utterances) / float(latency.sum()),
        latency_p50_s=float(np.percentile(latency, 50)),
        latency_p95_s=float(np.percentile(latency, 95)),
        ttft_s=float(np.median(first)) if first else None,
        tokens_per_s=produced / sum(t["decode_s"] for t in timings),
    )


def texts(folder: Path, normalise: Normalise) -> list[str]:
    """The normalised transcripts of a measurement."""
    return [normalise(row["text"]) for row in measure.read_decoded(folder)]


def compare(
    *,
    target: str,
    precision: str,
    reference: Path,
    candidate: Path,
    measured: Mapping[str, Any],
    utterances: list[Utterance],
    normalise: Normalise,
    margins: Mapping[str, float],
    bounds: Bounds,
) -> Row:
    """One artifact's row: every figure from the two measurement folders, and the verdict of the precision's gates.

    ``margins`` gives PyTorch's top-2 margin at each diverging utterance's first difference, by index; ``bounds`` are the
    gates of the precision (:func:`thresholds`).
    """
    diverged = divergences(reference, candidate)
    tie = bounds.get("near_tie", {}).get("max", 0.0)
    ties = [i for i in diverged if margins.get(str(i), np.inf) < tie]
    spoken = [normalise(utterance.text) for utterance in utterances]
    heard, expected = texts(candidate, normalise), texts(reference, normalise)
    errors, reference_errors = word_errors(spoken, heard), word_errors(spoken, expected)
    weights = weights_errors(reference, candidate)
    speed = costs(candidate, utterances)
    matched = 1 - (len(diverged) - len(ties)) / len(utterances)
    delta = (errors.errors - reference_errors.errors) / errors.words if errors.words else None
    judged = {**weights, "token_match": matched, "prefix_match": prefix_match(reference, diverged)} | (
        {} if delta is None else {"delta_wer": 100 * delta}
    )
    missed = [] if target == measure.REFERENCE else misses(judged, bounds)
    row = Row(
        target=target,
        precision=precision,
        status="fail" if missed else "pass",
        reason="; ".join(missed),
        decoder=measured["decoder"],
        encoder_max_abs=weights.get("encoder_max_abs"),
        logits_max_abs=weights.get("logits_max_abs"),
        top1_agreement=weights.get("top1_agreement"),
        token_match=1 - len(diverged) / len(utterances),
        near_ties=len(ties),
        first_divergence=_describe(diverged, utterances, margins),
        wer=errors.rate,
        delta_wer=delta,
        cer=character_errors(spoken, heard).rate,
        rtfx=speed.rtfx,
        latency_p50_s=speed.latency_p50_s,
        latency_p95_s=speed.latency_p95_s,
        ttft_s=speed.ttft_s,
        tokens_per_s=speed.tokens_per_s,
        load_s=measured["load_s"],
        peak_rss_mb=measured["peak_rss_mb"],
        size_mb=measured["size_mb"],
        speedup=costs(reference, utterances).total_s / speed.total_s,
    )
    if measured["timed"]:
        return row
    reason = "; ".join([*missed, f"timings unavailable: needs {measured['timing_needs']}"])
    untimed: dict[str, Any] = dict.fromkeys(TIMINGS)
    return replace(row, reason=reason, **untimed)


def misses(figures: Mapping[str, float], bounds: Bounds) -> list[str]:
    """The gates that the figures miss, as phrases; a NaN misses, a figure that was not measured is not judged."""
    missed = []
    for name, bound in bounds.items():
        if name not in figures:
            continue
        value = figures[name]
        if "max" in bound and not value <= bound["max"]:
            missed.append(f"{name} {value:.3g} > {bound['max']:g}")
        if "min" in bound and not value >= bound["min"]:
            missed.append(f"{name} {value:.3g} < {bound['min']:g}")
    return missed


def _describe(diverged: dict[int, int], utterances: list[Utterance], margins: Mapping[str, float]) -> dict[str, Any] | None:
    if not diverged:
        return None
    index = min(diverged, key=lambda i: (diverged[i], i))
    return {"utterance": utterances[index].id, "position": diverged[index], "margin": margins.get(str(index))}
