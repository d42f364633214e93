"""What every parity run measured, kept in one SQLite file that two runs may write at the same time."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from asr_core.errors import StorageError, UsageError
from parity import provenance

APPLICATION_ID = 0x61737268  # "asrh", in the file's header: any other SQLite file is refused
# How long a writer waits for another one: an append takes milliseconds, a migration of years of nights a few seconds.
BUSY_S = 30.0
# Figures with a column of their own, for queries from outside; the JSON beside them holds all.
COLUMNS = ("speedup", "wer", "delta_wer", "token_match", "logits_max_abs", "peak_rss_mb", "size_mb")
# Labels of a report row; everything else in it is a figure.
LABELS = ("target", "precision", "status", "reason")

# Step n takes a file from version n to n + 1 (`PRAGMA user_version`). Never change a step that was released: add one.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY, time TEXT NOT NULL, host TEXT NOT NULL, host_name TEXT NOT NULL, threads INTEGER NOT NULL,
            checkpoint TEXT NOT NULL, fingerprint TEXT NOT NULL, data TEXT NOT NULL, utterances INTEGER NOT NULL,
            "commit" TEXT, versions TEXT NOT NULL)""",
        """CREATE TABLE rows (
            id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
            target TEXT NOT NULL, "precision" TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
            figures TEXT NOT NULL)""",
        "CREATE INDEX series ON runs (host, fingerprint, data, threads, time)",
        'CREATE INDEX artifact ON rows (target, "precision", run)',
    ),
    (
        # Speeds of a resumed run were not measured beside PyTorch's: they are kept, yet never judged.
        "ALTER TABLE runs ADD COLUMN resumed INTEGER NOT NULL DEFAULT 0",
        *(f"ALTER TABLE rows ADD COLUMN {name} REAL" for name in COLUMNS),
        *(f"UPDATE rows SET {name} = json_extract(figures, '$.{name}')" for name in COLUMNS),  # noqa: S608 - names are ours
        *(f'CREATE INDEX by_{name} ON rows (target, "precision", {name})' for name in ("speedup", "wer")),
    ),
)  # fmt: skip
VERSION = len(MIGRATIONS)


@dataclass(frozen=True)
class Run:
    """One parity run: when, where, of what. ``host`` is an identity (:func:`parity.provenance.identity`), ``time`` is UTC."""

    id: int
    time: str
    host: str
    host_name: str
    threads: int
    checkpoint: str
    fingerprint: str
    data: str
    utterances: int
    commit: str | None
    versions: Mapping[str, str]
    resumed: bool


@dataclass(frozen=True)
class Entry:
    """One artifact in one run; ``figures`` holds every figure of its report row."""

    run: int
    target: str
    precision: str
    status: str
    reason: str
    figures: Mapping[str, Any]

    def number(self, figure: str) -> float | None:
        """A figure's value; None where it was not measured or is no finite number."""
        value = self.figures.get(figure)
        return float(value) if isinstance(value, int | float) else None


class History:
    """An open history file.

    Opening brings an older file up to date in one transaction; raises :class:`UsageError` for a file that a newer version
    wrote, or that is no history at all.
    """

    def __init__(self, file: Path, *, create: bool = True) -> None:
        if not create and not file.exists():
            raise UsageError(f"{file}: no history yet. A run writes one: asr-parity --history {file}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()  # SQLite's own refusal does not say why
        self.file = file
        with self._refusals():
            self._database = sqlite3.connect(file, timeout=BUSY_S, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def append(self, document: Mapping[str, Any]) -> int:
        """Add a report (:func:`parity.provenance.stamp`) as one run; all of it or nothing. Returns the run's id."""
        host, data, checkpoint = document["host"], document["data"], document["checkpoint"]
        run = {
            "time": document["created"],
            "host": host["identity"],
            "host_name": provenance.readable(host),
            "threads": host["threads"],
            "checkpoint": checkpoint["name"],
            "fingerprint": checkpoint["fingerprint"],
            "data": data["digest"],
            "utterances": data["utterances"],
            "commit": document["commit"],
            "versions": json.dumps(document["versions"]),
            "resumed": int(document.get("resumed", False)),
        }
        with self._refusals(), self._transaction():
            number = self._insert("runs", run)
            for row in document["rows"]:
                figures = {key: value for key, value in row.items() if key not in LABELS}
                columns = {name: figures.get(name) for name in COLUMNS}
                labels = {key: row[key] for key in LABELS}
                self._insert("rows", {"run": number, **labels, "figures": json.dumps(figures), **columns})
        return number

    def runs(self, *, last: int | None = None) -> list[Run]:
        """All runs, or the ``last`` ones, oldest first."""
        query = "SELECT * FROM runs ORDER BY time DESC, id DESC LIMIT ?"
        found = self._database.execute(query, (-1 if last is None else last,)).fetchall()
        return [_run(row) for row in reversed(found)]

    def run(self, number: int) -> Run:
        """One run by its id."""
        found: Run = self._one("runs", number, _run)
        return found

    def entries(self, run: int, *, target: str | None = None, precision: str | None = None) -> list[Entry]:
        """The rows of a run, in the report's order; of one target or precision only where asked."""
        query = """SELECT * FROM rows WHERE run = :run AND (:target IS NULL OR target = :target)
            AND (:precision IS NULL OR "precision" = :precision) ORDER BY id"""
        wanted = {"run": run, "target": target, "precision": precision}
        return [_entry(row) for row in self._database.execute(query, wanted)]

    def past(self, run: Run, target: str, precision: str, statuses: tuple[str, ...], last: int) -> list[tuple[Run, Entry]]:
        """The ``last`` earlier rows of the same artifact on the same host, checkpoint, data and threads, newest first.

        Only rows with one of the ``statuses``: what a failing artifact measured is nobody's yardstick.
        """
        marks = ", ".join("?" * len(statuses))
        query = f"""SELECT runs.id AS run_id, rows.id AS row_id FROM rows JOIN runs ON rows.run = runs.id
            WHERE host = ? AND fingerprint = ? AND data = ? AND threads = ? AND (time, runs.id) < (?, ?)
            AND target = ? AND "precision" = ? AND status IN ({marks}) ORDER BY time DESC, runs.id DESC LIMIT ?"""  # noqa: S608
        series = (run.host, run.fingerprint, run.data, run.threads, run.time, run.id)
        found = self._database.execute(query, (*series, target, precision, *statuses, last)).fetchall()
        return [(self._one("runs", row["run_id"], _run), self._one("rows", row["row_id"], _entry)) for row in found]

    def _one(self, table: str, number: int, make: Any) -> Any:
        return make(self._database.execute(f"SELECT * FROM {table} WHERE id = ?", (number,)).fetchone())  # noqa: S608

    def _insert(self, table: str, values: Mapping[str, Any]) -> int:
        names = ", ".join(f'"{name}"' for name in values)
        marks = ", ".join("?" * len(values))
        statement = f"INSERT INTO {table} ({names}) VALUES ({marks})"  # noqa: S608 - names are ours
        return self._database.execute(statement, tuple(values.values())).lastrowid or 0

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, full, not writable
            raise StorageError(f"{self.file}: SQLite could not use it ({error}).") from error
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{self.file} is not a history of asr-parity ({error}). Choose another file.") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE takes the write lock first: two writers wait for each other instead of failing halfway.
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _prepare(self) -> None:
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA foreign_keys = ON")
        self._check()
        self._write_ahead()
        if self._pragma("user_version") < VERSION:
            with self._transaction():
                # Another writer may have been faster while we waited for the lock.
                for step in range(self._pragma("user_version"), VERSION):
                    for statement in MIGRATIONS[step]:
                        self._database.execute(statement)
                self._database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._database.execute(f"PRAGMA user_version = {VERSION}")
            self._check()

    def _check(self) -> None:
        # One transaction, so that a file which another process is just creating is either empty or complete.
        self._database.execute("BEGIN")
        try:
            ours = self._pragma("application_id") == APPLICATION_ID
            version = self._pragma("user_version")
            tables = self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        finally:
            self._database.execute("COMMIT")
        if not ours and (tables or version):
            raise UsageError(f"{self.file} is another program's database, not a history of asr-parity. Choose another file.")
        if version > VERSION:
            raise UsageError(
                f"{self.file} is a history of version {version}, written by a newer asr-export; this one knows version "
                f"{VERSION}. Update asr-export, or choose another file."
            )

    def _write_ahead(self) -> None:
        """Let readers and a writer work at the same time.

        Changing the mode wants the file alone and does not wait for others by itself.
        """
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _pragma(self, name: str) -> int:
        return int(self._database.execute(f"PRAGMA {name}").fetchone()[0])


def _run(row: sqlite3.Row) -> Run:
    values = dict(row)
    return Run(**values | {"versions": json.loads(values["versions"]), "resumed": bool(values["resumed"])})


def _entry(row: sqlite3.Row) -> Entry:
    labels = {key: row[key] for key in LABELS}
    return Entry(run=row["run"], **labels, figures=json.loads(row["figures"]))
