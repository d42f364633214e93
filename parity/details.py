"""What lies behind the rows: every utterance as each backend heard it, who disagrees with whom, divergence by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity import columns, compare, measure, weights
from parity.compare import Normalise, Row
from parity.data import Utterance

Measurement = list[dict[str, Any]]


def read(work: Path, rows: Sequence[Row], utterances: list[Utterance], normalise: Normalise) -> dict[str, Any]:
    """The parts ``utterances``, ``disagreement`` and ``positions`` of the report, from the measurement folders in ``work``.

    A row that was not measured to its end has no part in them.
    """
    folders = {columns.name(asdict(row)): folder(work, row) for row in rows if row.token_match is not None}
    timed = {columns.name(asdict(row)) for row in rows if row.latency_p50_s is not None}
    decoded = {name: measure.read_decoded(path) for name, path in folders.items()}
    heard = {name: compare.texts(path, utterances, normalise) for name, path in folders.items()}
    return {
        "utterances": [_utterance(i, utterance, decoded, heard, timed, normalise) for i, utterance in enumerate(utterances)],
        "disagreement": {
            "rows": list(decoded),
            "tokens": _shares([[line["tokens"] for line in lines] for lines in decoded.values()]),
            "texts": _shares(list(heard.values())),
        },
        "positions": {name: kl for name, path in folders.items() if (kl := kl_by_position(work / measure.REFERENCE, path))},
    }


def folder(work: Path, row: Row) -> Path:
    """Where a session keeps a row's measurement."""
    return work / (measure.REFERENCE if row.target == measure.REFERENCE else f"{row.target}-{row.precision}")


def kl_by_position(reference: Path, candidate: Path) -> dict[str, list[float]] | None:
    """KL divergence in nats of the next-token distributions from PyTorch's, mean and maximum over the probes by position.

    Position 0 is the first token after the prompt. None where the candidate shows no logits, and for the reference itself.
    """
    probes = [] if candidate == reference else sorted(candidate.glob("weights-*.npz"))
    curves = [curve for file in probes if (curve := _kl(reference / file.name, file)) is not None]
    if not curves:
        return None
    longest = max(map(len, curves))
    columns_ = [np.array([curve[i] for curve in curves if i < len(curve)]) for i in range(longest)]
    return {"mean": [float(c.mean()) for c in columns_], "max": [float(c.max()) for c in columns_]}


def _kl(expected: Path, got: Path) -> NDArray[np.float64] | None:
    with np.load(expected) as a, np.load(got) as b:
        if "logits" not in b:
            return None
        return weights.divergence(a["logits"], b["logits"])


def _utterance(
    index: int,
    utterance: Utterance,
    decoded: dict[str, Measurement],
    heard: dict[str, list[str]],
    timed: set[str],
    normalise: Normalise,
) -> dict[str, Any]:
    spoken = normalise(utterance.text, utterance.language)
    reference = next(iter(decoded.values()))[index]["tokens"] if decoded else []
    return {
        "id": utterance.id,
        "duration_s": round(utterance.duration, 3),
        "text": utterance.text,
        "normalised": spoken,
        "heard": {
            name: {
                "text": lines[index]["text"],
                "normalised": heard[name][index],
                "errors": int(compare.word_errors([spoken], [heard[name][index]]).errors.sum()),
                "tokens_equal": lines[index]["tokens"] == reference,
                "latency_s": _latency(lines[index]) if name in timed else None,
                "sum_logprob": lines[index]["sum_logprob"],
            }
            for name, lines in decoded.items()
        },
    }


def _latency(line: dict[str, Any]) -> float:
    return float(line["timings"]["encode_s"] + line["timings"]["decode_s"])


def _shares(answers: list[list[Any]]) -> list[list[float]]:
    """Share of utterances in which two rows differ, for every pair: [row][row], 0 on the diagonal."""
    return [[float(np.mean([x != y for x, y in zip(a, b, strict=True)])) for b in answers] for a in answers]
