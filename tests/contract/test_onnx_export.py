"""What the ONNX files themselves must be: valid, small, and the same model that an ordinary export would give."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from transformers import WhisperForConditionalGeneration

from asr_core import graph
from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.errors import ArtifactError, ExportError
from exporters import onnx as exporter
from exporters.onnx import PRECISIONS, nearest_int8
from reference import shapes
from runners import onnx as runner

HEAD = "decoder.embed_tokens.weight"
GRAPHS = ("encoder", "decoder")


@pytest.fixture(scope="module")
def exported(shape_folder, export_here) -> Callable[[str], Artifact]:
    done: dict[str, Artifact] = {}

    def export(precision: str) -> Artifact:
        if precision not in done:
            done[precision] = export_here(shape_folder("mini"), "onnx", precision)
        return done[precision]

    return export


def initializers(artifact: Artifact, name: str) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(artifact.path / f"{name}.onnx").graph.initializer}


def session(model: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])


def test_listing_precisions_imports_no_converter():
    heavy = "sorted({'torch', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules))"
    command = f"import sys; from exporters.onnx import PRECISIONS; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == "[]"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GRAPHS)
def test_checker_accepts_the_shipped_file(exported, precision, name):
    onnx.checker.check_model(exported(precision).path / f"{name}.onnx", full_check=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_manifest_lists_what_the_files_declare(exported, precision):
    artifact = exported(precision)
    for name in GRAPHS:
        opened = session(artifact.path / f"{name}.onnx")
        for role, values in (("input", opened.get_inputs()), ("output", opened.get_outputs())):
            specs = [spec for spec in artifact.manifest.tensors if (spec.graph, spec.role) == (name, role)]
            assert [(spec.name, list(spec.shape)) for spec in specs] == [(value.name, value.shape) for value in values]
            assert all(ort_type(spec.dtype) == value.type for spec, value in zip(specs, values, strict=True))


def ort_type(dtype: str) -> str:
    return f"tensor({'float' if dtype == 'float32' else dtype})"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_weight_is_stored_twice(exported, precision):
    artifact = exported(precision)
    seen: dict[bytes, str] = {}
    for name in GRAPHS:
        for tensor in initializers(artifact, name).values():
            if math.prod(tensor.dims) > 1000:
                assert tensor.raw_data not in seen, f"{tensor.name} is {seen.get(tensor.raw_data)} again"
                seen[tensor.raw_data] = tensor.name


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4), ("fp16", 2)])
def test_float_files_weigh_what_the_checkpoint_has_parameters(exported, shape_folder, precision, bytes_each):
    weights = Checkpoint.open(shape_folder("mini")).weights
    parameters = sum(math.prod(weights.shape(name)) for name in weights.names)
    # Both graphs together hold each parameter once; small ones may lie in the .onnx file.
    stored = [math.prod(tensor.dims) for name in GRAPHS for tensor in initializers(exported(precision), name).values()]
    assert sum(stored) == parameters
    data = sum((exported(precision).path / f"{name}.onnx.data").stat().st_size for name in GRAPHS)
    assert 0.99 * parameters * bytes_each < data <= parameters * bytes_each


def test_int8_keeps_every_matrix_in_8_bits(exported):
    eight_bit = {TensorProto.INT8, TensorProto.UINT8}
    for name in GRAPHS:
        model = onnx.load(exported("int8").path / f"{name}.onnx", load_external_data=False)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type in ("MatMulNBits", "DynamicQuantizeMatMul")]
        assert all(stored[node.input[1]].data_type in eight_bit for node in products)
        floats = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in stored]
        assert floats == []
    # 2 layers of q, k, v, out, cross q, cross out, fc1, fc2, and the head
    assert len(products) == 2 * 8 + 1
    (head,) = (node for node in products if node.input[1].startswith(HEAD))
    (lookup,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    table = next(node for node in model.graph.node if lookup.input[0] in node.output)
    assert table.input[0] == head.input[1]


def test_fp16_is_float_outside_and_half_inside(exported):
    dtypes = {spec.name: spec.dtype for spec in exported("fp16").manifest.tensors}
    assert {dtypes[name] for name in ("mel", "encoder_states", "logits")} == {"float32"}
    assert {dtype for name, dtype in dtypes.items() if name.startswith(("past", "new", "cross"))} == {"float16"}
    for name in GRAPHS:
        assert {tensor.data_type for tensor in initializers(exported("fp16"), name).values()} == {TensorProto.FLOAT16}


def test_streamed_export_equals_an_ordinary_one(exported, shape_folder, tmp_path):
    checkpoint = Checkpoint.open(shape_folder("mini"))
    ordinary = ordinary_decoder(checkpoint, tmp_path / "decoder.onnx")
    streamed = session(exported("fp32").path / "decoder.onnx")
    rng = np.random.default_rng(0)
    names = [value.name for value in streamed.get_inputs()]
    for past, new in ((0, 4), (4, 1), (20, 1)):
        feeds = {"tokens": rng.integers(0, checkpoint.dims.vocab, (2, new)), "logits_at": np.arange(new)}
        feeds |= {n: rng.normal(size=(past, 2, 1, 64)).astype(np.float32) for n in names if n.startswith("past")}
        feeds |= {n: rng.normal(size=(2, 1, 1500, 64)).astype(np.float32) for n in names if n.startswith("cross")}
        by_position = dict(zip([value.name for value in ordinary.get_inputs()], feeds.values(), strict=True))
        for ours, theirs in zip(streamed.run(None, feeds), ordinary.run(None, by_position), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def ordinary_decoder(checkpoint: Checkpoint, path: Path) -> ort.InferenceSession:
    """The usual way: weights in memory, torch's own optimiser."""
    decoder = graph.Decoder(checkpoint.dims)
    graph.load_weights(decoder, "model.decoder.", checkpoint.state_dict())
    bounds = (("batch", 1), ("past", 0), ("new", 1), ("wanted", 1))
    batch, past, new, wanted = (torch.export.Dim(name, min=low, max=400) for name, low in bounds)
    # Tensors of their own: the exporter takes one that comes twice for one input.
    rows, cross = ([torch.zeros(shape) for _ in range(4)] for shape in ((5, 2, 1, 64), (2, 1, 1500, 64)))
    torch.onnx.export(
        graph.DynamicStep(decoder, [(1, 0)]).eval(),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), rows, cross),
        str(path),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch, 1: new}, {0: wanted}, [{0: past, 1: batch}] * 4, [{0: batch}] * 4),
    )
    return session(path)


def test_a_sharded_float16_checkpoint_gives_the_same_files(exported, shape_folder, export_here, tmp_path):
    for file in shape_folder("mini").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = WhisperForConditionalGeneration.from_pretrained(shape_folder("mini"), dtype=torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="3MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    sharded, whole = export_here(tmp_path, "onnx", "fp16"), exported("fp16")
    for name in GRAPHS:
        for file in (f"{name}.onnx", f"{name}.onnx.data"):
            assert (sharded.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_a_shape_is_traced_once(exported, shape_folder, export_here, tmp_path, monkeypatch):
    traced = exported("fp32")

    def trace(*_):
        raise AssertionError

    monkeypatch.setattr("exporters.onnx._trace", trace)
    other = shapes.write(shapes.SHAPES["mini"], tmp_path / "other", seed=1)
    again = export_here(other, "onnx", "fp32")
    assert again.manifest.files != traced.manifest.files
    assert (again.path / "decoder.onnx").read_bytes() == (traced.path / "decoder.onnx").read_bytes()
    export_here(other, "onnx", "int8")
    with pytest.raises(AssertionError):
        export_here(shape_folder("mini.en"), "onnx", "fp32")


def unpacked(tensor: onnx.TensorProto, scales: onnx.TensorProto) -> np.ndarray:
    """What MatMulNBits' documentation says that 4-bit blocks mean: the low half of a byte first, 8 is zero."""
    stored = onnx.numpy_helper.to_array(tensor)
    codes = np.stack([stored & 15, stored >> 4], -1).reshape(*stored.shape[:2], -1).astype(np.float32) - 8
    values = codes * onnx.numpy_helper.to_array(scales).astype(np.float32)[..., None]
    return values.reshape(len(stored), -1)


def test_int4_keeps_every_matrix_in_4_bits_within_half_a_step(exported, shape_folder):
    weights = Checkpoint.open(shape_folder("mini")).weights
    for name in GRAPHS:
        stored = initializers(exported("int4"), name)
        model = onnx.load(exported("int4").path / f"{name}.onnx", load_external_data=False)
        products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        for node in products:
            weight = node.input[1].removesuffix(".uint4")
            dense, ours = weights.read(f"model.{weight}").numpy(), unpacked(stored[node.input[1]], stored[f"{weight}.scales"])
            steps = np.abs(dense).reshape(len(dense), -1, 32).max(2).repeat(32, 1) / 7
            assert (np.abs(ours - dense) <= 0.501 * steps + 1e-6).all(), weight
        assert [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in stored] == []
        wide = [tensor.name for tensor in stored.values() if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1]
        assert wide == []
    assert len(products) == 2 * 8 + 1  # as in int8
    (lookup,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    table = next(node for node in model.graph.node if lookup.input[0] in node.output)
    assert table.input[0].startswith(HEAD)


@pytest.fixture(scope="module")
def recorded(shape_folder, tmp_path_factory) -> Checkpoint:
    """A checkpoint with codes of 4 bits in groups of 32, of 8 bits a row, and of 3 bits a row of factors of odd rank."""
    from compressors import base, folder
    from compressors.model import Model

    source = Checkpoint.open(shape_folder("mini"))
    model = Model.open(source)
    for method, given in (
        ("lowrank", {"criterion": "svd", "rank": 21, "only": ["*.layers.1.fc?.weight"]}),
        ("quantise", {"bits": 4, "group": 32, "rounding": "nearest", "embedding": True, "only": ["*.layers.0.*"]}),
        ("quantise", {"bits": 8, "rounding": "nearest", "only": ["*.layers.1.*attn*"]}),
        ("quantise", {"bits": 3, "rounding": "nearest", "only": ["*.layers.1.fc?.weight"]}),
    ):
        model = base.method(method).apply(model, base.parameters(method, given), None, lambda stage: None).model
    return folder.write(tmp_path_factory.mktemp("recorded") / "mini", source, model, [], [], None)[0]


@pytest.fixture(scope="module")
def shipped(recorded, export_here) -> Artifact:
    return export_here(recorded.path, "onnx", "int4")


def test_int4_ships_the_very_integers_of_the_record(recorded, shipped):
    assert shipped.manifest.notices == []
    seen = set()
    for name in GRAPHS:
        stored = initializers(shipped, name)
        for tensor in [one for one in stored if one.endswith(".uint4")]:
            weight = tensor.removesuffix(".uint4")
            codes = recorded.graph_weights.integers(f"model.{weight}")
            ours = unpacked(stored[tensor], stored[f"{weight}.scales"])
            meant = (codes.codes * codes.scales.repeat_interleave(codes.codes.shape[1] // codes.scales.shape[1], 1)).numpy()
            np.testing.assert_array_equal(ours[:, : meant.shape[1]], meant)
            assert not ours[:, meant.shape[1] :].any()
            seen.add(codes.bits)
        for tensor in [one for one in stored if one.endswith(("int8", "uint8"))]:
            codes = recorded.graph_weights.integers(f"model.{tensor.removesuffix('.T_int8').removesuffix('.uint8')}")
            ours = onnx.numpy_helper.to_array(stored[tensor])
            back = ours.T if tensor.endswith(".T_int8") else ours.reshape(codes.codes.shape).astype(int) - 128
            np.testing.assert_array_equal(back, codes.codes.numpy())
            seen.add(codes.bits)
    assert seen == {3, 4, 8}


def test_int4_says_what_plain_transformers_says_of_the_same_weights(recorded, shipped):
    theirs = WhisperForConditionalGeneration.from_pretrained(recorded.path).eval()
    opened = runner.open(shipped.path, 1)
    mel = np.random.default_rng(0).normal(size=(1, 80, 3000)).astype(np.float32)
    tokens = [50258, 50259, 50359, 50363, 300, 301]
    with torch.inference_mode():
        found = theirs(torch.from_numpy(mel), decoder_input_ids=torch.tensor([tokens]))
    # Half-precision positions and convolutions, and products with activations of 8 bits.
    states = found.encoder_last_hidden_state.numpy()
    assert np.abs(opened.encoder_states(mel) - states).max() < 0.03 * np.abs(states).max()
    logits = opened.step(np.array([tokens]), opened.encode(mel))
    assert np.abs(logits - found.logits.numpy()).max() < 0.05 * np.abs(found.logits.numpy()).max()


@pytest.fixture(scope="module")
def ranged(shape_folder, tmp_path_factory) -> Checkpoint:
    """A checkpoint with 8-bit weights and the ranges of its activations on one noise."""
    from compressors import folder, integers, ranges
    from compressors.model import Form, Model

    source = Checkpoint.open(shape_folder("mini"))
    model = Model.open(source)
    heard = extremes(source.path)
    tensors, forms = {}, {}
    for name, (low, high) in heard.items():
        made = integers.nearest(model.tensors[name], 8, None)
        tensors[name] = made.weight
        forms[name] = Form({"codes": made.codes, "scales": made.scales, **ranges.parts(low, high)}, 8)
    changed = model.changed(tensors, forms)
    return folder.write(tmp_path_factory.mktemp("ranged") / "mini", source, changed, [], [], None)[0]


NOISE = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))


def extremes(path: Path) -> dict[str, tuple[float, float]]:
    """The lowest and highest input of every linear layer of plain transformers."""
    heard: dict[str, tuple[float, float]] = {}

    def hear(name: str):
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            heard[name] = (min(0.0, float(inputs[0].min())), max(0.0, float(inputs[0].max())))

        return hook

    run_hooked(path, hear)
    return heard


def run_hooked(path: Path, hook) -> np.ndarray:
    model = WhisperForConditionalGeneration.from_pretrained(path).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "proj_out":
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.inference_mode():
        found = model(NOISE, decoder_input_ids=torch.tensor([[50258]]))
    return found.encoder_last_hidden_state.numpy()


def test_static_activations_are_rounded_to_their_ranges(ranged, export_here):
    """Against plain transformers whose linear layers hear rounded inputs."""

    def rounded(name: str):
        scale, zero = ranged.graph_weights.inputs(name)

        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            return ((inputs[0] / scale).round() + zero).clamp(0, 255).sub(zero) * scale

        return hook

    artifact = export_here(ranged.path, "onnx", "int8-static")
    graph_ = onnx.load(artifact.path / "encoder.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph_.node]
    # 2 layers of q, k, v, out, fc1, fc2, and the keys and values of 2 decoder layers; one rounding for all who hear the same
    assert (kinds.count("MatMulIntegerToFloat"), kinds.count("QuantizeLinear")) == (2 * 6 + 4, 2 * 4 + 1)
    assert not {"DynamicQuantizeMatMul", "MatMulNBits"} & set(kinds)
    theirs, whole = run_hooked(ranged.path, rounded), run_hooked(ranged.path, lambda name: lambda *_: None)
    ours = runner.open(artifact.path, 1).encoder_states(NOISE.numpy())
    # An input between two steps may fall on the other one: a rest of what rounding does.
    assert np.linalg.norm(ours - theirs) < 0.2 * np.linalg.norm(theirs - whole)


def test_static_activations_need_ranges(shape_folder, tmp_path):
    with pytest.raises(ExportError, match=r"none of model\.decoder\.layers\.0\.encoder_attn\.k_proj\.weight \(16 layers\)"):
        exporter.export(Checkpoint.open(shape_folder("mini")), tmp_path, "int8-static", lambda stage: None)


@pytest.mark.parametrize("block", [16, 64])
def test_quantised_weights_are_within_half_a_step(block):
    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    made = nearest_int8(weight, groups=64 // block)
    restored = (made.codes * made.scales.repeat_interleave(block, 1)).numpy()
    assert np.abs(restored - weight.numpy()).max() <= 0.5001 * made.scales.max()
    assert made.codes.abs().max() == 127
    assert not restored[3].any()


def test_an_artifact_of_an_earlier_version_is_refused_by_name(exported, tmp_path):
    folder = shutil.copytree(exported("fp32").path, tmp_path / "onnx-fp32")
    manifest = json.loads((folder / "asr-export.json").read_text())
    manifest["tensors"] = [tensor for tensor in manifest["tensors"] if tensor["name"] != "logits_at"]
    (folder / "asr-export.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"onnx-fp32 was made by an earlier version.*Export again"):
        runner.open(folder, 1)


def test_logits_of_wanted_tokens_are_those_of_all(exported):
    opened = runner.open(exported("fp32").path, 1)
    mel = np.random.default_rng(0).normal(size=(2, 80, 3000)).astype(np.float32)
    tokens = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    every = opened.step(tokens, opened.encode(mel))
    np.testing.assert_allclose(opened.step_at(tokens, opened.encode(mel), [0, 3]), every[:, [0, 3]], atol=1e-5)


def test_reordered_state_decodes_as_its_rows(exported):
    opened = runner.open(exported("fp32").path, 1)
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(3, 80, 3000)).astype(np.float32)
    prompt, token = np.array([[5, 6, 7]] * 3), np.array([[8], [9], [10]])
    state = opened.encode(mel)
    opened.step(prompt, state)
    rows = np.array([2, 0])
    picked = opened.step(token[rows], opened.reorder(state, rows))
    np.testing.assert_allclose(picked, opened.step(token, state)[rows], atol=1e-5)
