"""The report: a table for people, JSON for machines."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from asr_core.checkpoint import Checkpoint
from parity.compare import Row
from parity.data import Utterance

SCHEMA = 1
NOT_MEASURED = "–"
STATUS_STYLE = {
    "pass": "green",
    "fail": "bold red",
    "undecided": "yellow",
    "unavailable": "yellow",
    "crashed": "bold red",
    "timeout": "bold red",
}


def document(checkpoint: Checkpoint, utterances: list[Utterance], rows: list[Row], threads: int) -> dict[str, Any]:
    """The whole report as JSON-able data."""
    return {
        "schema": SCHEMA,
        "checkpoint": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        "host": host() | {"threads": threads},
        "data": {"utterances": len(utterances), "audio_s": round(sum(u.duration for u in utterances), 3)},
        "rows": [asdict(row) for row in rows],
    }


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


def table(rows: list[Row]) -> Table:
    """The rows as a table; a dash means "not measured"."""
    out = Table(title="Parity with PyTorch", title_justify="left", pad_edge=False)
    out.add_column("artifact", no_wrap=True)
    out.add_column("verdict", no_wrap=True)
    for column in COLUMNS:
        out.add_column(column, justify="right")
    for row in rows:
        cells = [NOT_MEASURED if value is None else value for value in _cells(row)]
        style = STATUS_STYLE[row.status]
        out.add_row(f"{row.target}-{row.precision}", f"[{style}]{row.status}[/]", *cells)
    return out


COLUMNS = (
    "encoder\nerror", "logits\nerror", "top-1\n%", "tokens\nequal %", "WER\n%", "ΔWER\npoints", "CER\n%", "RTFx",
    "p50\nms", "p95\nms", "first\ntoken ms", "tokens\n/s", "load\ns", "peak\nMB", "size\nMB", "speed-up",
)  # fmt: skip


def _cells(row: Row) -> list[str | None]:
    return [
        _show(row.encoder_max_abs, ".0e"),
        _show(row.logits_max_abs, ".0e"),
        _show(row.top1_agreement, ".1f", 100),
        _tokens(row),
        _show(row.wer, ".2f", 100),
        _show(row.delta_wer, "+.2f", 100),
        _show(row.cer, ".2f", 100),
        _show(row.rtfx, ".1f"),
        _show(row.latency_p50_s, ".0f", 1000),
        _show(row.latency_p95_s, ".0f", 1000),
        _show(row.ttft_s, ".0f", 1000),
        _show(row.tokens_per_s, ".0f"),
        _show(row.load_s, ".2f"),
        _show(row.peak_rss_mb, ".0f"),
        _show(row.size_mb, ".1f"),
        _show(row.speedup, ".2f×"),
    ]


def _tokens(row: Row) -> str | None:
    shown = _show(row.token_match, ".1f", 100)
    return f"{shown} (+{row.near_ties} near-ties)" if row.near_ties else shown


def _show(value: float | None, form: str, scale: float = 1.0) -> str | None:
    if value is None:
        return None
    suffix = "×" if form.endswith("×") else ""
    return f"{value * scale:{form.removesuffix('×')}}{suffix}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
        return next(names, platform.processor())
    return platform.processor()
