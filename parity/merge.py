"""Merge the reports of several machines about the same checkpoint and data into one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asr_core.errors import UsageError
from parity import provenance
from parity.report import SCHEMA

Document = Mapping[str, Any]
NEEDED = ("checkpoint", "host", "data", "rows")
# What a merged report says of all its rows; everything else is said of the host that measured it.
SHARED = ("schema", "checkpoint", "data")


def read(file: Path) -> Document:
    """Read a report; raises :class:`UsageError` naming a file that is none, or that another version wrote."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such report.") from None
    except ValueError as error:
        raise UsageError(f"{file} is not a report of asr-parity ({error}).") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise UsageError(f"{file} is not a report of asr-parity.")
    if document["schema"] != SCHEMA:
        raise UsageError(f"{file} is a report of schema {document['schema']}; this version merges schema {SCHEMA}.")
    missing = [key for key in NEEDED if key not in document]
    if missing:
        raise UsageError(f"{file} is not a report of asr-parity: it has no {', '.join(missing)}.")
    return document


def merge(reports: Sequence[tuple[str, Document]]) -> dict[str, Any]:
    """One report of several, given with the names that messages call them by.

    Every row of every report stays, with its ``host``: a time that only macOS can measure stands in a row of its own beside
    the one that says "not measured". ``hosts`` holds what each report said beside its rows; what stands outside of it is the
    first report's. Raises :class:`UsageError` where two
    reports are about different checkpoints or data, or come from the same machine.
    """
    first_name, first = reports[0]
    hosts: dict[str, tuple[str, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for name, document in reports:
        _check_same(first_name, first, name, document)
        for label, about in _hosts(document).items():
            if label in hosts:
                raise UsageError(f"{hosts[label][0]} and {name} come from the same host ({label}); a report counts once.")
            hosts[label] = name, about
        own = provenance.readable(document["host"])
        rows += [{**row, "host": row.get("host") or own} for row in document["rows"]]
    abouts = {label: about for label, (_, about) in hosts.items()}
    return {**first, "hosts": abouts, "rows": _ordered(rows)}


def _hosts(document: Document) -> dict[str, dict[str, Any]]:
    """What a report says of its machines, by their readable names; a merged report has several."""
    if "hosts" in document:
        return dict(document["hosts"])
    about = {key: value for key, value in document.items() if key not in {*SHARED, "rows"}}
    return {provenance.readable(document["host"]): about}


def _check_same(first_name: str, first: Document, name: str, document: Document) -> None:
    for what, key, field in (
        ("checkpoints", "checkpoint", "fingerprint"),
        ("data", "data", "digest"),
        ("data", "data", "utterances"),
    ):
        ours, theirs = first[key].get(field), document[key].get(field)
        if ours != theirs:
            raise UsageError(
                f"{first_name} and {name} are about different {what}: {key} {field} {_short(ours)}, {_short(theirs)}."
            )


def _short(value: object) -> str:
    return "unknown" if value is None else str(value)[:12]


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An artifact's rows side by side, PyTorch's first, as a single report has them."""
    places: dict[tuple[str, str], int] = {}
    for row in rows:
        places.setdefault((row["target"], row["precision"]), len(places))
    return sorted(rows, key=lambda row: places[row["target"], row["precision"]])
