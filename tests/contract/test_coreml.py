"""Core ML without a Mac: the interpreter means what torch means, and with it a wrong program is refused."""

import json
import logging
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from asr_core import registry
from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.errors import ExportError, UnavailableError, UsageError
from compressors.folder import write as write_checkpoint
from compressors.model import Form, Model
from exporters import coreml
from parity import compare
from parity.data import Utterance
from runners import _mil
from runners import coreml as runner_module
from runners.base import open_runner

ct = registry.import_alone("coremltools", without=coreml.NEIGHBOURS)
mb = ct.converters.mil.Builder
types = ct.converters.mil.mil.types

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def save(program: Any, folder: Path) -> _mil.Program:
    """Save a program exactly as it is written (no pass changes it) and open it with the interpreter."""
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(folder / "program.mlpackage"))
    return _mil.Program(folder / "program.mlpackage")


# --- the operations

X, Y = random(2, 3, 8), random(2, 3, 8)
WEIGHT, BIAS = random(5, 8), random(5)
KERNEL, KERNEL_2D = random(4, 3, 3), random(4, 3, 3, 2)
GAMMA, BETA = random(8), random(8)

x, y = torch.from_numpy(X), torch.from_numpy(Y)
table, ids = torch.from_numpy(WEIGHT), torch.tensor([[3, 0], [4, 4]])
masks = {"begin_mask": [False, False, True], "end_mask": [True, False, False]}

# Name → the operation on the inputs as MIL writes it, and what torch makes of the same.
OPERATIONS: dict[str, tuple[Callable[[Any, Any], Any], torch.Tensor]] = {
    "add": (lambda a, b: mb.add(x=a, y=b), x + y),
    "sub": (lambda a, b: mb.sub(x=a, y=b), x - y),
    "mul": (lambda a, b: mb.mul(x=a, y=np.float32(3)), x * 3),
    "real_div": (lambda a, b: mb.real_div(x=a, y=b), x / y),
    "maximum": (lambda a, b: mb.maximum(x=a, y=b), x.maximum(y)),
    "minimum": (lambda a, b: mb.minimum(x=a, y=b), x.minimum(y)),
    "cast": (lambda a, b: mb.cast(x=mb.mul(x=a, y=np.float32(10)), dtype="int32"), (x * 10).to(torch.int32)),
    "comparisons": (
        lambda a, b: mb.cast(
            x=mb.logical_and(x=mb.greater(x=a, y=b), y=mb.less_equal(x=a, y=np.float32(1))), dtype="fp32"
        ),
        ((x > y) & (x <= 1)).float(),
    ),
    "equalities": (
        lambda a, b: mb.cast(x=mb.not_equal(x=mb.cast(x=mb.equal(x=a, y=a), dtype="int32"), y=np.int32(1)), dtype="int32"),
        torch.zeros(2, 3, 8),
    ),
    "linear": (lambda a, b: mb.linear(x=a, weight=WEIGHT, bias=BIAS), F.linear(x, table, torch.from_numpy(BIAS))),
    "matmul": (lambda a, b: mb.matmul(x=a, y=b, transpose_y=True), x @ y.mT),
    "matmul of a transposed": (lambda a, b: mb.matmul(x=a, y=b, transpose_x=True), x.mT @ y),
    "conv, padded and strided": (
        lambda a, b: mb.conv(x=a, weight=KERNEL, strides=[2], pad_type="custom", pad=[1, 1]),
        F.conv1d(x, torch.from_numpy(KERNEL), stride=2, padding=1),
    ),
    "conv over two axes, padded unevenly": (
        lambda a, b: mb.conv(x=mb.reshape(x=a, shape=[2, 3, 4, 2]), weight=KERNEL_2D, pad_type="custom", pad=[1, 2, 0, 1]),
        F.conv2d(F.pad(x.reshape(2, 3, 4, 2), [0, 1, 1, 2]), torch.from_numpy(KERNEL_2D)),
    ),
    "layer_norm": (
        lambda a, b: mb.layer_norm(x=a, axes=[-1], gamma=GAMMA, beta=BETA, epsilon=1e-3),
        F.layer_norm(x, (8,), torch.from_numpy(GAMMA), torch.from_numpy(BETA), 1e-3),
    ),
    "gelu": (lambda a, b: mb.gelu(x=a, mode="EXACT"), F.gelu(x)),
    "softmax": (lambda a, b: mb.softmax(x=a, axis=1), x.softmax(1)),
    "reduce_sum": (lambda a, b: mb.reduce_sum(x=a, axes=[0, 2], keep_dims=True), x.sum((0, 2), keepdim=True)),
    "transpose": (lambda a, b: mb.transpose(x=a, perm=[2, 0, 1]), x.permute(2, 0, 1)),
    "reshape": (lambda a, b: mb.reshape(x=a, shape=[4, -1]), x.reshape(4, -1)),
    "expand_dims": (lambda a, b: mb.expand_dims(x=a, axes=[0, -1]), x[None, ..., None]),
    "squeeze": (lambda a, b: mb.squeeze(x=mb.expand_dims(x=a, axes=[1, 2]), axes=[1, 2]), x),
    "tile": (lambda a, b: mb.tile(x=a, reps=[1, 2, 3]), x.tile(1, 2, 3)),
    "tile of one": (lambda a, b: mb.tile(x=mb.expand_dims(x=a, axes=[0]), reps=[4, 1, 1, 1]), x.expand(4, 2, 3, 8)),
    "concat": (lambda a, b: mb.concat(values=[a, b], axis=1), torch.cat([x, y], 1)),
    "split": (lambda a, b: mb.split(x=a, split_sizes=[7, 1], axis=-1)[1], x[..., 7:]),
    "select": (lambda a, b: mb.select(cond=mb.greater(x=a, y=np.float32(0)), a=a, b=b), torch.where(x > 0, x, y)),
    "gather": (lambda a, b: mb.gather(x=WEIGHT, indices=mb.cast(x=ids.numpy().astype(np.float32), dtype="int32"), axis=0),
               table[ids]),
    "slice_by_index": (
        lambda a, b: mb.slice_by_index(x=a, begin=[1, 1, 5], end=[0, 3, 7], stride=[1, 1, 2], **masks),
        x[1:, 1:3, :7:2],
    ),
    "slice_by_index, squeezed": (
        lambda a, b: mb.slice_by_index(x=a, begin=[0, -1, 0], end=[2, 0, 8], squeeze_mask=[False, True, False]),
        x[:, -1],
    ),
    "slice_update": (
        lambda a, b: mb.slice_update(x=a, update=np.ones((2, 1, 8), np.float32), begin=[0, 1, 0], end=[2, 2, 8]),
        torch.cat([x[:, :1], torch.ones(2, 1, 8), x[:, 2:]], 1),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Every operation in one program: a conversion each would cost a minute."""

    @mb.program(input_specs=[mb.TensorSpec(shape=X.shape), mb.TensorSpec(shape=Y.shape)], opset_version=ct.target.iOS18)
    def program(a, b):
        return tuple(mb.identity(x=written(a, b)) for written, _ in OPERATIONS.values())

    opened = save(program, tmp_path_factory.mktemp("operations"))
    return list(opened.predict(dict(zip(opened.inputs, (X, Y), strict=True))).values())


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_means_what_it_means_in_torch(results, name):
    torch.testing.assert_close(results[list(OPERATIONS).index(name)], OPERATIONS[name][1], check_dtype=False)


def test_an_unknown_operation_is_an_error_that_names_it_and_its_place(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec(shape=(4,))])
    def program(a):
        return mb.cumsum(x=mb.add(x=a, y=np.float32(1)), axis=0, name="running_total")

    with pytest.raises(UnavailableError, match=r"program\.mlpackage.* cumsum \(running_total\): it doesn't know this operation"):
        save(program, tmp_path)


def test_an_unknown_way_of_an_operation_is_an_error_too(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec(shape=(4,))])
    def program(a):
        return mb.gelu(x=a, mode="TANH_APPROXIMATION", name="almost")

    opened = save(program, tmp_path)
    with pytest.raises(UnavailableError, match=r"gelu \(almost\): it doesn't know mode"):
        opened.predict({name: np.zeros(4, np.float32) for name in opened.inputs})


def test_results_and_states_are_rounded_to_their_types(tmp_path):
    spec = mb.StateTensorSpec(shape=(3,), dtype=types.fp16)

    @mb.program(input_specs=[mb.TensorSpec(shape=(3,), dtype=types.fp16), spec], opset_version=ct.target.iOS18)
    def program(a, total):
        return mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=a))

    opened = save(program, tmp_path)
    state = opened.make_state()
    thirds = np.array([1 / 3, 1e-3, 1000], np.float16)
    half, single = np.zeros(3, np.float16), np.zeros(3, np.float32)
    for _ in range(200):
        (result,) = opened.predict({"a": thirds}, state).values()
        with np.errstate(over="ignore"):
            half, single = half + thirds, single + thirds
    assert np.array_equal(result.numpy(), half.astype(np.float32))
    assert not np.array_equal(result.numpy(), single)
    assert np.isinf(half[2])  # 200,000 is beyond float16
    untouched = opened.copy_state(state)
    opened.predict({"a": thirds}, state)
    assert not torch.equal(untouched["total"], state["total"])


# --- the exporter


@pytest.fixture(scope="module")
def exported(shape_folder, export_here) -> Callable[[str], Artifact]:
    return cache(lambda precision: export_here(shape_folder("mini"), "coreml", precision))


@pytest.fixture(scope="module")
def forced(shape_folder) -> SimpleNamespace:
    """A window, twenty tokens after the prompt, and what PyTorch makes of them."""
    runner = open_runner("pytorch", shape_folder("mini"), 1)
    mel = random(1, runner.dims.n_mels, 3000)
    tokens = [*runner.tokens.prompt(), *RNG.integers(0, runner.tokens.end, 20).tolist()]
    return SimpleNamespace(mel=mel, tokens=tokens, encoder=runner.encoder_states(mel), logits=runner.score(mel, tokens))


def errors(artifact: Artifact, forced: SimpleNamespace) -> dict[str, float]:
    """An artifact's largest errors, as :mod:`parity.compare` scales them."""
    runner = open_runner("coreml", artifact.path, 1)
    got = {"encoder": runner.encoder_states(forced.mel), "logits": runner.score(forced.mel, forced.tokens)}
    return {
        f"{key}_error": float(np.abs(value - getattr(forced, key)).max() / max(1, np.abs(getattr(forced, key)).max()))
        for key, value in got.items()
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp16-stateful"])
def test_twenty_steps_are_those_of_pytorch(exported, forced, precision):
    assert not compare.misses(errors(exported(precision), forced), compare.thresholds("export", precision))


def test_a_cache_update_that_the_converter_drops_is_refused(monkeypatch, shape_folder, export_here, forced):
    def at_an_index(past, row, _slots, position):
        past[:, :, position] = row
        return past

    monkeypatch.setattr(coreml, "_remember", at_an_index)
    with pytest.raises(ExportError, match="lost the updates of the states past_k_0, past_k_1, past_v_0, past_v_1"):
        export_here(shape_folder("mini"), "coreml", "fp16-stateful")
    # And were it not found while exporting, the comparison with PyTorch would find it.
    monkeypatch.setattr(coreml, "_check_states", lambda model, traceable: None)
    artifact = export_here(shape_folder("mini"), "coreml", "fp16-stateful")
    missed = compare.misses(errors(artifact, forced), compare.thresholds("export", "fp16-stateful"))
    assert [miss.split()[0] for miss in missed] == ["logits_error"]


def test_every_weight_is_stored_once(exported, shape_folder):
    checkpoint = Checkpoint.open(shape_folder("mini"))
    values = sum(tensor.numel() for tensor in checkpoint.state_dict().values())
    stored = sum(file.stat().st_size for file in exported("fp16").path.rglob("weight.bin"))
    assert stored == pytest.approx(2 * values, rel=0.02)


def test_int8_keeps_rows_of_zeros(export_here, shape_folder):
    artifact = export_here(shape_folder("mini"), "coreml", "int8")
    program = _mil.Program(artifact.path / "decoder.mlpackage")
    embedding = next(value for name, value in program._constants.items() if "embed_tokens" in name)
    expected = Checkpoint.open(shape_folder("mini")).weights.read("model.decoder.embed_tokens.weight")
    zero = (expected == 0).all(1)
    assert zero.any()
    assert not embedding[zero].any()
    torch.testing.assert_close(embedding, expected, atol=float(expected.abs().max()) / 127, rtol=0)


def test_a_palette_is_the_best_one():
    values = np.concatenate([np.full(90, 1.0), np.full(9, 2.0), np.full(5, -3.0), np.full(4, -3.25)]).astype(np.float16)
    palette, indices = coreml.cluster(values, 2)
    assert set(palette[indices]) == set(values)
    palette, indices = coreml.cluster(values, 1)
    assert sorted(palette.tolist()) == pytest.approx([-28 / 9, 108 / 99], rel=1e-3)


def clustered(shape_folder, folder: Path, values: dict[str, tuple[int, int]]) -> Checkpoint:
    """The mini checkpoint with weights of random palettes: of each, how many (1 or one a row) and their size."""
    source = Checkpoint.open(shape_folder("mini"))
    model = Model.open(source)
    tensors, forms = {}, {}
    for name, (count, size) in values.items():
        shape = model.tensors[name].shape
        centroids = torch.randn(count or shape[0], size).half().float()
        indices = torch.randint(size, shape)
        tensors[name] = centroids.expand(shape[0], -1).gather(1, indices)
        forms[name] = Form({"centroids": centroids, "indices": indices.to(torch.uint8)})
    write_checkpoint(folder, source, model.changed(tensors, forms), [], [], None)
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("precision", "values"),
    [
        ("palette6", {"model.decoder.layers.0.fc1.weight": (1, 64), "model.encoder.layers.1.fc2.weight": (1, 5)}),
        ("palette4-stateful", {"model.decoder.layers.0.fc1.weight": (1, 16), "model.encoder.layers.1.fc2.weight": (0, 16)}),
    ],
)
def test_recorded_palettes_are_kept(precision, values, shape_folder, export_here, tmp_path):
    checkpoint = clustered(shape_folder, tmp_path / "clustered", values)
    artifact = export_here(checkpoint.path, "coreml", precision)
    held = {}
    for name in ("encoder", "decoder"):
        for op in _mil._load(artifact.path / f"{name}.mlpackage").operations:
            if op.op_type == "constexpr_lut_to_dense":
                held[op.name] = torch.from_numpy(np.asarray(op.materialized_val_inference(), np.float32))
    for name in values:
        (value,) = (v for n, v in held.items() if n.startswith(name.removeprefix("model.").replace(".", "_")))
        assert value.equal(checkpoint.weights.read(name)), name
    assert artifact.manifest.notices == []


def test_what_core_ml_cannot_hold_is_refused_with_all_reasons(mini, tmp_path):
    weights = load_file(mini / "model.safetensors")
    weights["model.encoder.layers.0.fc1.weight"][0, 0] = 1e5
    weights["model.decoder.layers.1.fc2.bias"][3] = -7e4
    save_file(weights, mini / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(mini)
    huge = replace(checkpoint, dims=checkpoint.dims.model_copy(update={"n_audio_ctx": 50_000, "vocab": 2**26 + 1, "d_model": 60}))
    with pytest.raises(ExportError) as refused:
        coreml.export(huge, tmp_path, "palette4-stateful", lambda stage: None)
    reasons = str(refused.value).splitlines()[1:]
    assert len(reasons) > 4
    for reason in ("fc1.weight reaches 1e+05", "fc2.bias reaches 7e+04", "the encoder's attention", "cannot be grouped by 16",
                   "embed_tokens.weight [67108865, 60] has more than"):  # fmt: skip
        assert any(reason in line for line in reasons), reason
    assert not coreml.problems(checkpoint, "fp32")


def test_a_warning_of_the_converter_fails_the_export_unless_it_is_known_to_be_harmless():
    with pytest.raises(ExportError, match="Cannot perform palettization on w"), coreml._clean_conversion("decoder"):
        logging.getLogger("coremltools").warning("Cannot perform palettization on w. Skipped this op.")
    with pytest.raises(ExportError, match="refused the decoder: no such op"), coreml._clean_conversion("decoder"):
        raise NotImplementedError("no such op")
    with coreml._clean_conversion("decoder"):
        warnings.warn("Tuple detected at graph output. This will be flattened.", stacklevel=1)


def test_a_library_is_imported_without_its_neighbours(monkeypatch, tmp_path):
    (tmp_path / "nosy.py").write_text("try:\n    import wave\nexcept ImportError:\n    wave = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.import_alone("nosy", without=["wave", "another"]).wave is None
    assert __import__("wave").open
    assert "another" not in sys.modules


# --- on macOS


class FakeMLModel:
    """Core ML as far as its Python binding shows it: arrays in and out (float32 for float16 inputs), opaque states."""

    def __init__(self, package: str, compute_units: Any) -> None:
        self.program = _mil.Program(Path(package))
        self.types = {port.name: port.type.multiArrayType.dataType for port in self._ports(package)}

    @staticmethod
    def _ports(package: str) -> list[Any]:
        description = ct.utils.load_spec(package).description
        return [*description.input, *description.output]

    def _array(self, name: str, value: torch.Tensor) -> np.ndarray:
        return value.numpy().astype({65568: np.float32, 65552: np.float16, 131104: np.int32}[self.types[name]])

    def predict(self, data: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        assert all(type(value) is np.ndarray for value in data.values())
        assert {value.dtype.name for value in data.values()} <= {"float32", "int32"}
        made = self.program.predict(data, state and state.held)
        return {name: self._array(name, value) for name, value in made.items()}

    def make_state(self) -> Any:
        held = self.program.make_state()
        return SimpleNamespace(
            held=held,
            read_state=lambda name: held[name].numpy(),
            write_state=lambda name, value: held.update({name: torch.from_numpy(value.copy())}),
        )


@pytest.mark.parametrize("precision", ["fp16", "fp16-stateful"])
def test_on_macos_core_ml_gets_what_it_takes(monkeypatch, exported, forced, precision):
    monkeypatch.setattr(runner_module, "MACOS", True)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(ct.models, "MLModel", FakeMLModel)
    assert not compare.misses(errors(exported(precision), forced), compare.thresholds("export", precision))
    runner = open_runner("coreml", exported(precision).path, 1)
    state = runner.encode(forced.mel)
    runner.step(np.array([forced.tokens[:4]]), state)
    both = runner.step(np.array([[300], [300]]), runner.reorder(state, np.array([0, 0])))
    assert np.array_equal(both[0], both[1])


def test_macos_too_old_and_unknown_units_are_refused(monkeypatch, exported):
    monkeypatch.setattr(runner_module, "MACOS", True)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.7", ("", "", ""), "arm64"))
    with pytest.raises(UnavailableError, match=r"needs macOS 15\+; this is 14\.7"):
        open_runner("coreml", exported("fp16-stateful").path, 1)
    monkeypatch.setenv("ASR_EXPORT_COMPUTE_UNITS", "gpu")
    with pytest.raises(UsageError, match="all, cpu_and_ne, cpu_only"):
        open_runner("coreml", exported("fp16").path, 1)


def test_interpreted_time_is_never_reported(exported, tmp_path):
    runner = open_runner("coreml", exported("fp16").path, 1)
    timings = {"encode_s": 1.0, "decode_s": 1.0, "prompt_s": 0.5}
    (tmp_path / "decoded.jsonl").write_text(json.dumps({"tokens": [5], "text": "five", "timings": timings}))
    row = compare.compare(
        target="coreml",
        precision="fp16",
        reference=tmp_path,
        candidate=tmp_path,
        measured={"decoder": "step", "timed": runner.timed, "timing_needs": runner.timing_needs,
                  "load_s": 1.0, "peak_rss_mb": 1.0, "size_mb": 1.0},
        utterances=[Utterance("a", tmp_path, "five", 2.0)],
        normalise=lambda text, language: text.lower(),
        probes={},
        bounds=compare.thresholds("parity", "fp16-stateful"),
    )  # fmt: skip
    assert (row.status, row.reason) == ("pass", "timings unavailable: needs macOS 13+")
    assert {getattr(row, name) for name in compare.TIMINGS} == {None}
    assert (row.wer, row.token_match, row.size_mb) == (0.0, 1.0, 1.0)
