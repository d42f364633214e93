"""Planted faults are named at their true stage on every target; healthy artifacts give no alarm."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from asr_core import artifact
from asr_core.artifact import MANIFEST
from asr_export.localise import localise as command
from parity.localise import BOUNDS, Localiser, replay_here
from tests.faults import CLIPS, FAULTS, HEALTHY, TARGETS, named_stage, planted

CLIP = CLIPS / "sentence-00.flac"
QUANTISED = ("onnx-int8", "openvino-int8", "tflite-int8", "coreml-palette6", "coreml-palette4-stateful", "ctranslate2-int8")
HALVES = ("onnx-fp16", "coreml-fp16", "coreml-fp16-stateful", "tflite-fp16", "ncnn-fp16")


@pytest.fixture(scope="module")
def root(artifacts, tmp_path_factory) -> Path:
    """Where planted artifacts are kept; the healthy ones are those of the whole suite."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / HEALTHY).symlink_to(artifacts / "reference", target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def localiser(trained) -> Localiser:
    return Localiser(trained)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_planted_fault_is_named_at_its_stage(target, fault, root, localiser):
    folder = planted(fault, target, "fp32", root)
    assert named_stage(fault, folder, CLIP, localiser) == FAULTS[fault].expected(target)


@pytest.mark.parametrize("name", [f"{target}-fp32" for target in TARGETS] + [*HALVES, *QUANTISED])
def test_a_healthy_artifact_gives_no_alarm(name, artifacts, localiser):
    precision = name.partition("-")[2].removesuffix("-stateful")
    for clip in ("sentence-00", "paused-03", "noise"):
        found = localiser.localise(artifacts / "reference" / name, CLIPS / f"{clip}.flac", replay=replay_here)
        assert found.culprit is None, found
        # No stage comes near its bound, so another machine's kernels will not make it one.
        assert max(s.own or 0 for s in found.stages if s.name not in ("mel", "mel.client")) < 0.7 * BOUNDS[precision]


@pytest.mark.parametrize("target", ["onnx", "ctranslate2"])
def test_eight_bits_do_not_hide_a_fault(target, root, localiser):
    for fault in ("scaled conv weight", "swapped K/V"):
        folder = planted(fault, target, "int8", root)
        assert named_stage(fault, folder, CLIP, localiser) == FAULTS[fault].expected(target)


def test_a_norm_that_is_cut_out_of_the_graph_is_named(artifacts, tmp_path, localiser):
    import onnx

    folder = shutil.copytree(artifacts / "reference" / "onnx-fp32", tmp_path / "onnx-fp32")
    model = onnx.load(folder / "encoder.onnx", load_external_data=False)
    norm = [node for node in model.graph.node if node.op_type == "LayerNormalization"][2]
    for node in model.graph.node:
        node.input[:] = [norm.input[0] if name == norm.output[0] else name for name in node.input]
    model.graph.node.remove(norm)
    onnx.save(model, folder / "encoder.onnx")
    reseal(folder)
    assert named_stage("", folder, CLIP, localiser) == "encoder.1.attention"


def reseal(folder: Path) -> None:
    manifest = artifact.read_manifest(folder).model_copy(update={"files": artifact.seal(folder)})
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def test_the_command_prints_a_table_draws_and_exits_by_what_it_finds(artifacts, tmp_path):
    healthy = artifacts / "reference" / "onnx-fp32"
    picture = tmp_path / "stages.png"
    done = CliRunner().invoke(command, [str(healthy), "--clip", str(CLIP), "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    assert "Every stage is in bounds." in done.output
    assert "encoder layer 2, feed-forward" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")

    spoiled = shutil.copytree(healthy, tmp_path / "onnx-fp32")
    FAULTS["wrong suppression list"].spoil_artifact(spoiled)
    picture = tmp_path / "stages.svg"
    done = CliRunner().invoke(command, [str(spoiled), "--clip", str(CLIP), "--picture", str(picture)])
    assert done.exit_code == 1
    assert "first stage out of bounds: token choice" in " ".join(done.output.split())
    assert "generation_config.json differs from the checkpoint's suppression lists in 4 tokens" in " ".join(done.output.split())
    assert "first out of bounds: token choice" in picture.read_text()


def test_what_a_runtime_does_not_show_is_said(artifacts):
    done = CliRunner().invoke(command, [str(artifacts / "reference" / "ctranslate2-fp32"), "--clip", str(CLIP)])
    assert done.exit_code == 0, done.output
    assert "CTranslate2 shows the encoder's states, the logits and the tokens" in " ".join(done.output.split())
    assert done.output.count("not shown") > 10


def test_a_preprocessor_config_that_misleads_clients_is_named(artifacts, tmp_path, localiser):
    folder = shutil.copytree(artifacts / "reference" / "ctranslate2-fp32", tmp_path / "ctranslate2-fp32")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"feature_size": 128}))
    reseal(folder)
    assert named_stage("", folder, CLIP, localiser) == "mel.client"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere", "--clip", str(CLIP)], 6, "is not an artifact folder"),
        (["{artifact}", "--clip", "nothing.flac"], 8, "no such file"),
        (["{artifact}", "--clip", str(CLIP), "--language", "xx"], 2, "unknown language"),
        (["{artifact}", "--clip", str(CLIP), "--picture", "stages.bmp"], 2, "a picture's name ends with"),
        (["{artifact}", "--clip", str(CLIP), "--model", "{other}"], 2, "is a model of other sizes"),
    ],
)
def test_mistakes_end_with_a_sentence(arguments, code, sentence, artifacts, shape_folder):
    names = {"artifact": artifacts / "reference" / "onnx-fp32", "other": shape_folder("mini")}
    done = CliRunner().invoke(command, [argument.format(**names) for argument in arguments])
    assert (done.exit_code, sentence in done.output) == (code, True), done.output
