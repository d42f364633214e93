"""Word by word: what was said against what was heard, as runs of words for the page and Markdown to mark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rapidfuzz.distance import Levenshtein


@dataclass(frozen=True)
class Run:
    """Neighbouring words of one kind: ``equal``, ``delete`` (said, not heard), ``insert`` (heard, not said) or ``replace``."""

    kind: str
    said: str
    heard: str


@dataclass(frozen=True)
class Version:
    """One text that was heard, who heard it, and how it differs from what was said."""

    rows: list[str]
    text: str
    normalised: str
    runs: list[Run]
    errors: int
    with_reference: bool


@dataclass(frozen=True)
class Heard:
    """One utterance as everybody heard it: PyTorch's version first, then those furthest from it."""

    id: str
    duration_s: float
    text: str
    normalised: str
    versions: list[Version]
    apart: int
    errors: int

    @property
    def flawless(self) -> bool:
        """Whether every backend heard what was said."""
        return self.apart == self.errors == 0


def diff(said: str, heard: str) -> list[Run]:
    """Align two normalised texts word by word with the fewest edits; neighbouring edits are read as one replacement."""
    a, b = said.split(), heard.split()
    runs = []
    for equal, together in groupby(Levenshtein.opcodes(a, b), key=lambda op: op.tag == "equal"):
        ops = list(together)
        words = (" ".join(a[ops[0].src_start : ops[-1].src_end]), " ".join(b[ops[0].dest_start : ops[-1].dest_end]))
        kind = "equal" if equal else "replace" if all(words) else "delete" if words[0] else "insert"
        runs.append(Run(kind, *words))
    return runs


def worst_first(document: Mapping[str, Any], reference: str) -> list[Heard]:
    """Every utterance, first those that backends hear furthest from ``reference`` (a row), then those with most word errors."""
    heard = [_heard(utterance, reference) for utterance in document.get("utterances", []) if utterance["heard"]]
    return sorted(heard, key=lambda utterance: (-utterance.apart, -utterance.errors))


def _heard(utterance: Mapping[str, Any], reference: str) -> Heard:
    said = utterance["normalised"]
    expected = utterance["heard"].get(reference, {}).get("normalised", said)
    versions = sorted(
        _versions(utterance, reference), key=lambda v: (not v.with_reference, -_words_apart(expected, v.normalised))
    )
    return Heard(
        id=utterance["id"],
        duration_s=utterance["duration_s"],
        text=utterance["text"],
        normalised=said,
        versions=versions,
        apart=max(_words_apart(expected, version.normalised) for version in versions),
        errors=max(version.errors for version in versions),
    )


def _versions(utterance: Mapping[str, Any], reference: str) -> Iterator[Version]:
    """Rows that heard the same words share a version."""
    same: dict[str, list[str]] = {}
    for name, heard in utterance["heard"].items():
        same.setdefault(heard["normalised"], []).append(name)
    for normalised, rows in same.items():
        first = utterance["heard"][rows[0]]
        runs = diff(utterance["normalised"], normalised)
        yield Version(rows, first["text"], normalised, runs, first["errors"], reference in rows)


def _words_apart(a: str, b: str) -> int:
    return int(Levenshtein.distance(a.split(), b.split()))
