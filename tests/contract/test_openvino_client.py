"""openvino_genai, a client that knows nothing of this project, loads the artifact as it is and says the same."""

from pathlib import Path

import openvino_genai
import pytest

import reference
from asr_core import artifact, audio, build, tokens
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from runners.base import Runner, open_runner

CLIPS = ("short-00", "short-01", "short-02", "sentence-00", "sentence-05", "sentence-10", "sentence-15", "sentence-20",
         "paused-00", "paused-05")  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    final = tmp_path_factory.mktemp("client") / "openvino-fp32"
    return build.stage(Checkpoint.open("reference"), "openvino", "fp32", final).publish().path


@pytest.fixture(scope="session")
def client(folder: Path) -> openvino_genai.WhisperPipeline:
    return openvino_genai.WhisperPipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")


@pytest.fixture(scope="session")
def runner(folder: Path) -> Runner:
    return open_runner("openvino", folder, threads=1)


@pytest.mark.parametrize("clip", CLIPS)
def test_client_and_runner_say_the_same(clip: str, folder: Path, client: openvino_genai.WhisperPipeline, runner: Runner) -> None:
    samples = audio.load_audio(reference.manifest_path().with_name(f"{clip}.flac"))
    mel = audio.log_mel(samples, audio.mel_filters(runner.dims.n_mels))[None]
    ours = runner.generate(mel, DecodeOptions(language="en"))[0]
    theirs = client.generate(samples.tolist(), language="<|en|>", task="transcribe")
    assert theirs.texts[0].strip() == tokens.text_of(tokens.load_tokenizer(folder), ours.tokens)


def test_manifest_names_the_tensors_of_the_layout(folder: Path) -> None:
    names = [tensor.name for tensor in artifact.read_manifest(folder).tensors]
    assert names == [
        "input_features", "last_hidden_state", "input_ids", "encoder_hidden_states", "beam_idx", "logits",
        "alignment_queries"
    ]  # fmt: skip
