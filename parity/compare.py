"""Compare measurements with the reference's: a pure function of files, so that machines meet only as JSON."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from asr_core.errors import GateError
from parity import measure, statistics, weights
from parity.data import Utterance
from parity.statistics import Edits, Interval, Verdict
from parity.suite import first_difference
from parity.weights import Probe

Normalise = Callable[[str, str], str]  # of a text, in a language
Bounds = Mapping[str, Mapping[str, Any]]
# What means nothing where something else than the runtime does its work.
TIMINGS = (
    "rtfx", "latency_p50_s", "latency_p95_s", "ttft_s", "tokens_per_s", "load_s", "peak_rss_mb", "speedup",
)  # fmt: skip
# Every figure belongs to one axis, and no line of a report mixes two. Weights: teacher-forced on PyTorch's own tokens, over
# the probes. Policy: free-running under the stated decode policy, over the whole set. Modes: parity/modes.py, over a few.
AXES = {
    "weights": (
        "encoder_max_abs", "encoder_rel_l2", "encoder_snr_db", "logits_max_abs", "logits_kl_mean", "logits_kl_max",
        "top1_agreement", "top1_breaks",
    ),
    "policy": (
        "token_match", "near_ties", "breaks", "flips", "first_divergence", "wer", "delta_wer", "delta_wer_interval", "cer",
        "delta_cer", "delta_cer_interval", "utterances_needed", "no_worse_share", "empty_rate", "loop_rate",
        "insertion_rate", "suite", "texts_equal",
    ),
    "modes": ("boundary_p95_s", "boundary_error_s", "word_p95_s", "words_in_place", "language_match"),
    "cost": (*TIMINGS, "size_mb"),
}  # fmt: skip
NEAR_TIE, BREAK = "near-tie", "break"
# Gates that a verdict on the set's size goes with; the others are plain bounds.
STATISTICAL = ("token_match", "delta_wer", "non_inferiority")


@dataclass(frozen=True)
class Row:
    """One line of the report: an artifact, its verdict, and every figure; None is "not measured", or not a finite number.

    ``status`` is ``pass``, ``fail``, ``undecided`` (the set is too small to tell), or that of an artifact that gave no
    figures: ``unavailable``, ``crashed``, ``timeout``. Rates are fractions, times seconds, sizes MB (10⁶ bytes), KL nats,
    SNR decibels (None where the states are PyTorch's to the bit); intervals are [low, high] at 95 %. ``flips`` holds each
    differing utterance's first difference: the utterance, the position, PyTorch's top-2 logit margin there, and whether it
    is a ``near-tie`` or a ``break``; ``first_divergence`` is the earliest of them. ``utterances_needed`` says how
    large a set like this one would have to be, where it is too small. ``suite`` says what went wrong in which failure class
    (:mod:`parity.suite`, :mod:`parity.modes`), ``texts_equal`` for a production client's row the share of clips that our own
    runner hears the same. The last five are those of :class:`parity.modes.Figures`.
    """

    target: str
    precision: str
    status: str
    reason: str = ""
    decoder: str | None = None
    encoder_max_abs: float | None = None
    encoder_rel_l2: float | None = None
    encoder_snr_db: float | None = None
    logits_max_abs: float | None = None
    logits_kl_mean: float | None = None
    logits_kl_max: float | None = None
    top1_agreement: float | None = None
    top1_breaks: int | None = None
    token_match: float | None = None
    near_ties: int | None = None
    breaks: int | None = None
    flips: list[dict[str, Any]] | None = None
    first_divergence: dict[str, Any] | None = None
    wer: float | None = None
    delta_wer: float | None = None
    delta_wer_interval: list[float] | None = None
    cer: float | None = None
    delta_cer: float | None = None
    delta_cer_interval: list[float] | None = None
    utterances_needed: int | None = None
    no_worse_share: float | None = None
    empty_rate: float | None = None
    loop_rate: float | None = None
    insertion_rate: float | None = None
    rtfx: float | None = None
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    load_s: float | None = None
    peak_rss_mb: float | None = None
    size_mb: float | None = None
    speedup: float | None = None
    suite: dict[str, str] | None = None
    texts_equal: float | None = None
    boundary_p95_s: float | None = None
    boundary_error_s: float | None = None
    word_p95_s: float | None = None
    words_in_place: float | None = None
    language_match: float | None = None


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


def word_errors(references: list[str], hypotheses: list[str]) -> Edits:
    """Edit counts between normalised texts, word by word; what is heard in an empty reference counts as insertions."""
    return _edits(references, hypotheses, str.split, jiwer.process_words)


def character_errors(references: list[str], hypotheses: list[str]) -> Edits:
    """Edit counts between normalised texts, character by character."""
    return _edits(references, hypotheses, list, jiwer.process_characters)


def _edits(references: list[str], hypotheses: list[str], units: Callable[[str], list[str]], process: Callable[..., Any]) -> Edits:
    pairs = list(zip(references, hypotheses, strict=True))
    spoken = [(reference, heard) for reference, heard in pairs if reference]
    aligned = iter(process([one for one, _ in spoken], [heard for _, heard in spoken]).alignments if spoken else ())
    counts = [_count(next(aligned)) if reference else (len(units(heard)), len(units(heard)), 0) for reference, heard in pairs]
    errors, insertions, words = np.array(counts, np.int64).reshape(-1, 3).T
    return Edits(errors, insertions, words)


def _count(alignment: list[Any]) -> tuple[int, int, int]:
    """Errors, insertions and reference units of one of jiwer's alignments."""
    inserted = sum(chunk.hyp_end_idx - chunk.hyp_start_idx for chunk in alignment if chunk.type == "insert")
    wrong = sum(chunk.ref_end_idx - chunk.ref_start_idx for chunk in alignment if chunk.type in {"substitute", "delete"})
    return wrong + inserted, inserted, sum(chunk.ref_end_idx - chunk.ref_start_idx for chunk in alignment)


def divergences(reference: Path, candidate: Path) -> dict[int, int]:
    """Index of every utterance whose tokens differ → position of the first difference."""
    pairs = zip(measure.read_decoded(reference), measure.read_decoded(candidate), strict=True)
    return {i: first_difference(a["tokens"], b["tokens"]) for i, (a, b) in enumerate(pairs) if a["tokens"] != b["tokens"]}


def prefix_match(reference: Path, diverged: Mapping[int, int]) -> float:
    """Mean share of the reference's tokens (the end included) that come out before the first difference."""
    lengths = [len(row["tokens"]) + 1 for row in measure.read_decoded(reference)]
    return float(np.mean([diverged.get(i, length) / length for i, length in enumerate(lengths)]))


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


def texts(folder: Path, utterances: list[Utterance], normalise: Normalise) -> list[str]:
    """The normalised transcripts of a measurement."""
    rows = zip(measure.read_decoded(folder), utterances, strict=True)
    return [normalise(row["text"], utterance.language) for row, utterance in rows]


def compare(
    *,
    target: str,
    precision: str,
    reference: Path,
    candidate: Path,
    measured: Mapping[str, Any],
    utterances: list[Utterance],
    normalise: Normalise,
    probes: Mapping[int, Probe],
    bounds: Bounds,
) -> Row:
    """One artifact's row: every figure from the two measurement folders, and the verdict of the precision's gates.

    ``probes`` are the two folders' (:func:`parity.weights.compare_probes`), ``bounds`` the gates of the precision
    (:func:`thresholds`, and what is derived from the reference's noise).
    """
    tie = bounds.get("near_tie", {}).get("max", 0.0)
    diverged = divergences(reference, candidate)
    flips = _flips(reference, diverged, utterances, tie)
    forced: dict[str, Any] = weights.figures(probes.values())
    if (breaks := weights.top1_breaks(probes.values(), tie)) is not None:
        forced["top1_breaks"] = breaks
    heard = _heard(reference, candidate, utterances, normalise)
    policy = _policy(flips, heard)
    shown: dict[str, Any] = {name: _finite(forced[name]) for name in AXES["weights"] if name in forced}
    speed = costs(candidate, utterances)
    missed, verdict = [], Verdict("pass")
    if target != measure.REFERENCE:
        judged = {**forced, "breaks": policy["breaks"], "prefix_match": prefix_match(reference, diverged)}
        missed = misses(judged, bounds)
        verdict = judge_texts(len(utterances) - len(diverged), heard, bounds)
    reasons = [*missed, *([verdict.reason] if verdict.reason else [])]
    row = Row(
        target=target,
        precision=precision,
        status="fail" if missed else verdict.status,
        reason="; ".join(reasons),
        decoder=measured["decoder"],
        utterances_needed=verdict.needed,
        load_s=measured["load_s"],
        peak_rss_mb=measured["peak_rss_mb"],
        size_mb=measured["size_mb"],
        speedup=costs(reference, utterances).total_s / speed.total_s,
        **shown,
        **policy,
        **{name: value for name, value in asdict(speed).items() if name != "total_s"},
    )
    if measured["timed"]:
        return row
    untimed: dict[str, Any] = dict.fromkeys(TIMINGS)
    return replace(row, reason="; ".join([*reasons, f"timings unavailable: needs {measured['timing_needs']}"]), **untimed)


@dataclass(frozen=True)
class Heard:
    """What was spoken and what the candidate heard, normalised; edit counts in words of both, and the differences of rates."""

    spoken: list[str]
    texts: list[str]
    reference: Edits
    candidate: Edits
    cer: float | None
    delta_wer: Interval | None
    delta_cer: Interval | None


def _heard(reference: Path, candidate: Path, utterances: list[Utterance], normalise: Normalise) -> Heard:
    spoken = [normalise(utterance.text, utterance.language) for utterance in utterances]
    expected, heard = (texts(folder, utterances, normalise) for folder in (reference, candidate))
    words = word_errors(spoken, expected), word_errors(spoken, heard)
    characters = character_errors(spoken, expected), character_errors(spoken, heard)
    deltas = statistics.delta_interval(*words), statistics.delta_interval(*characters)
    return Heard(spoken, heard, *words, characters[1].rate, *deltas)


def _policy(flips: list[dict[str, Any]], heard: Heard) -> dict[str, Any]:
    """The row's figures of the policy axis."""
    breaks = sum(flip["kind"] == BREAK for flip in flips)
    return {
        "token_match": 1 - len(flips) / len(heard.spoken),
        "near_ties": len(flips) - breaks,
        "breaks": breaks,
        "flips": flips,
        "first_divergence": _first(flips),
        "wer": heard.candidate.rate,
        "delta_wer": heard.delta_wer and heard.delta_wer.estimate,
        "delta_wer_interval": _ends(heard.delta_wer),
        "cer": heard.cer,
        "delta_cer": heard.delta_cer and heard.delta_cer.estimate,
        "delta_cer_interval": _ends(heard.delta_cer),
        **statistics.quality(heard.spoken, heard.texts, heard.reference, heard.candidate),
    }


def judge_texts(matched: int, heard: Heard, bounds: Bounds) -> Verdict:
    """The verdict of the gates that depend on the size of the set: share of identical utterances, and ΔWER.

    ``matched`` utterances have the reference's exact tokens. Without a reference word there is no ΔWER to judge.
    """
    verdicts = []
    if (share := bounds.get("token_match")) is not None:
        verdict = statistics.at_least(matched, len(heard.spoken), share["min"])
        verdicts.append(replace(verdict, reason=verdict.reason and f"token_match {verdict.reason}"))
    if heard.delta_wer is not None and "non_inferiority" in bounds:
        margin = bounds["non_inferiority"]["max"] / 100
        accepted = bounds["delta_wer"]["max"] / 100 if "delta_wer" in bounds else None
        verdict = statistics.non_inferiority(heard.delta_wer, margin, accepted)
        if verdict.status == "undecided":
            verdict = replace(verdict, needed=statistics.utterances_needed(heard.reference, heard.candidate, margin))
        verdicts.append(verdict)
    status = statistics.worst(verdicts)
    needed = max((one.needed for one in verdicts if one.needed is not None), default=None)
    reasons = [one.reason for one in verdicts if one.reason]
    if status == "undecided" and needed is not None:
        reasons.append(f"about {needed} utterances would tell")
    return Verdict(status, "; ".join(reasons), needed if status == "undecided" else None)


def misses(figures: Mapping[str, float], bounds: Bounds) -> list[str]:
    """The plain gates that the figures miss, as phrases; a NaN misses, a figure that was not measured is not judged."""
    missed = []
    for name, bound in bounds.items():
        if name not in figures or name in STATISTICAL:
            continue
        value = figures[name]
        if "max" in bound and not value <= bound["max"]:
            missed.append(f"{name} {value:.3g} > {bound['max']:.3g}{_origin(bound)}")
        if "min" in bound and not value >= bound["min"]:
            missed.append(f"{name} {value:.3g} < {bound['min']:g}")
    return missed


def _origin(bound: Mapping[str, Any]) -> str:
    """Where a derived bound comes from."""
    if "noise" not in bound:
        return ""
    return f" ({bound['factor']} × PyTorch's own noise {max(bound['noise'], bound['floor']):.2g})"


def _flips(reference: Path, diverged: Mapping[int, int], utterances: list[Utterance], tie: float) -> list[dict[str, Any]]:
    """The first difference of every differing utterance, with PyTorch's margin there; a margin of None is infinite."""
    decoded = measure.read_decoded(reference)
    flips = []
    for index, position in diverged.items():
        margins = decoded[index]["margins"]
        margin = margins[position] if position < len(margins) else np.inf  # beyond the bound on new tokens nothing is excused
        kind = NEAR_TIE if margin < tie else BREAK
        flips.append({"utterance": utterances[index].id, "position": position, "margin": _finite(margin), "kind": kind})
    return flips


def _first(flips: list[dict[str, Any]]) -> dict[str, Any] | None:
    first = min(flips, key=lambda flip: flip["position"], default=None)
    return first and {name: first[name] for name in ("utterance", "position", "margin")}


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity; a verdict has named them by then."""
    return value if np.isfinite(value) else None
