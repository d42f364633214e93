"""The report's columns: one specification for the terminal, the page and Markdown, over rows as the JSON document holds them.

Groups that no table mixes: the weights axis (PyTorch's own tokens forced), the policy axis (free running), the other modes of
transcription, and cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Show = Callable[[Row, "Column"], str | None]

# Everything but a pass says so in its own word; what is not known here is drawn as a failure, never as a pass.
STATUSES = ("pass", "undecided", "unavailable", "fail", "crashed", "timeout")


@dataclass(frozen=True)
class Cell:
    """One figure as text, and the number that a column is sorted by; both None where nothing was measured."""

    text: str | None
    order: float | None


@dataclass(frozen=True)
class Column:
    """One figure of a row: where it lies, how it is written, and one sentence on what it means."""

    key: str
    title: str
    unit: str
    form: str
    help: str
    scale: float = 1.0
    show: Show | None = None

    def cell(self, row: Row) -> Cell:
        """The figure of a row; a key that the row lacks is a figure that was not measured."""
        value = row.get(self.key)
        order = number(value) if value is None or isinstance(value, (int, float, str)) else None
        return Cell((self.show or _plain)(row, self), None if order is None else order * self.scale)

    @property
    def head(self) -> str:
        """Title and unit on one line."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Group:
    """Columns that are read together."""

    key: str
    title: str
    note: str
    columns: tuple[Column, ...]

    def present(self, rows: Sequence[Row]) -> list[Column]:
        """The columns that any of the rows knows of."""
        return [column for column in self.columns if any(column.key in row for row in rows)]


def name(row: Row) -> str:
    """What a row is called everywhere: target and precision, or the label that tells it from another host's."""
    return str(row.get("label") or f"{row['target']}-{row['precision']}")


def labelled(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with a label on every row of a host but the first, where it was merged from several (``hosts``)."""
    hosts = {host: chr(ord("A") + i) for i, host in enumerate(document.get("hosts", {}))}
    rows = [
        row if hosts.get(row.get("host"), "A") == "A" else {**row, "label": f"{name(row)} ({hosts[row['host']]})"}
        for row in document["rows"]
    ]
    return {**document, "rows": rows}


def number(value: Any) -> float | None:
    """A figure of the document as a float; JSON has no NaN, so that and the infinities are kept as strings."""
    return None if value is None else float(value)


def counted(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows have each status, in the order of :data:`STATUSES`, absent ones left out."""
    found = [row["status"] for row in rows]
    return {status: found.count(status) for status in dict.fromkeys([*STATUSES, *found]) if status in found}


def _plain(row: Row, column: Column) -> str | None:
    value = number(row.get(column.key))
    if value == 0 and column.form.endswith("e"):
        return "0"
    return None if value is None else f"{value * column.scale:{column.form}}"


def _with_interval(row: Row, column: Column) -> str | None:
    text = _plain(row, column)
    ends = interval(row, column.key)
    if text is None or ends is None:
        return text
    low, high = ends
    return f"{text} [{low * column.scale:{column.form}}, {high * column.scale:{column.form}}]"


def interval(row: Row, key: str) -> tuple[float, float] | None:
    """The interval of a figure, which a row keeps as ``<key>_interval`` or as ``<key>_low`` and ``<key>_high``."""
    low, high = row.get(f"{key}_interval") or (row.get(f"{key}_low"), row.get(f"{key}_high"))
    return None if low is None or high is None else (float(low), float(high))


def _needed(row: Row, column: Column) -> str | None:
    decided = row.get(column.key) is None and row.get("token_match") is not None
    return "–" if decided else _plain(row, column)


def _divergence(row: Row, column: Column) -> str | None:
    first = row.get(column.key)
    if first is None:
        return "none" if number(row.get("token_match")) == 1 else None
    margin = number(first["margin"])
    return f"{first['utterance']} at token {first['position']}" + ("" if margin is None else f" (margin {margin:.2g})")


GROUPS = (
    Group(
        "weights",
        "Weights axis",
        "PyTorch's own tokens are forced on every backend: what differs here is the arithmetic and the weights.",
        (
            Column("encoder_rel_l2", "encoder rel. L2", "", ".1e", "Error of the encoder states in units of their own length."),
            Column("encoder_snr_db", "encoder SNR", "dB", ".0f", "The same as a signal-to-noise ratio."),
            Column("encoder_max_abs", "encoder max", "abs", ".1e", "Largest absolute error of an encoder state."),
            Column("logits_max_abs", "logits max", "abs", ".1e", "Largest absolute error of a logit."),
            Column("logits_kl_mean", "mean KL", "nats", ".1e", "KL divergence from PyTorch's next-token distribution."),
            Column("logits_kl_max", "worst KL", "nats", ".1e", "The same at the worst position."),
            Column("top1_breaks", "top-1 breaks", "", ".0f", "Positions where the best token differs and PyTorch is decided."),
            Column("top1_agreement", "top-1", "%", ".1f", "Share of positions whose best token is PyTorch's.", 100),
        ),
    ),
    Group(
        "policy",
        "Policy axis",
        "Every backend decodes freely under the policy stated below: what differs here is what a user reads.",
        (
            Column("token_match", "tokens equal", "%", ".1f", "Share of utterances decoded to PyTorch's exact tokens.", 100),
            Column("near_ties", "near-ties", "", ".0f", "Differences where PyTorch is undecided itself."),
            Column("breaks", "breaks", "", ".0f", "Differences where PyTorch is decided."),
            Column("wer", "WER", "%", ".2f", "Word error rate, pooled over the set.", 100),
            Column("delta_wer", "ΔWER", "points", "+.2f", "WER minus PyTorch's, with its 95 % interval.", 100, _with_interval),
            Column("cer", "CER", "%", ".2f", "Character error rate, pooled over the set.", 100),
            Column("delta_cer", "ΔCER", "points", "+.2f", "CER minus PyTorch's, with its 95 % interval.", 100, _with_interval),
            Column("utterances_needed", "needed", "utt.", ".0f", "Utterances that a verdict would need.", show=_needed),
            Column("no_worse_share", "no worse", "%", ".1f", "Share of utterances with no more errors than PyTorch's.", 100),
            Column("empty_rate", "empty", "%", ".1f", "Share of spoken utterances with nothing heard.", 100),
            Column("loop_rate", "loops", "%", ".1f", "Share of utterances that repeat themselves.", 100),
            Column("insertion_rate", "insertions", "%", ".2f", "Words heard that nobody said, a spoken word.", 100),
            Column("first_divergence", "first difference", "", "", "The earliest token that differs.", show=_divergence),
        ),
    ),
    Group(
        "modes",
        "Other modes",
        "A few utterances with timestamps, a beam, a prompt, language detection, timed words; a recording of several windows.",
        (
            Column("boundary_p95_s", "segment bounds", "ms", ".0f", "95th percentile of their distance from PyTorch's.", 1000),
            Column("boundary_error_s", "bounds' error", "ms", ".0f", "Their mean distance from the true ones.", 1000),
            Column("word_p95_s", "word bounds", "ms", ".0f", "95th percentile of their distance from PyTorch's.", 1000),
            Column("words_in_place", "words in place", "%", ".1f", "Word boundaries within 20 ms of PyTorch's.", 100),
            Column("language_match", "language", "%", ".0f", "Windows whose likeliest language is PyTorch's.", 100),
        ),
    ),
    Group(
        "cost",
        "Cost",
        "Batch 1, one artifact at a time, each in a process of its own; speed-up is against PyTorch in this same run.",
        (
            Column("size_mb", "size", "MB", ".1f", "All files of the artifact."),
            Column("speedup", "speed-up", "×", ".2f", "Times as fast as PyTorch over the whole set."),
            Column("rtfx", "RTFx", "×", ".1f", "Seconds of audio a second of work."),
            Column("latency_p50_s", "p50", "ms", ".0f", "Median time of an utterance.", 1000),
            Column("latency_p95_s", "p95", "ms", ".0f", "95th percentile of an utterance's time.", 1000),
            Column("ttft_s", "first token", "ms", ".0f", "Median time to the first token.", 1000),
            Column("tokens_per_s", "tokens", "/s", ".0f", "Tokens a second of decoding."),
            Column("load_s", "load", "s", ".2f", "Time to open the artifact."),
            Column("peak_rss_mb", "peak", "MB", ".0f", "Peak memory of the process."),
        ),
    ),
)  # fmt: skip
