"""Artifacts in the layouts of other clients: their names, their order, and both branches of what they call."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from transformers import WhisperForConditionalGeneration

from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import UsageError
from asr_export import export
from runners.base import open_runner

KV = ("key", "value")


@pytest.fixture(scope="session")
def laid_out(talkative, export_here) -> Callable[[str], Artifact]:
    """The talkative checkpoint in float32, exported to a ``target.layout`` once a session."""
    done: dict[str, Artifact] = {}

    def export(target: str) -> Artifact:
        if target not in done:
            done[target] = export_here(talkative, target, "fp32")
        return done[target]

    return export


@pytest.fixture(scope="session")
def mel(talkative) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, Checkpoint.open(talkative).dims.n_mels, 3000)).astype(np.float32)


@pytest.fixture(scope="session")
def model(talkative) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(talkative, dtype=torch.float32).eval()


def session(model: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])


def ports(values) -> list[tuple[str, list, str]]:
    return [(value.name, value.shape, value.type) for value in values]


@pytest.mark.parametrize("target", ["onnx.optimum"])
def test_a_layout_decodes_to_the_tokens_of_the_reference(laid_out, talkative, mel, target):
    ours = open_runner(target, laid_out(target).path, 1)
    reference = open_runner("pytorch", talkative, 1)
    options = DecodeOptions(max_new_tokens=40)
    assert [one.tokens for one in ours.generate(mel, options)] == [one.tokens for one in reference.generate(mel, options)]
    prompt = ours.tokens.prompt()
    np.testing.assert_allclose(ours.score(mel[:1], prompt), reference.score(mel[:1], prompt), atol=2e-4)


# --- Optimum and transformers.js


def test_optimum_graphs_have_the_published_names_in_their_order(laid_out):
    """As optimum's exporter writes them for Whisper; the clients zip the caches by position."""
    folder = laid_out("onnx.optimum").path / "onnx"
    assert sorted(file.name for file in folder.iterdir()) == [
        "decoder_model_merged.onnx", "decoder_model_merged.onnx_data", "encoder_model.onnx", "encoder_model.onnx_data"
    ]  # fmt: skip
    encoder, decoder = session(folder / "encoder_model.onnx"), session(folder / "decoder_model_merged.onnx")
    assert ports(encoder.get_inputs()) == [("input_features", ["batch_size", 80, 3000], "tensor(float)")]
    assert [value.name for value in encoder.get_outputs()] == ["last_hidden_state"]
    layers = [[f"{i}.decoder.{kind}" for kind in KV] + [f"{i}.encoder.{kind}" for kind in KV] for i in range(2)]
    caches = [name for layer in layers for name in layer]
    inputs = {value.name: value for value in decoder.get_inputs()}
    past = [f"past_key_values.{name}" for name in caches]
    assert list(inputs) == ["input_ids", "encoder_hidden_states", *past, "use_cache_branch"]
    assert [value.name for value in decoder.get_outputs()] == ["logits", *(f"present.{name}" for name in caches)]
    # transformers.js makes an empty cache of what it reads here: of this batch, and of length 0 where a name stands.
    for name in past:
        batch, heads, rows, width = inputs[name].shape
        assert (batch, heads, width) == ("batch_size", 1, 64)
        assert isinstance(rows, str)
    assert (inputs["use_cache_branch"].type, inputs["use_cache_branch"].shape) == ("tensor(bool)", [1])


def test_optimum_body_exists_once(laid_out):
    merged = onnx.load(laid_out("onnx.optimum").path / "onnx" / "decoder_model_merged.onnx", load_external_data=False)
    onnx.checker.check_model(str(laid_out("onnx.optimum").path / "onnx" / "decoder_model_merged.onnx"), full_check=True)
    (choice,) = (node for node in merged.graph.node if node.op_type == "If")
    branches = {attribute.name: attribute.g for attribute in choice.attribute}
    assert {node.op_type for node in branches["then_branch"].node} == {"Identity"}
    assert sum(node.op_type == "MatMul" for node in branches["else_branch"].node) == 2 * len(KV)
    assert not any(branch.initializer for branch in branches.values())


def test_both_branches_of_the_merged_decoder_equal_pytorch(laid_out, model, mel):
    decoder = session(laid_out("onnx.optimum").path / "onnx" / "decoder_model_merged.onnx")
    names = [value.name for value in decoder.get_inputs() if value.name.startswith("past")]
    tokens = np.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    with torch.no_grad():
        states = model.model.encoder(torch.from_numpy(mel)).last_hidden_state
        whole = model(encoder_outputs=(states,), decoder_input_ids=torch.from_numpy(tokens)).logits.numpy()
    # Older clients pass a past of one row in the first pass; the branch must not look at it.
    feeds = {name: np.full((2, 1, 1, 64), 1e6, np.float32) for name in names}
    feeds |= {"encoder_hidden_states": states.numpy(), "use_cache_branch": np.array([False])}
    first, *caches = decoder.run(None, {"input_ids": tokens[:, :3], **feeds})
    np.testing.assert_allclose(first, whole[:, :3], atol=2e-4)
    assert [cache.shape[2] for cache in caches] == [3, 3, 1500, 1500] * 2
    # The other branch must not project again: no states are worth looking at.
    feeds = dict(zip(names, caches, strict=True)) | {"encoder_hidden_states": np.full_like(states, np.nan)}
    later, *grown = decoder.run(None, {"input_ids": tokens[:, 3:], "use_cache_branch": np.array([True]), **feeds})
    np.testing.assert_allclose(later, whole[:, 3:], atol=2e-4)
    for old, new in zip(caches, grown, strict=True):
        np.testing.assert_array_equal(new[:, :, : old.shape[2]], old)


def test_optimum_configuration_tells_clients_where_the_weights_are(laid_out):
    folder = laid_out("onnx.optimum").path
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] is True
    assert {"generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} <= {
        file.name for file in folder.iterdir()
    }


# --- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "onnx", "--layout", "ggml"), "onnx has no layout 'ggml'; it has these beside its own: optimum, sherpa."),
        (("--target", "ncnn", "--layout", "optimum"), "ncnn has no layout 'optimum'; it has only its own."),
        (("--target", "all", "--layout", "ggml"), "coreml has no layout 'ggml'; it has these beside its own: whisperkit."),
        (("--target", "onnx", "--layout", "sherpa", "--precision", "fp16"), "onnx.sherpa has no precision 'fp16'"),
    ],
)
def test_a_layout_that_does_not_exist_lists_those_that_do(arguments, message):
    done = CliRunner().invoke(export.main, arguments)
    assert done.exit_code == UsageError.exit_code
    assert message in done.stderr


def test_all_targets_of_a_layout_are_those_that_have_it():
    assert {target for target, _ in export.plan("all", "fp32", "optimum")} == {"onnx.optimum"}
