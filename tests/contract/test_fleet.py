"""A fleet of worker processes against this machine alone: the same report, whatever happens to the workers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import soundfile
from distributed import Client, LocalCluster

from asr_core.checkpoint import Checkpoint
from asr_core.errors import UnavailableError
from asr_export.parity import measure_all
from parity import data, fleet, report
from parity.measurers import Alone

CLIPS = 8
# What depends on when and where something ran, and not on what was heard.
HOST = {
    "created", "harness", "seconds", "load_s", "peak_rss_mb", "rtfx", "latency_p50_s", "latency_p95_s", "ttft_s", "tokens_per_s",
    "speedup", "latency_s",
}  # fmt: skip
LABELS = {"a": ["pytorch", "ctranslate2"], "b": ["pytorch", "ctranslate2"], "c": ["onnx"], "d": ["onnx", "ctranslate2"]}
KILLED, SLOW = ("a", "c"), "d"


@pytest.fixture(scope="module")
def scheduler():
    with LocalCluster(n_workers=0, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def workers(scheduler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--no-nanny", "--no-dashboard", "--nthreads", "1"]
    started = {
        name: subprocess.Popen(
            [*command, "--name", name, "--resources", " ".join(f"{label}=1" for label in labels), "--local-directory", folder],
            stderr=(folder / f"{name}.log").open("w"),
        )
        for name, labels in LABELS.items()
    }
    with Client(scheduler) as client:
        client.wait_for_workers(len(LABELS))
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def artifacts(talkative, export_here):
    return [export_here(talkative, target, "fp32").path for target in ("ctranslate2", "onnx")]


@pytest.fixture(scope="module")
def spoken(clips):
    manifest = clips[0].with_name("manifest.jsonl")
    return data.read(manifest)[:CLIPS]


def without_host(document):
    if isinstance(document, dict):
        return {key: without_host(value) for key, value in document.items() if key not in HOST}
    return [without_host(value) for value in document] if isinstance(document, list) else document


def measured(talkative, spoken, artifacts, work, measurer):
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(talkative)
    run = measure_all(checkpoint, spoken, artifacts, 1, "quick", work, measurer)
    document = report.document(checkpoint, run.session.utterances, run.rows, 1, details=run.details, context=run.session.context)
    return json.dumps(without_host(document), indent=1)


class Fate:
    """Kills two workers as soon as they begin something, and freezes the model of a third under a shard."""

    def __init__(self, workers, addresses) -> None:
        self.workers, self.addresses = workers, addresses
        self.met: list[str] = []

    def __call__(self, event) -> None:
        name, key = self.addresses[event[1]["worker"]], event[1]["key"]
        if name in self.met or not (name in KILLED or (name == SLOW and "ctranslate2" in key and "cases" not in key)):
            return
        self.met.append(name)
        if name in KILLED:
            self.workers[name].kill()
        else:
            threading.Thread(target=self.freeze).start()

    def freeze(self) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for child in psutil.Process(self.workers[SLOW].pid).children():
                # Not before it runs its own program: until then, the worker itself stands still in starting it.
                if "asr_core.isolate" in child.cmdline():
                    os.kill(child.pid, signal.SIGSTOP)
                    return
            time.sleep(0.01)


def test_killed_workers_and_a_straggler_change_nothing(talkative, spoken, artifacts, scheduler, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "LEAST_STRAGGLER_S", 1.0)
    alone = measured(talkative, spoken, artifacts, tmp_path / "alone", Alone())
    with fleet.connect(scheduler, str(tmp_path / "share"), 1, 1, fresh=False) as measurer:
        info = measurer.client.scheduler_info(n_workers=-1)["workers"]
        fate = Fate(workers, {address: worker["id"] for address, worker in info.items()})
        measurer.client.unsubscribe_topic(fleet.TOPIC)
        measurer.client.subscribe_topic(fleet.TOPIC, lambda event: (measurer._begun(event), fate(event)))
        together = measured(talkative, spoken, artifacts, tmp_path / "together", measurer)
    assert together == alone
    seconds = sum(soundfile.info(one.path).duration for one in spoken)
    assert json.loads(together)["data"]["audio_s"] == pytest.approx(seconds, abs=0.01)
    assert sorted(fate.met) == sorted([*KILLED, SLOW])
    assert not (tmp_path / "share").exists()


@pytest.mark.usefixtures("workers")
def test_a_label_that_nobody_carries_is_unavailable(scheduler, tmp_path):
    with fleet.connect(scheduler, str(tmp_path / "share"), 1, 1, fresh=False) as measurer:
        measurer.require("onnx.sherpa")
        with pytest.raises(UnavailableError, match="no worker of the cluster carries the label 'coreml'"):
            measurer.require("coreml")


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "CONNECT_S", 0.5)
    with (
        pytest.raises(UnavailableError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"),
        fleet.connect("tcp://127.0.0.1:1", str(tmp_path / "share"), 1, 1, fresh=False),
    ):
        pass
