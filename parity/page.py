"""The report as one self-contained HTML page and as Markdown: pure functions of the JSON document (:mod:`parity.report`)."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core import registry
from parity import columns
from parity.columns import Cell, Column, Group

if TYPE_CHECKING:
    from jinja2 import Environment

Document = Mapping[str, Any]

# Utterances that are shown word by word: more than anyone reads, few enough that a page over LibriSpeech opens at once.
SHOWN_UTTERANCES = 40
# In a pull request only the worst are of use.
SHOWN_IN_MARKDOWN = 5
REFERENCE = "pytorch"
NOT_MEASURED = "not measured"
ICONS = {"pass": "✓", "undecided": "?", "unavailable": "–", "fail": "✗", "crashed": "✗", "timeout": "✗"}
BOUND_SIGNS = {"max": "≤", "min": "≥"}


@dataclass(frozen=True)
class Line:
    """One row in one table."""

    name: str
    status: str
    reference: bool
    cells: list[Cell]


@dataclass(frozen=True)
class GroupTable:
    """One group of columns over all rows."""

    group: Group
    columns: list[Column]
    lines: list[Line]


def write_html(path: Path, document: Document) -> None:
    """Write the page in one step: a reader never sees half of it."""
    _write(path, html(document))


def write_markdown(path: Path, document: Document) -> None:
    """Write the summary for a pull request in one step."""
    _write(path, markdown(document))


def html(document: Document) -> str:
    """The page: style, script and pictures inside, nothing fetched; every text of the document is escaped."""
    from markupsafe import Markup

    from parity import plots

    document = columns.labelled(document)
    script = _template_text("report.js")
    drawn = (plots.trade_off, plots.error_by_stage, plots.logits_kl, plots.kl_by_position, plots.latency)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            **_context(document),
            css=Markup(_template_text("report.css")),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704 - our own file
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            plots={plot.key: plot for plot in (draw(document) for draw in drawn)},
            markup=Markup,
            shown=SHOWN_UTTERANCES,
            heat=lambda share: round(math.sqrt(share), 3),  # so that one utterance in a hundred is seen
        )
    )


def markdown(document: Document) -> str:
    """Verdicts, the three groups of figures, and the worst utterances; a transcript's own marks are escaped."""
    document = columns.labelled(document)
    environment = _environment()
    environment.finalize = _markdown_text
    return environment.get_template("report.md.j2").render(**_context(document), shown=SHOWN_IN_MARKDOWN)


def _context(document: Document) -> dict[str, Any]:
    from parity import words

    rows = document["rows"]
    artifacts = [row for row in rows if row["target"] != REFERENCE]
    reference = next((columns.name(row) for row in rows if row["target"] == REFERENCE), "")
    heard = words.worst_first(document, reference)
    return {
        "document": document,
        "artifacts": sorted(artifacts, key=lambda row: -_severity(row["status"])),
        "counts": columns.counted(artifacts),
        "reference": reference,
        "tables": [_table(group, rows) for group in columns.GROUPS],
        "heard": [utterance for utterance in heard if not utterance.flawless],
        "flawless": sum(utterance.flawless for utterance in heard),
        "differing": sum(utterance.apart > 0 for utterance in heard),
        "icons": ICONS,
        "name": columns.name,
        "bounds": list(_bounds(document)),
        # Derived bounds stand among the bounds already.
        "noise": {key: value for key, value in (document.get("calibration") or {}).items() if key != "bounds"} or None,
        "distribution": registry.DISTRIBUTION,
        "not_measured": NOT_MEASURED,
    }


def _table(group: Group, rows: Sequence[Mapping[str, Any]]) -> GroupTable:
    shown = group.present(rows)
    lines = [
        Line(columns.name(row), row["status"], row["target"] == REFERENCE, [column.cell(row) for column in shown]) for row in rows
    ]
    return GroupTable(group, shown, lines)


def _severity(status: str) -> int:
    return columns.STATUSES.index(status) if status in columns.STATUSES else len(columns.STATUSES)


def _bounds(document: Document) -> Iterator[tuple[str, str, str, str]]:
    """Precision, figure, bound and reason of everything that was judged; what calibration derived goes before what was typed."""
    derived = (document.get("calibration") or {}).get("bounds", {})
    for precision, typed in document.get("thresholds", {}).items():
        for figure, bound in {**typed, **derived.get(precision.partition("-")[0], {})}.items():
            for side, sign in BOUND_SIGNS.items():
                if side in bound:
                    yield precision, figure, f"{sign} {float(bound[side]):.3g}", _reason(bound)


def _reason(bound: Mapping[str, Any]) -> str:
    reason = str(bound.get("reason", ""))
    if "noise" not in bound:
        return reason
    return (
        f"{reason} (derived: {float(bound['factor']):g} × PyTorch's noise of {float(bound['noise']):.2g}"
        f", which counts as {float(bound['floor']):.2g} at least)"
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("parity", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _markdown_text(value: Any) -> Any:
    """Text that Markdown shows as it stands: its marks escaped, on one line; HTML's are Jinja's to escape."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", re.sub(r"\s+", " ", value))


def _template_text(name: str) -> str:
    return resources.files("parity").joinpath("templates", name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
