"""What does not fit is refused before anything starts, with its name, its size and what there is."""

import pytest
from click.testing import CliRunner

from asr_core import build, capacity, registry
from asr_core.capacity import Cost
from asr_core.checkpoint import Checkpoint
from asr_core.errors import ExportError, StorageError, UnavailableError
from asr_export.export import main

COST = Cost(memory_mb=1000, memory=10, disk=4)
LARGE = {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_ffn": 5120, "decoder_ffn": 5120}


@pytest.fixture(scope="module")
def dims(shape_folder):
    return Checkpoint.open(shape_folder("mini")).dims


@pytest.fixture
def machine(monkeypatch):
    """A machine with so much memory (MB) and disk (bytes)."""

    def make(memory: float = 1e6, disk: float = 1e15) -> None:
        monkeypatch.setattr(capacity, "available_mb", lambda: memory)
        monkeypatch.setattr(capacity.shutil, "disk_usage", lambda place: type("Usage", (), {"free": disk}))

    return make


def test_parameters_are_those_of_the_model(dims, shape_folder):
    weights = Checkpoint.open(shape_folder("mini")).weights
    assert capacity.parameters(dims) == sum(weights.read(name).numel() for name in weights.names)


def test_what_fits_is_let_through(dims, machine, tmp_path):
    machine(COST.memory_of(dims) + 1, COST.disk * capacity.parameters(dims) + capacity.SMALL_FILES + 1)
    capacity.check("ctranslate2-fp32", COST, dims, tmp_path / "not" / "there")


def test_too_little_memory_is_said_in_figures(dims, machine, tmp_path):
    machine(memory=COST.memory_of(dims) - 1)
    large = dims.model_copy(update=LARGE)
    machine(memory=4000)
    with pytest.raises(UnavailableError, match=r"ctranslate2-fp32 would take about 16\.\d GB .* 4\.0 GB are free.*onnx"):
        capacity.check("ctranslate2-fp32", COST, large, tmp_path)


def test_as_many_copies_as_memory_has_room_for(dims, machine):
    machine(memory=1e6)
    assert capacity.copies(100, dims, batch_size=8, most=16) == 16
    large = dims.model_copy(update=LARGE | {"encoder_heads": 20})
    for memory, expected in ((1000, 1), (32_000, 1), (64_000, 2)):  # large-v3 in 8 bits
        machine(memory=memory)
        assert capacity.copies(1600, large, batch_size=8, most=16) == expected


def test_too_little_disk_is_said_in_figures(dims, machine, tmp_path):
    machine(disk=2e9)
    with pytest.raises(StorageError, match=r"would write 6\.\d GB below .*, where 2\.0 GB are free.*--out"):
        capacity.check("ctranslate2-fp32", COST, dims.model_copy(update=LARGE), tmp_path)


def test_a_container_has_less_than_its_machine(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("2500000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    monkeypatch.setattr(capacity, "_machine_mb", lambda: 9000.0)
    assert capacity.available_mb() == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity.available_mb() == 9000


def test_there_is_memory(monkeypatch, tmp_path):
    assert capacity.available_mb() > 100
    monkeypatch.setattr(capacity, "MEMORY", tmp_path / "absent")
    assert capacity.available_mb() > 100


@pytest.mark.parametrize("target", registry.names("exporters"))
def test_every_exporter_knows_what_each_precision_takes(target):
    known = {precision: build.cost(target, precision) for precision in build.exporter(target).PRECISIONS}
    assert all(known.values()), known


def test_a_format_that_cannot_hold_the_model_says_so_first(dims, machine, tmp_path, shape_folder):
    machine(memory=1)  # which would be refused too, but a larger machine would not help
    checkpoint = Checkpoint.open(shape_folder("mini"))
    object.__setattr__(checkpoint, "dims", dims.model_copy(update=LARGE))
    with pytest.raises(ExportError, match=r"tflite-int8 cannot hold mini: the float32 file .* 6\.\d\d GB, .* end at 2\.15 GB\."):
        build.refuse_misfit(checkpoint, "tflite", "int8", tmp_path)


@pytest.mark.parametrize(("memory", "disk", "code"), [(1, 1e15, 5), (1e6, 1, 9)])
def test_the_command_starts_nothing_that_cannot_end(machine, mini, tmp_path, monkeypatch, memory, disk, code):
    machine(memory, disk)
    monkeypatch.setattr(build, "stage", lambda *_: pytest.fail("was started"))
    arguments = ["--model", str(mini), "--target", "ncnn", "--precision", "all", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code
    assert done.output.count("ncnn-fp32 would") == done.output.count("ncnn-fp16 would") == 1
    assert not (tmp_path / "out").exists()
