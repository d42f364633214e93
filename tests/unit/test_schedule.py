"""Which export begins when; what one is thought to need."""

import math
import shutil
import threading

import pytest

from asr_core.capacity import Cost, parameters
from asr_export import schedule
from asr_export.schedule import Need, Task


class Watch:
    """Tasks that note beside which others they ran."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.running: set[str] = set()
        self.begun: list[str] = []
        self.together: list[set[str]] = []

    def task(self, name: str, seconds: float, memory_mb: float, *, until: tuple[str, ...] = ()) -> Task:
        """A task that ends once the others that it names have begun."""

        def do() -> str:
            with self.lock:
                self.running.add(name)
                self.begun.append(name)
                self.together.append(set(self.running))
                self.lock.notify_all()
                assert self.lock.wait_for(lambda: set(until) <= set(self.begun), 60)
                self.running.remove(name)
            return name

        return Task(Need(seconds, memory_mb), do)


def test_the_longest_begins_and_results_keep_their_order():
    watch = Watch()
    needs = {"short": 1.0, "unknown": math.inf, "long": 9.0}
    assert schedule.run([watch.task(name, seconds, 1) for name, seconds in needs.items()], 1, 100) == list(needs)
    assert watch.begun == ["unknown", "long", "short"]


def test_memory_decides_what_runs_side_by_side():
    """60 beside 30, never 60 beside 60; what is larger than all there is runs alone."""
    watch = Watch()
    tasks = [
        watch.task("a", 9, 60, until=("small",)),
        watch.task("b", 8, 60),
        watch.task("small", 7, 30),
        watch.task("huge", 1, 500),
    ]
    assert schedule.run(tasks, 3, 100) == ["a", "b", "small", "huge"]
    assert set(watch.begun[:2]) == {"a", "small"}
    assert not any({"a", "b"} <= running for running in watch.together)
    assert [running for running in watch.together if "huge" in running] == [{"huge"}]


def test_no_more_than_the_jobs():
    watch = Watch()
    schedule.run([watch.task("0", 9, 0, until=("1",)), *(watch.task(str(i), 1, 0) for i in range(1, 4))], 2, 100)
    assert max(map(len, watch.together)) == 2


def test_nothing_begins_after_a_failure():
    def fail() -> None:
        raise ZeroDivisionError

    begun = []
    with pytest.raises(ZeroDivisionError):
        schedule.run([Task(Need(9, 0), fail), Task(Need(1, 0), lambda: begun.append(1))], 1, 100)
    assert not begun


def test_an_earlier_export_tells_what_the_next_one_needs(talkative_artifact, tmp_path):
    manifest = talkative_artifact.manifest
    shutil.copytree(talkative_artifact.path, tmp_path / "model" / "ctranslate2-fp32")
    (tmp_path / "damaged" / "ctranslate2-fp32").mkdir(parents=True)
    cost = Cost(memory_mb=500, memory=6, disk=4)
    same = schedule.need("ctranslate2-fp32", cost, manifest.dims, tmp_path)
    assert same == Need(manifest.export_seconds, manifest.export_peak_rss_mb)
    # A thousand more words: what more weights take.
    wider = manifest.dims.model_copy(update={"vocab": manifest.dims.vocab + 1000})
    more = schedule.need("ctranslate2-fp32", cost, wider, tmp_path)
    assert more.memory_mb == pytest.approx(same.memory_mb + 6 * 1000 * manifest.dims.d_model / 1e6)
    assert more.seconds > same.seconds


def test_a_first_export_takes_what_its_exporter_knows(talkative_artifact, tmp_path):
    dims = talkative_artifact.manifest.dims
    known = schedule.need("onnx-fp32", Cost(memory_mb=500, memory=6, disk=4), dims, tmp_path)
    assert known == Need(math.inf, pytest.approx(500 + 6 * parameters(dims) / 1e6))
    assert schedule.need("planted-fp32", None, dims, tmp_path).memory_mb > known.memory_mb
