"""What the .tflite files themselves must be: standard, small, with weights shared, and right at every step and prompt length."""

import logging
import math
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from asr_core.artifact import Artifact
from asr_core.dims import Dims, expected_shapes
from asr_core.errors import ExportError
from exporters import tflite
from runners import tflite as runners_tflite
from runners.base import open_runner

FORCED = 20
TENSORFLOW = """
import sys
import numpy as np
import tensorflow as tf
interpreter = tf.lite.Interpreter(sys.argv[1])
inputs = dict(np.load(sys.argv[2]))
encoded = interpreter.get_signature_runner("encode")(mel=inputs.pop("mel"))
states = encoded.pop("encoder_states")
decoded = interpreter.get_signature_runner("decode")(**inputs, **encoded)
np.savez(sys.argv[3], encoder_states=states, logits=decoded["logits"])
"""
LARGE = Dims(
    n_mels=128, n_audio_ctx=1500, n_text_ctx=448, d_model=1280, encoder_layers=32, decoder_layers=32, encoder_heads=20,
    decoder_heads=20, encoder_ffn=5120, decoder_ffn=5120, vocab=51866,
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(shape_folder, export_here) -> Callable[..., Artifact]:
    done: dict[tuple[str, str], Artifact] = {}

    def export(precision: str, shape: str = "mini") -> Artifact:
        if (shape, precision) not in done:
            done[shape, precision] = export_here(shape_folder(shape), "tflite", precision)
        return done[shape, precision]

    return export


def opened(artifact: Artifact) -> runners_tflite.TFLiteRunner:
    return runners_tflite.open(artifact.path, 1)


def sound(dims: Dims, windows: int = 1) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((windows, dims.n_mels, 2 * dims.n_audio_ctx)).astype(np.float32)


def sentence(runner: runners_tflite.TFLiteRunner, length: int) -> list[int]:
    return [*runner.tokens.prompt(), *np.random.default_rng(1).integers(0, runner.tokens.end, length).tolist()]


def test_listing_precisions_imports_no_converter():
    heavy = "sorted({'torch', 'litert_torch', 'ai_edge_litert', 'ai_edge_quantizer'} & set(sys.modules))"
    command = f"import sys; from exporters.tflite import PRECISIONS; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == "[]"


@pytest.mark.parametrize("precision", tflite.PRECISIONS)
def test_tensorflows_own_interpreter_gives_the_same_numbers(exported, precision, tmp_path):
    """The file is standard: a runtime that knows nothing of the converter runs its signatures."""
    artifact = exported(precision)
    ours, mel = opened(artifact), sound(artifact.manifest.dims)
    start = ours.tokens.prompt()[:1]
    past = {spec.name: np.zeros(spec.shape, np.float32) for spec in artifact.manifest.tensors if spec.name.startswith("past_")}
    np.savez(tmp_path / "in.npz", mel=mel, tokens=np.array([start], np.int32), position=np.zeros(1, np.int32), **past)
    # In a process of its own: TensorFlow and torch's compiler do not bear each other.
    command = [sys.executable, "-c", TENSORFLOW, artifact.path / tflite.MODEL, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(command, check=True, capture_output=True)
    theirs = np.load(tmp_path / "out.npz")
    # Its kernels may add up in another order, after which integers round activations.
    tolerance = {"fp32": 1e-5, "fp16": 1e-5, "int8": 0.05, "int4": 0.05}[precision]
    np.testing.assert_allclose(ours.encoder_states(mel), theirs["encoder_states"], atol=tolerance)
    np.testing.assert_allclose(ours.step(np.array([start]), ours.encode(mel)), theirs["logits"], atol=tolerance)


@pytest.mark.parametrize("shape", ["tiny", "mini-large-v3"])
def test_forced_steps_are_pytorchs(exported, shape_folder, shape):
    artifact = exported("fp32", shape)
    ours, reference = opened(artifact), open_runner("pytorch", shape_folder(shape), 1)
    mel, tokens = sound(ours.dims), sentence(ours, FORCED)
    np.testing.assert_allclose(ours.encoder_states(mel), reference.encoder_states(mel), atol=1e-4)
    np.testing.assert_allclose(ours.score(mel, tokens), reference.score(mel, tokens), atol=1e-4)


def test_a_prompt_of_any_length_is_its_tokens_one_by_one(exported):
    """Below, at and beyond the size of a prefill, from the start and after other tokens."""
    runner = opened(exported("fp32"))
    mel, tokens = sound(runner.dims), np.array([sentence(runner, 40)])
    state = runner.encode(mel)
    single = np.concatenate([runner.step(tokens[:, i : i + 1], state) for i in range(tokens.shape[1])], axis=1)
    for pieces in ([44], [2, 42], [8, 16, 20], [1, 3, 9, 31]):
        state, cuts = runner.encode(mel), np.cumsum(pieces)[:-1]
        logits = np.concatenate([runner.step(piece, state) for piece in np.split(tokens, cuts, axis=1)], axis=1)
        np.testing.assert_allclose(logits, single, atol=1e-5)


def test_the_whole_context_can_be_filled(exported):
    """The last prefill's padding lies beyond the last position."""
    runner = opened(exported("fp32"))
    mel, tokens = sound(runner.dims), np.array([sentence(runner, runner.dims.n_text_ctx - 4)])
    state = runner.encode(mel)
    runner.step(tokens[:, :-5], state)
    last = runner.step(tokens[:, -5:], state)
    state = runner.encode(mel)
    runner.step(tokens[:, :-1], state)
    np.testing.assert_allclose(runner.step(tokens[:, -1:], state), last[:, -1:], atol=1e-5)


def test_windows_take_turns_without_touching_each_other(exported):
    runner = opened(exported("fp32"))
    mels, tokens = sound(runner.dims, 2), np.array([sentence(runner, 6)])
    alone = [runner.score(mel[None], tokens[0].tolist()) for mel in mels]
    states = [runner.encode(mel[None]) for mel in mels]
    turns = [[runner.step(piece, state)[0] for state in states] for piece in np.split(tokens, range(4, 10), axis=1)]
    for own, steps in zip(alone, zip(*turns, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(steps), own)


def test_weights_are_stored_once_and_small(exported):
    """The signatures share them, the embedding is the head too, and nothing that is large stays float32 in int8."""
    sizes = {precision: (exported(precision).path / tflite.MODEL).stat().st_size for precision in tflite.PRECISIONS}
    dims = exported("fp32").manifest.dims
    weights = sum(math.prod(shape) for shape in expected_shapes(dims).values())
    graphs = 500_000
    # Both decoder graphs have a scale and a zero point for every row of the embedding: 12 bytes.
    scales = 2 * 12 * dims.vocab
    assert sizes["fp32"] <= 4 * weights + graphs
    assert sizes["fp16"] <= 2 * weights + 2 * graphs
    assert sizes["int8"] <= weights + scales + 2 * graphs


def test_opening_says_nothing(exported, capfd):
    artifact = exported("fp32")
    capfd.readouterr()  # an export in this process may have been heard
    opened(artifact)
    assert capfd.readouterr() == ("", "")


def test_too_large_is_refused_before_converting_with_every_reason(tmp_path):
    with pytest.raises(ExportError, match=r"float32 file .* 6\.17 GB, .* the fp16 file .* 3\.09 GB"):
        tflite.export(SimpleNamespace(dims=LARGE), tmp_path, "fp16", lambda stage: None)
    assert not list(tmp_path.iterdir())


def test_a_converters_warning_is_an_error():
    with pytest.raises(ExportError, match="downcasts"), tflite._heeding_warnings():
        logging.warning("enable_x64=False downcasts 64-bit model I/O")  # noqa: LOG015 - as the converter does


@pytest.mark.parametrize(
    ("code", "name"), [(schema.BuiltinOperator.CUSTOM, "Leftover"), (schema.BuiltinOperator.STABLEHLO_SORT, "STABLEHLO_SORT")]
)
def test_an_operator_left_unconverted_is_named(tmp_path, code, name):
    operator = schema.OperatorCodeT()
    operator.builtinCode = code
    operator.customCode = name
    model = schema.ModelT()
    model.operatorCodes = [operator]
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    file = tmp_path / tflite.MODEL
    file.write_bytes(builder.Output())
    with pytest.raises(ExportError, match=name):
        tflite._check_graphs(file)
