"""What an interrupted run leaves behind, and who may take it up."""

import os
import time
from pathlib import Path

import pytest

from asr_core.artifact import MANIFEST
from asr_core.isolate import Outcome
from asr_export import parity
from parity import data, resume
from parity.resume import DONE, Kept

INPUTS = {"fingerprint": "f", "threads": 1}


class Bench:
    """A work folder with two artifacts; counts what is measured."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / "work"
        self.work.mkdir()
        self.measured: list[str] = []
        for name in ("pytorch", "a", "b"):
            (root / name).mkdir()
        for name in ("a", "b"):
            (root / name / MANIFEST).write_text(name)

    def run(self, *names: str, status: str = "ok") -> Kept:
        kept = Kept(self.work)
        for name in ("pytorch", *names):
            kept.measured(self.work / name, self.root / name, lambda name=name: self._measure(name, status))
        return kept

    def _measure(self, name: str, status: str) -> Outcome:
        self.measured.append(name)
        (self.work / name / "decoded.jsonl").write_text(f"{name} {len(self.measured)}")
        return Outcome(status, {"load_s": len(self.measured)}, "", 1.0)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_what_was_measured_is_not_measured_again(bench):
    bench.run("a")
    kept = bench.run("a", "b")
    assert bench.measured == ["pytorch", "a", "b"]
    assert kept.resumed == ["pytorch", "a"]
    assert (bench.work / "a" / "decoded.jsonl").read_text() == "a 2"


def test_a_changed_artifact_is_measured_again(bench):
    bench.run("a", "b")
    (bench.root / "a" / MANIFEST).write_text("sealed anew")
    assert bench.run("a", "b").resumed == ["pytorch", "b"]
    assert bench.measured == ["pytorch", "a", "b", "a"]


def test_an_unfinished_measurement_does_not_count(bench):
    bench.run("a")
    (bench.work / "a" / DONE).unlink()
    assert bench.run("a").resumed == ["pytorch"]


def test_a_shortened_file_does_not_count(bench):
    """As after a power cut: the record came to the disk, the end of another file did not."""
    bench.run("a")
    (bench.work / "a" / "decoded.jsonl").write_text("")
    assert bench.run("a").resumed == ["pytorch"]


def test_a_crash_is_tried_again(bench):
    bench.run("a")
    (bench.work / "a" / DONE).unlink()
    bench.run("a", status="crashed")
    assert bench.run("a").resumed == ["pytorch"]


def test_another_measurement_of_pytorch_makes_all_others_stale(bench):
    bench.run("a")
    (bench.work / "pytorch" / DONE).unlink()
    assert bench.run("a").resumed == []


def interrupted(parent: Path, inputs: dict[str, object]) -> Path:
    """A folder with one finished measurement, one unfinished, and features, as after kill -9."""
    with pytest.raises(KeyboardInterrupt), resume.work_folder(parent, inputs, fresh=False) as folder:  # noqa: PT012
        (folder / "pytorch").mkdir()
        (folder / "pytorch" / DONE).write_text("{}")
        (folder / "onnx-fp32").mkdir()
        (folder / "mels.npy").write_text("")
        raise KeyboardInterrupt
    return folder


def test_a_finished_run_leaves_nothing(tmp_path):
    with resume.work_folder(tmp_path, INPUTS, fresh=False) as folder:
        assert folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_only_finished_measurements_wait(tmp_path):
    interrupted(tmp_path, INPUTS)
    with resume.work_folder(tmp_path, INPUTS, fresh=False) as folder:
        assert sorted(entry.name for entry in folder.iterdir()) == [resume.LOCK, "pytorch"]


@pytest.mark.parametrize(("inputs", "fresh"), [(INPUTS | {"threads": 2}, False), (INPUTS, True)])
def test_other_inputs_or_fresh_start_empty(tmp_path, inputs, fresh):
    interrupted(tmp_path, INPUTS)
    with resume.work_folder(tmp_path, inputs, fresh=fresh) as folder:
        assert [entry.name for entry in folder.iterdir()] == [resume.LOCK]


def test_what_nobody_took_up_in_time_is_removed(tmp_path):
    left = interrupted(tmp_path, INPUTS)
    long_ago = time.time() - resume.MAX_AGE_S - 60
    os.utime(left / "pytorch" / DONE, (long_ago, long_ago))
    with resume.work_folder(tmp_path, INPUTS | {"threads": 2}, fresh=False) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_what_is_too_old_is_not_taken_up(tmp_path):
    left = interrupted(tmp_path, INPUTS)
    long_ago = time.time() - resume.MAX_AGE_S - 60
    os.utime(left / "pytorch" / DONE, (long_ago, long_ago))
    with resume.work_folder(tmp_path, INPUTS, fresh=False) as folder:
        assert [entry.name for entry in folder.iterdir()] == [resume.LOCK]


def test_a_folder_in_use_is_left_alone(tmp_path):
    with resume.work_folder(tmp_path, INPUTS, fresh=False) as folder:
        long_ago = time.time() - resume.MAX_AGE_S - 60
        os.utime(folder, (long_ago, long_ago))
        with pytest.raises(BlockingIOError), resume.work_folder(tmp_path, INPUTS, fresh=True):
            pass
        with resume.work_folder(tmp_path, INPUTS | {"threads": 2}, fresh=False):
            assert folder.exists()


def test_a_quick_run_is_not_taken_up_as_a_full_one(trained, clips):
    utterances = [data.Utterance(clips[0].stem, clips[0], "words")]
    quick, full = (parity._inputs(trained, utterances, 1, level) for level in ("quick", "full"))
    assert quick != full
    assert quick == parity._inputs(trained, utterances, 1, "quick")


def test_our_own_code_is_part_of_the_inputs():
    assert resume.code_version() == resume.code_version()
    assert len(resume.code_version()) == 64
