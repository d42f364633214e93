"""The report: tables for people at a terminal, one JSON document that everything else is made from."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from asr_core import registry
from asr_core.checkpoint import Checkpoint
from asr_core.errors import GateError
from parity import columns, compare, measure
from parity.compare import Row
from parity.data import Utterance

SCHEMA = 1
NOT_MEASURED = "–"
STATUS_STYLE = {"pass": "green", "unavailable": "yellow", "undecided": "yellow"}


def document(
    checkpoint: Checkpoint,
    utterances: list[Utterance],
    rows: list[Row],
    threads: int,
    *,
    details: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole report as JSON-able data, as ``report.schema.json`` describes it; the page and Markdown are made from it alone.

    ``details`` are the utterances behind the rows (:func:`parity.details.read`). ``context`` is what a session says beside its
    rows, such as PyTorch's own noise (``calibration``); it goes before what is said here.
    """
    content = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        "host": host() | {"threads": threads},
        "versions": versions({row.target for row in rows}),
        "data": {"utterances": len(utterances), "audio_s": round(sum(u.duration for u in utterances), 3)},
        "thresholds": _thresholds(rows),
        "calibration": None,
        "rows": [asdict(row) for row in rows],
        **(details or {}),
        **(context or {}),
    }
    plain: dict[str, Any] = _jsonable(content)
    return plain


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the report in one step: a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def host() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def versions(targets: set[str]) -> dict[str, str]:
    """The version of this project and of every installed package that the targets' extras name."""
    packages = {package for target in targets for package in registry.requirements(target)}
    found = {registry.DISTRIBUTION: metadata.version(registry.DISTRIBUTION)}
    for package in sorted(packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # its row says that it is unavailable
    return found


def table(rows: list[Row]) -> Group:
    """The rows as one table an axis and one of costs; a dash means "not measured"."""
    plain = [asdict(row) for row in rows]
    return Group(*(_group_table(group, plain) for group in columns.GROUPS))


def _group_table(group: columns.Group, rows: list[dict[str, Any]]) -> Table:
    out = Table(title=f"{group.title}: {_TITLES[group.key]}", title_justify="left", pad_edge=False)
    out.add_column("artifact", no_wrap=True)
    out.add_column("verdict", no_wrap=True)
    shown = group.present(rows)
    for column in shown:
        out.add_column(f"{column.title}\n{column.unit}", justify="right")
    for row in rows:
        style = STATUS_STYLE.get(row["status"], "bold red")
        cells = [column.cell(row).text or NOT_MEASURED for column in shown]
        out.add_row(columns.name(row), f"[{style}]{row['status']}[/]", *cells)
    return out


_TITLES = {"weights": "PyTorch's tokens forced", "policy": "free running", "modes": "a few utterances", "cost": "batch 1"}


def _thresholds(rows: list[Row]) -> dict[str, compare.Bounds]:
    found = {}
    for row in rows:
        if row.target == measure.REFERENCE:
            continue
        try:
            found[row.precision] = compare.thresholds("parity", row.precision)
        except GateError:
            continue  # a damaged artifact's precision may be unreadable; its row fails whatever the bounds
    return found


def _jsonable(value: Any) -> Any:
    """The same data with NaN and the infinities, which JSON doesn't have, as strings that ``float`` reads."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
        return next(names, platform.processor())
    return platform.processor()
