"""What a fleet's machines share, and how a measurement is cut and put together: without Dask."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner

from asr_core.errors import AudioError, StorageError, UsageError
from asr_export import parity
from parity import data, units
from parity.share import Share
from parity.units import Unit

UNIT = Unit(
    name="onnx-0", result="results/onnx/0-1.zip", target="onnx", model="models/onnx", inputs="features/0-1",
    recordings="recordings/0-1", n_mels=80, probes=(), forced=(), threads=1, max_new_tokens=None, level=None, timeout=None,
    code="other sources",
)  # fmt: skip


@pytest.fixture(params=["folder", "memory://{name}"])
def share(request, tmp_path):
    """A shared folder, and an object store as fsspec gives one."""
    address = str(tmp_path / "share") if request.param == "folder" else request.param.format(name=tmp_path.name)
    return Share(address, tmp_path / "cache")


def test_files_come_back(share, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert not share.exists("a/b")
    share.put(tmp_path / "file", "a/b")
    share.get("a/b", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"content"
    share.write("c", {"d": 1})
    assert share.read("c") == {"d": 1}
    share.remove()
    assert not share.exists("a/b")


def test_a_folder_is_fetched_as_it_was_published(share, tmp_path):
    source = tmp_path / "model"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights").write_text("first")
    (source / "link").symlink_to("deep/weights")
    share.publish(source, "models/m")
    fetched = share.fetch("models/m")
    assert (fetched / "deep" / "weights").read_text() == (fetched / "link").read_text() == "first"
    assert share.fetch("models/m") == fetched


def test_what_was_borrowed_leaves_nothing_behind(share, tmp_path):
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "mels").write_text("first")
    share.publish(tmp_path / "shard", "features/0-1")
    assert share.published("features/0-1")
    with share.borrow("features/0-1") as folder:
        assert (folder / "mels").read_text() == "first"
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] if (tmp_path / "cache").exists() else []
    assert not kept
    with share.borrow("features/0-1") as folder:
        assert (folder / "mels").read_text() == "first"


def test_recordings_that_travelled_give_the_same_features(share, tmp_path, clips):
    utterances = [data.Utterance(clip.stem, clip, "words") for clip in clips[:3]]
    for name in ("links", "here", "there"):
        (tmp_path / name).mkdir()
    data.prepare(utterances, 80, tmp_path / "here")
    data.collect(utterances, tmp_path / "links")
    share.publish(tmp_path / "links", "recordings/0-3")
    with share.borrow("recordings/0-3") as recordings:
        data.prepare_collected(str(recordings), 80, str(tmp_path / "there"))
    assert data.prepared(tmp_path / "there") == data.prepared(tmp_path / "here")
    np.testing.assert_array_equal(np.load(tmp_path / "there" / data.MELS), np.load(tmp_path / "here" / data.MELS))


def test_features_are_made_once(share, tmp_path):
    (tmp_path / "shard").mkdir()
    share.publish(tmp_path / "shard", UNIT.inputs)
    nobody = None  # who would make them
    assert units._make_inputs(UNIT, share, nobody).status == "ok"


def test_a_recording_that_travelled_is_named_as_the_user_knows_it(tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "spoken.wav").write_bytes(b"no audio")
    data.collect([data.Utterance("spoken", tmp_path / "spoken.wav", "words")], tmp_path / "links")
    with pytest.raises(AudioError, match=rf"^{tmp_path}/spoken\.wav is not audio"):
        data.prepare_collected(str(tmp_path / "links"), 80, str(tmp_path))


def test_nothing_of_an_unfinished_file_shows(share, tmp_path, monkeypatch):
    filesystem = share._opened[0]
    monkeypatch.setattr(filesystem, "mv", lambda *_: (_ for _ in ()).throw(OSError("the machine died")))
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(OSError, match="the machine died"):
        share.put(tmp_path / "file", "a/b")
    assert not share.exists("a/b")


def test_a_place_that_takes_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write to"):
        Share(str(tmp_path / "file" / "below"), tmp_path / "cache").check()
    with pytest.raises(UsageError, match="nowhere"):
        Share("nowhere://x", tmp_path / "cache").check()


def test_a_torn_result_is_none(share, tmp_path):
    (tmp_path / "torn").write_bytes(b"PK not all of it")
    share.put(tmp_path / "torn", "r.zip")
    assert units.finished(share, "r.zip") is None
    assert units.finished(share, "never.zip") is None
    with zipfile.ZipFile(tmp_path / "whole", "w") as archive:
        archive.writestr(units.ANSWER, json.dumps({"status": "ok"}))
    share.put(tmp_path / "whole", "r.zip")
    assert units.finished(share, "r.zip") == {"status": "ok"}


def test_utterances_are_cut_in_order():
    assert units.shards(7, 3) == [range(3), range(3, 6), range(6, 7)]
    assert [units.size(parameters) for parameters in (40_000_000, 1_500_000_000, 10**11)] == [75, 2, 1]


def test_costs_of_a_whole_measurement():
    one = {"decoder": "step", "load_s": 2.0, "peak_rss_mb": 100.0}
    parts = [
        {"result": one, "seconds": 3.0, "own_s": 2.0},
        {"result": one | {"load_s": 9.0, "peak_rss_mb": 300.0}, "seconds": 4.0, "own_s": 3.0},
        {"result": one | {"load_s": 1.0}, "seconds": 1.0, "own_s": 0.5},
        {"result": {"suite": {"x": 1}, "modes": {}}, "seconds": 2.0, "own_s": 1.0},
    ]
    whole = units.joined(parts)
    assert whole.result == {"decoder": "step", "load_s": 2.0, "peak_rss_mb": 300.0, "suite": {"x": 1}, "modes": {}}
    assert (whole.status, whole.seconds, whole.own_s) == ("ok", 10.0, 6.5)


def test_a_worker_with_other_sources_says_so(tmp_path):
    outcome = units.outcome_of(units.run(UNIT, str(tmp_path)))
    assert outcome.status == "error"
    assert isinstance(outcome.error, UsageError)
    assert "other sources of asr-export" in outcome.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "/x"], "--share belongs to --cluster."),
        (["--unit", "3"], "--unit belongs to --cluster."),
        (["--cluster", "tcp://here:1"], "--cluster tcp://here:1 needs --share"),
    ],
)
def test_options_that_make_no_sense(options, message):
    result = CliRunner().invoke(parity.main, options)
    assert result.exit_code == UsageError.exit_code
    assert message in result.stderr


def test_one_machine_knows_nothing_of_dask():
    code = (
        "import sys, asr_export.parity, parity.session, parity.units\n"
        "print({'dask', 'distributed', 'fsspec'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
