"""What the ncnn networks must be: complete, small, float32 in their arithmetic, and right at every step and prompt length."""

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ncnn
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.dims import Dims, expected_shapes
from asr_core.errors import ExportError
from exporters import ncnn as exporter
from runners import ncnn as runners_ncnn
from runners.base import Runner, open_runner

FORCED = 20
GRAPHS = ("encoder", "decoder")
# More than a 32-bit number counts in one matrix.
HUGE = Dims(
    n_mels=128, n_audio_ctx=1500, n_text_ctx=448, d_model=1280, encoder_layers=1, decoder_layers=1, encoder_heads=20,
    decoder_heads=20, encoder_ffn=2_000_000, decoder_ffn=5120, vocab=51866,
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(shape_folder, export_here, trained) -> Callable[..., Artifact]:
    done: dict[tuple[str, str], Artifact] = {}

    def export(precision: str, shape: str = "mini") -> Artifact:
        if (shape, precision) not in done:
            folder = trained.path if shape == "reference" else shape_folder(shape)
            done[shape, precision] = export_here(folder, "ncnn", precision)
        return done[shape, precision]

    return export


def opened(artifact: Artifact) -> runners_ncnn.NcnnRunner:
    return runners_ncnn.open(artifact.path, 1)


def sound(dims: Dims, windows: int = 1) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((windows, dims.n_mels, 2 * dims.n_audio_ctx)).astype(np.float32)


def sentence(runner: Runner, length: int) -> list[int]:
    return [*runner.tokens.prompt(), *np.random.default_rng(1).integers(0, runner.tokens.end, length).tolist()]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest, in units of the largest expected magnitude above 1, as parity measures it."""
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def assert_same(ours: Runner, theirs: Runner, tolerance: float) -> None:
    mel, tokens = sound(ours.dims), sentence(ours, FORCED)
    assert error(ours.encoder_states(mel), theirs.encoder_states(mel)) <= tolerance
    assert error(ours.score(mel, tokens), theirs.score(mel, tokens)) <= tolerance


def test_listing_precisions_imports_no_converter():
    heavy = "sorted({'torch', 'ncnn', 'pnnx'} & set(sys.modules))"
    command = f"import sys; from exporters.ncnn import PRECISIONS; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == "[]"


def test_running_needs_no_torch():
    command = "import sys; import runners.ncnn; print(sorted({'torch', 'transformers', 'pnnx'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == "[]"


# --- the numbers


@pytest.mark.parametrize("shape", ["reference", "tiny", "mini-large-v3"])
def test_forced_steps_are_pytorchs(exported, shape_folder, trained, shape):
    folder = trained.path if shape == "reference" else shape_folder(shape)
    assert_same(opened(exported("fp32", shape)), open_runner("pytorch", folder, 1), 1e-5)


def test_fp16_is_pytorch_in_float32_with_stored_halves(exported, mini):
    """Nothing is rounded but what is stored."""
    weights = load_file(mini / "model.safetensors")
    save_file({name: halves(name, tensor) for name, tensor in weights.items()}, mini / "model.safetensors", {"format": "pt"})
    assert_same(opened(exported("fp16")), open_runner("pytorch", mini, 1), 1e-5)


def halves(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """As pnnx rounds: to the nearest half, ties away from 0, subnormal ones to 0."""
    if stays_full(name):
        return tensor
    nearest = ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(tensor.abs() < 2**-14, 0, nearest)


def stays_full(name: str) -> bool:
    """Norms, positions and the convolutions' biases, which ncnn keeps in float32."""
    return "norm" in name or "embed_positions" in name or ("conv" in name and name.endswith("bias"))


def test_fp16_of_the_trained_checkpoint_is_close(exported, trained):
    assert_same(opened(exported("fp16", "reference")), open_runner("pytorch", trained.path, 1), 5e-3)


def test_a_prompt_of_any_length_is_its_tokens_one_by_one(exported):
    runner = opened(exported("fp32"))
    mel, tokens = sound(runner.dims), np.array([sentence(runner, 40)])
    state = runner.encode(mel)
    single = np.concatenate([runner.step(tokens[:, i : i + 1], state) for i in range(tokens.shape[1])], axis=1)
    for pieces in ([44], [2, 42], [1, 3, 9, 31]):
        state, cuts = runner.encode(mel), np.cumsum(pieces)[:-1]
        logits = np.concatenate([runner.step(piece, state) for piece in np.split(tokens, cuts, axis=1)], axis=1)
        np.testing.assert_allclose(logits, single, atol=1e-5)


def test_the_whole_context_can_be_filled(exported, shape_folder):
    runner, reference = opened(exported("fp32")), open_runner("pytorch", shape_folder("mini"), 1)
    mel, tokens = sound(runner.dims), np.array([sentence(runner, runner.dims.n_text_ctx - 4)])
    ours, theirs = ([one.step(tokens[:, :-2], state), one.step(tokens[:, -2:], state)] for one, state in (
        (runner, runner.encode(mel)), (reference, reference.encode(mel)),
    ))  # fmt: skip
    assert error(np.concatenate(ours, axis=1), np.concatenate(theirs, axis=1)) <= 1e-5


def test_windows_take_turns_without_touching_each_other(exported):
    runner = opened(exported("fp32"))
    mels, tokens = sound(runner.dims, 2), np.array([sentence(runner, 6)])
    alone = [runner.score(mel[None], tokens[0].tolist()) for mel in mels]
    states = [runner.encode(mel[None]) for mel in mels]
    turns = [[runner.step(piece, state)[0] for state in states] for piece in np.split(tokens, range(4, 10), axis=1)]
    for own, steps in zip(alone, zip(*turns, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(steps), own)


def test_a_repeated_row_goes_its_own_way(exported):
    """Repeated rows share their tensors, the state that they were taken from included."""
    runner = opened(exported("fp32"))
    mels, prompt = sound(runner.dims, 2), np.array([runner.tokens.prompt()] * 2)
    state = runner.encode(mels)
    runner.step(prompt, state)
    chosen = runner.reorder(state, np.array([1, 1, 0]))
    for tokens in ([[300], [301], [302]], [[303], [304], [305]]):
        logits = runner.step(np.array(tokens), chosen)
    for row, mel, tokens in ((0, 1, [300, 303]), (1, 1, [301, 304]), (2, 0, [302, 305])):
        alone = runner.score(mels[mel : mel + 1], [*runner.tokens.prompt(), *tokens])
        np.testing.assert_allclose(logits[row, -1], alone[-1], atol=1e-5)
    assert [row.position for row in state] == [len(runner.tokens.prompt())] * 2


# --- memory


def test_a_tensor_of_an_array_borrows_its_memory_and_ours_does_not():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    borrowed, own = ncnn.Mat(array), runners_ncnn._mat(array)
    array += 1
    assert np.array(borrowed)[0, 0] == 1
    np.testing.assert_array_equal(np.array(own), np.arange(6).reshape(2, 3))


def test_callers_may_overwrite_and_drop_their_arrays(exported):
    runner = opened(exported("fp32"))
    expected = runner.score(sound(runner.dims), sentence(runner, 6))

    def spoiled(call: Callable[[np.ndarray], object], array: np.ndarray) -> object:
        result = call(array)
        array[...] = -1
        del array
        gc.collect()
        return result

    state = spoiled(runner.encode, sound(runner.dims))
    pieces = np.split(np.array([sentence(runner, 6)]), range(4, 10), axis=1)
    steps = [spoiled(lambda tokens: runner.step(tokens, state)[0], piece.copy()) for piece in pieces]
    np.testing.assert_array_equal(np.concatenate(steps), expected)


# --- the files


@pytest.mark.parametrize("precision", exporter.PRECISIONS)
def test_nothing_of_the_conversion_remains(exported, precision):
    bundle = {"generation_config.json", "mel_filters.npy", "preprocessor_config.json", "tokenizer.json"}
    ours = {f"{graph}.{kind}" for graph in GRAPHS for kind in ("param", "bin")} | {exporter.POSITIONS}
    found = {file.relative_to(exported(precision).path).as_posix() for file in exported(precision).path.rglob("*")}
    assert found - bundle == ours | {"asr-export.json"}


def test_weights_are_stored_once(exported):
    """The embedding too: it is the head's matrix."""
    shapes = expected_shapes(exported("fp32").manifest.dims)
    weights = sum(math.prod(shape) for shape in shapes.values())
    full = sum(math.prod(shape) for name, shape in shapes.items() if stays_full(name))
    files = [f"{graph}.bin" for graph in GRAPHS] + [exporter.POSITIONS]
    sizes = {p: sum((exported(p).path / file).stat().st_size for file in files) for p in exporter.PRECISIONS}
    assert 4 * weights <= sizes["fp32"] <= 4 * weights + 2000
    assert 2 * (weights + full) <= sizes["fp16"] <= 2 * (weights + full) + 2000


@pytest.mark.parametrize("graph", GRAPHS)
def test_manifest_lists_what_the_files_declare(exported, graph):
    artifact = exported("fp32")
    network = ncnn.Net()
    assert network.load_param(str(artifact.path / f"{graph}.param")) == 0
    for role, found in (("input", network.input_names()), ("output", network.output_names())):
        specs = [spec.name for spec in artifact.manifest.tensors if (spec.graph, spec.role) == (graph, role)]
        assert sorted(found) == sorted(specs)


def test_opening_and_running_say_nothing(exported, capfd):
    artifact = exported("fp32")
    capfd.readouterr()  # an export in this process may have been heard
    runner = opened(artifact)
    runner.score(sound(runner.dims), sentence(runner, 2))
    assert capfd.readouterr() == ("", "")


# --- what is refused


class Linear(nn.Module):
    """``then`` after a linear layer; the second input is only there to be dropped."""

    def __init__(self, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.linear(x))


def convert(module: nn.Module, network: exporter.Network, folder: Path) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    exporter._trace(module.eval().requires_grad_(requires_grad=False), network, scratch / "traced.pt")
    exporter.convert("part", network, scratch / "traced.pt", folder, "fp32")


SMALL = exporter.Network({"x": ["tokens", 8]}, {"y": ["tokens", 8]})


@pytest.mark.parametrize("operator", [torch.erfinv, torch.special.bessel_j0])
def test_an_operator_left_unconverted_is_named_with_its_place(tmp_path, operator):
    """pnnx itself finds nothing wrong, or the message would be about its exit code."""
    with pytest.raises(ExportError, match=rf"left operators of the part .* aten::\w*{operator.__name__} at pnnx_0, .* out0"):
        convert(Linear(operator), SMALL, tmp_path)


def test_pnnxs_last_words_are_in_the_error(tmp_path, capfd):
    traced = tmp_path / "scratch" / "traced.pt"
    traced.parent.mkdir()
    traced.write_bytes(b"no TorchScript")
    with pytest.raises(ExportError, match=r"(?s)pnnx could not convert the part \(exit code -?\d+\); its last words: .+"):
        exporter.convert("part", SMALL, traced, tmp_path, "fp32")
    assert capfd.readouterr() == ("", "")


def test_a_dropped_output_is_named(tmp_path):
    network = exporter.Network(SMALL.inputs, SMALL.outputs | {"z": ["tokens", 8]})
    with pytest.raises(ExportError, match="dropped inputs or outputs of the part: z"):
        convert(Linear(torch.relu), network, tmp_path)


def test_a_shared_matrix_is_still_converted_wrongly(tmp_path):
    """Why the step holds the embedding as its head only; only numbers show it, as every layer is one that ncnn has."""
    found = {}
    for kind in ("shared", "cloned"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
        model[1].weight = model[0].weight if kind == "shared" else nn.Parameter(model[0].weight.detach().clone())
        (tmp_path / kind).mkdir()
        convert(model, SMALL, tmp_path / kind)
        x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
        outputs = runners_ncnn._run(runners_ncnn._network(tmp_path / kind, "part", 1), {"x": runners_ncnn._mat(x)}, ["y"])
        found[kind] = np.array(outputs["y"]).reshape(3, 8) if outputs["y"].total() == x.size else np.zeros_like(x)
        expected = model(torch.from_numpy(x)).detach().numpy()
    assert error(found["cloned"], expected) <= 1e-5
    assert error(found["shared"], expected) > 0.01


@pytest.mark.parametrize("precision", exporter.PRECISIONS)
def test_a_file_that_does_not_end_with_the_head_is_refused(exported, shape_folder, tmp_path, precision):
    embedding = Checkpoint.open(shape_folder("mini")).weights.read("model.decoder.embed_tokens.weight")
    content = (exported(precision).path / "decoder.bin").read_bytes()
    file = tmp_path / "decoder.bin"
    file.write_bytes(content)
    exporter._check_head(file, embedding, precision)
    for wrong in (content + b"\0\0\0\0", content[:4]):
        file.write_bytes(wrong)
        with pytest.raises(ExportError, match=r"decoder\.bin does not end with the head"):
            exporter._check_head(file, embedding, precision)


def test_what_halves_cannot_hold_is_refused_with_every_reason(mini, tmp_path):
    names = [f"model.decoder.layers.{layer}.fc1.weight" for layer in range(2)]
    weights = load_file(mini / "model.safetensors")
    for name in names:
        weights[name][0, 0] = -70000
    save_file(weights, mini / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ExportError, match=rf"(?s){names[0]} holds 70000, .*{names[1]} holds 70000, "):
        exporter.export(Checkpoint.open(mini), out, "fp16", lambda stage: None)
    assert not list(out.iterdir())


def test_a_matrix_that_ncnn_cannot_count_is_refused_with_every_reason(tmp_path):
    shapes = expected_shapes(HUGE)
    weights = SimpleNamespace(names=list(shapes), shape=shapes.__getitem__)
    with pytest.raises(ExportError, match=r"(?s)fc1\.weight has 2560000000 values.*fc2\.weight has 2560000000 values"):
        exporter.export(SimpleNamespace(dims=HUGE, graph_weights=weights), tmp_path, "fp32", lambda stage: None)
