"""The history file: nothing lost by migrations, by two writers, or by an append that fails halfway."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from asr_core.errors import StorageError, UsageError
from parity import history
from parity.history import History
from tests.support import report

# Frozen: what version 1 wrote. Migrations must take it, whatever the code says today.
VERSION_1 = """
CREATE TABLE runs (id INTEGER PRIMARY KEY, time TEXT NOT NULL, host TEXT NOT NULL, host_name TEXT NOT NULL,
    threads INTEGER NOT NULL, checkpoint TEXT NOT NULL, fingerprint TEXT NOT NULL, data TEXT NOT NULL,
    utterances INTEGER NOT NULL, "commit" TEXT, versions TEXT NOT NULL);
CREATE TABLE rows (id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE, target TEXT NOT NULL,
    "precision" TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, figures TEXT NOT NULL);
CREATE INDEX series ON runs (host, fingerprint, data, threads, time);
CREATE INDEX artifact ON rows (target, "precision", run);
INSERT INTO runs VALUES
    (7, '2026-01-02T03:04:05+00:00', 'h', 'Linux x86_64', 1, 'reference', 'f', 'd', 8, NULL, '{"numpy": "2"}');
INSERT INTO rows VALUES (1, 7, 'onnx', 'fp32', 'pass', '', '{"speedup": 2.5, "wer": 0.02, "cer": null}');
INSERT INTO rows VALUES (2, 7, 'coreml', 'fp16', 'pass', 'timings unavailable', '{"speedup": null, "wer": 0.03}');
PRAGMA application_id = 1634955880;
PRAGMA user_version = 1;
"""


@pytest.fixture
def old(tmp_path) -> Path:
    file = tmp_path / "old.sqlite"
    database = sqlite3.connect(file)
    database.executescript(VERSION_1)
    database.close()
    return file


def test_a_run_comes_back_as_it_was_appended(tmp_path):
    document = report(speedup=2.0)
    with History(tmp_path / "h.sqlite") as opened:
        number = opened.append(document)
        run = opened.run(number)
        (entry,) = opened.entries(number)
    assert (run.time, run.host, run.threads) == (document["created"], document["host"]["identity"], 1)
    assert (run.fingerprint, run.data, run.versions) == ("f" * 64, "d" * 64, {"numpy": "2"})
    assert entry.figures == {key: value for key, value in document["rows"][0].items() if key not in history.LABELS}


def test_an_old_file_is_migrated_with_its_rows(old):
    with History(old) as opened:
        assert opened.run(7).versions == {"numpy": "2"}
        assert opened.run(7).resumed is False
        assert [entry.figures["wer"] for entry in opened.entries(7)] == [0.02, 0.03]
    database = sqlite3.connect(old)
    assert database.execute("PRAGMA user_version").fetchone() == (history.VERSION,)
    assert database.execute("SELECT speedup, wer FROM rows ORDER BY id").fetchall() == [(2.5, 0.02), (None, 0.03)]


def test_a_migration_that_fails_changes_nothing(old, monkeypatch):
    broken = (*history.MIGRATIONS[1], "INSERT INTO nowhere VALUES (1)")
    monkeypatch.setattr(history, "MIGRATIONS", (history.MIGRATIONS[0], broken))
    before = old.read_bytes()
    with pytest.raises(StorageError, match="nowhere"):
        History(old)
    database = sqlite3.connect(old)
    assert database.execute("PRAGMA user_version").fetchone() == (1,)
    assert "resumed" not in database.execute("SELECT sql FROM sqlite_schema WHERE name = 'runs'").fetchone()[0]
    assert len(old.read_bytes()) == len(before)


def test_a_newer_file_is_refused_by_name(old):
    database = sqlite3.connect(old)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(UsageError, match=r"old.sqlite is a history of version 99.*Update"):
        History(old)


def test_other_files_are_refused(tmp_path):
    database = sqlite3.connect(tmp_path / "other.sqlite")
    database.execute("CREATE TABLE photos (id)")
    database.close()
    with pytest.raises(UsageError, match="another program's"):
        History(tmp_path / "other.sqlite")
    (tmp_path / "notes.txt").write_text("not a database, however long this line may be" * 100)
    with pytest.raises(UsageError, match=r"notes.txt is not a history"):
        History(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="no history yet"):
        History(tmp_path / "missing.sqlite", create=False)


def test_an_append_is_all_or_nothing(tmp_path):
    document = report()
    document["rows"].append({"target": "onnx", "precision": "int8", "status": None, "reason": ""})
    with History(tmp_path / "h.sqlite") as opened:
        with pytest.raises(UsageError):
            opened.append(document)
        assert opened.runs() == []


WRITER = """
import json, sys
from pathlib import Path
from parity.history import History
document = json.loads(sys.argv[2])
sys.stdin.readline()
for number in range(40):
    with History(Path(sys.argv[1])) as opened:
        opened.append(document)
"""


def test_two_writers_lose_nothing(tmp_path):
    """Both start at once, on a file that neither has created yet, and open it anew for every append."""
    file = tmp_path / "h.sqlite"
    command = [sys.executable, "-c", WRITER, str(file), json.dumps(report(rows=20))]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for writer in writers:
        print(file=writer.stdin, flush=True)
    for writer in writers:
        _, complaints = writer.communicate(timeout=120)
        assert writer.returncode == 0, complaints
    with History(file) as opened:
        runs = opened.runs()
        assert len(runs) == 80
        assert all(len(opened.entries(run.id)) == 20 for run in runs)
    database = sqlite3.connect(file)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
