"""Artifacts in the layouts of other clients: their names, their order, and both branches of what they call."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from transformers import WhisperForConditionalGeneration

from asr_core import build, registry
from asr_core.artifact import MANIFEST, Artifact, read_manifest, seal
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import ArtifactError, UsageError
from asr_export import export
from runners import _stages
from runners.base import open_runner
from runners.coreml import NEIGHBOURS

KV = ("key", "value")
FLOAT16 = 65552  # Core ML's number of the type


@pytest.fixture(scope="session")
def laid_out(talkative, export_here) -> Callable[[str], Artifact]:
    """The talkative checkpoint, exported to a ``target.layout`` in its finest precision once a session."""
    done: dict[str, Artifact] = {}

    def export(target: str) -> Artifact:
        if target not in done:
            done[target] = export_here(talkative, target, build.exporter(target).PRECISIONS[0])
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


@pytest.mark.parametrize(("target", "tolerance"), [("onnx.optimum", 2e-4), ("onnx.sherpa", 2e-4), ("coreml.whisperkit", 0.05)])
def test_a_layout_decodes_to_the_tokens_of_the_reference(laid_out, talkative, mel, target, tolerance):
    """To the last bits in float32; in float16 logits between about -10 and 10 are that far off."""
    ours = open_runner(target, laid_out(target).path, 1)
    reference = open_runner("pytorch", talkative, 1)
    options = DecodeOptions(max_new_tokens=40)
    assert [one.tokens for one in ours.generate(mel, options)] == [one.tokens for one in reference.generate(mel, options)]
    prompt = ours.tokens.prompt()
    np.testing.assert_allclose(ours.score(mel[:1], prompt), reference.score(mel[:1], prompt), atol=tolerance)
    first = ours.encode(mel)
    ours.step(np.array([prompt] * 2), first)
    again = ours.step(np.array([prompt]), ours.restart(first, np.array([1])))
    np.testing.assert_allclose(again[0], reference.score(mel[1:], prompt), atol=tolerance)


def test_a_layout_without_stages_of_its_own_still_shows_its_logits(laid_out, mel):
    staged = _stages.open_staged("onnx.optimum", laid_out("onnx.optimum").path, 1)
    assert staged.replay(mel[:1], staged.runner.tokens.prompt())[_stages.LOGITS].shape == (4, 51865)


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


# --- sherpa-onnx


def test_sherpa_graphs_have_the_published_names_and_shapes(laid_out):
    """As in sherpa-onnx' scripts/whisper/export-onnx.py; what it reads by position stands first."""
    folder = laid_out("onnx.sherpa").path
    encoder, decoder = session(folder / "whisper-encoder.onnx"), session(folder / "whisper-decoder.onnx")
    cache, cross = [2, "n_audio", 448, 64], [2, "n_audio", "T_2", 64]
    assert ports(encoder.get_inputs()) == [("mel", ["n_audio", 80, "T"], "tensor(float)")]
    assert ports(encoder.get_outputs())[:2] == [(f"n_layer_cross_{kind}", cross, "tensor(float)") for kind in "kv"]
    assert [(name, shape) for name, shape, _ in ports(decoder.get_inputs())] == [
        ("tokens", ["n_audio", "n_tokens"]),
        *((f"in_n_layer_self_{kind}_cache", cache) for kind in "kv"),
        *((f"n_layer_cross_{kind}", cross) for kind in "kv"),
        ("offset", [1]),
    ]
    assert [(name, shape) for name, shape, _ in ports(decoder.get_outputs())] == [
        ("logits", ["n_audio", "n_tokens", 51865]),
        *((f"out_n_layer_self_{kind}_cache", cache) for kind in "kv"),
    ]


def test_sherpa_metadata_is_openais(laid_out):
    """Token ids against openai-whisper's own tokenizer, by the keys that sherpa-onnx' script writes."""
    from whisper.tokenizer import get_tokenizer

    theirs = get_tokenizer(multilingual=True, num_languages=99)
    metadata = session(laid_out("onnx.sherpa").path / "whisper-encoder.onnx").get_modelmeta().custom_metadata_map
    single = {"sot": theirs.sot, "eot": theirs.eot, "blank_id": theirs.encode(" ")[0], "no_speech": theirs.no_speech,
              "transcribe": theirs.transcribe, "translate": theirs.translate, "sot_prev": theirs.sot_prev,
              "sot_lm": theirs.sot_lm, "no_timestamps": theirs.no_timestamps, "is_multilingual": 1, "n_vocab": 51865,
              "n_mels": 80, "n_audio_ctx": 1500, "n_text_ctx": 448, "n_text_layer": 2, "n_text_state": 64, "n_text_head": 1,
              "n_audio_layer": 2, "n_audio_state": 64, "n_audio_head": 1, "sot_index": 0}  # fmt: skip
    assert {key: int(metadata[key]) for key in single} == single
    listed = {key: [int(one) for one in metadata[key].split(",")] for key in ("sot_sequence", "all_language_tokens")}
    assert listed["sot_sequence"] == list(theirs.sot_sequence)
    codes = metadata["all_language_codes"].split(",")
    assert dict(zip(codes, listed["all_language_tokens"], strict=True)) == dict(
        zip(theirs.all_language_codes, theirs.all_language_tokens, strict=True)
    )
    assert {"model_type", "version", "maintainer", "non_speech_tokens"} <= metadata.keys()


def test_sherpa_tokens_are_bytes(laid_out):
    """The 256 bytes as openai-whisper numbers them; longer pieces are the checkpoint's own (opening compares each)."""
    from whisper.tokenizer import get_encoding

    encoding = get_encoding("multilingual", 99)
    artifact = laid_out("onnx.sherpa")
    lines = (line.split() for line in (artifact.path / "whisper-tokens.txt").read_text().splitlines())
    table = {int(index): base64.b64decode(piece) for piece, index in lines}
    assert {index: table[index] for index in range(256)} == {i: encoding.decode_single_token_bytes(i) for i in range(256)}
    assert table.keys() == set(range(artifact.manifest.tokens.end))


def test_sherpa_without_its_tokens_is_refused(laid_out, tmp_path):
    """The client itself would give empty texts and no error."""
    damaged = shutil.copytree(laid_out("onnx.sherpa").path, tmp_path / "damaged")
    table = damaged / "whisper-tokens.txt"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:400]))
    sealed = read_manifest(damaged).model_copy(update={"files": seal(damaged)})
    (damaged / MANIFEST).write_text(sealed.model_dump_json())
    with pytest.raises(ArtifactError, match=r"whisper-tokens.txt: token 400 is None"):
        open_runner("onnx.sherpa", damaged, 1)


def test_sherpa_takes_audio_of_any_length(laid_out, mel):
    encoder = session(laid_out("onnx.sherpa").path / "whisper-encoder.onnx")
    for frames in (3000, 777, 400):
        keys, _, states = encoder.run(None, {"mel": mel[:1, :, :frames]})
        assert keys.shape[2] == states.shape[1] == (frames + 1) // 2


# --- WhisperKit


def test_whisperkit_packages_have_the_published_names_and_shapes(laid_out):
    """As in whisperkittools' tests and WhisperKit's Models.swift; widths are those of two layers of 64."""
    cache, states, mel, mask = [1, 128, 1, 448], [1, 64, 1, 1500], [1, 80, 1, 3000], [1, 448]
    published = {
        "MelSpectrogram": ({"audio": [480000]}, {"melspectrogram_features": mel}),
        "AudioEncoder": ({"melspectrogram_features": mel}, {"encoder_output_embeds": states}),
        "TextDecoder": (
            {"input_ids": [1], "cache_length": [1], "key_cache": cache, "value_cache": cache, "kv_cache_update_mask": mask,
             "encoder_output_embeds": states, "decoder_key_padding_mask": mask},
            {"logits": [1, 1, 51865], "key_cache_updates": [1, 128, 1, 1], "value_cache_updates": [1, 128, 1, 1],
             "alignment_heads_weights": [1, 1500]},
        ),
    }  # fmt: skip
    ct = registry.import_alone("coremltools", without=NEIGHBOURS)
    for name, sides in published.items():
        description = ct.utils.load_spec(str(laid_out("coreml.whisperkit").path / f"{name}.mlpackage")).description
        for side, ports in zip((description.input, description.output), sides, strict=True):
            assert {port.name: list(port.type.multiArrayType.shape) for port in side} == ports
    halves = {port.name for port in description.output if port.type.multiArrayType.dataType == FLOAT16}
    assert halves == published["TextDecoder"][1].keys()


def test_whisperkit_alignment_weights_are_the_mean_of_the_heads(laid_out, talkative, mel):
    """Against transformers' own cross-attention of the checkpoint's alignment heads."""
    model = WhisperForConditionalGeneration.from_pretrained(talkative, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(torch.from_numpy(mel[:1]), decoder_input_ids=torch.tensor([[7]]), output_attentions=True)
    heads = Checkpoint.open(talkative).alignment_heads
    expected = np.mean([out.cross_attentions[layer][0, head, 0].numpy() for layer, head in heads], 0)
    runner = open_runner("coreml.whisperkit", laid_out("coreml.whisperkit").path, 1)
    seen = {}
    predict = runner._decoder.predict
    runner._decoder.predict = lambda inputs: seen.update(predict(inputs)) or seen
    runner.step(np.array([[7]]), runner.encode(mel[:1]))
    np.testing.assert_allclose(np.asarray(seen["alignment_heads_weights"])[0], expected, atol=1e-3 * expected.max() + 1e-5)


# --- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--target", "onnx", "--layout", "ggml"),
            "onnx has no layout 'ggml'; it has these beside its own: linked, optimum, sherpa.",
        ),
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
