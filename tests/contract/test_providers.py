"""ONNX on another processor: the runner over bound buffers, here in the host's memory, and what is said without a GPU."""

import json

import numpy as np
import onnxruntime as ort
import pytest

import reference
from asr_core.artifact import Artifact
from asr_core.decode import DecodeOptions
from asr_core.errors import UnavailableError, UsageError
from runners import onnx as plain
from runners._device_onnx import CPU, DeviceRunner
from runners.base import open_runner
from tests.support import run_command

NO_GPU = "CUDAExecutionProvider" not in ort.get_available_providers()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def pair(request, talkative, export_here) -> tuple[plain.OnnxRunner, DeviceRunner]:
    artifact: Artifact = export_here(talkative, "onnx", request.param)
    return plain.open(artifact.path, 1), DeviceRunner(artifact, 1, "cpu", [CPU], [CPU])


@pytest.mark.parametrize(
    "options",
    [DecodeOptions(), DecodeOptions(beam_size=3), DecodeOptions(None, temperatures=(0.0, 0.6), best_of=2, logprob_threshold=0.0)],
)
def test_bound_buffers_say_what_arrays_say(pair, options):
    """Greedy, beams that change rows, windows that are tried again: caches are written, gathered and begun anew in place."""
    mel = np.random.default_rng(0).normal(size=(3, 80, 3000)).astype(np.float32)
    ours, bound = ([(said.tokens, said.sum_logprob) for said in one.generate(mel, options)] for one in pair)
    assert ours == bound
    assert any(tokens for tokens, _ in ours)


def test_scores_and_attention(pair):
    mel = np.random.default_rng(1).normal(size=(1, 80, 3000)).astype(np.float32)
    tokens = [*pair[0].tokens.prompt(), 300, 301, 302]
    for ask in (lambda one: one.score(mel, tokens), lambda one: one.encoder_states(mel)):
        np.testing.assert_array_equal(ask(pair[0]), ask(pair[1]))
    ours, bound = (one.cross_attention(np.array([tokens]), one.encode(mel)) for one in pair)
    for mine, theirs in zip(ours, bound, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.skipif(not NO_GPU, reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_no_gpu_is_unavailable(artifacts, provider):
    path = artifacts / "reference" / "onnx-fp32"
    with pytest.raises(UnavailableError, match="put onnxruntime-gpu in its place"):
        open_runner("onnx", path, 1, provider)
    clip = reference.manifest_path().parent / json.loads(reference.manifest_path().read_text().splitlines()[0])["audio_filepath"]
    done = run_command("asr-transcribe", clip, "--artifact", path, "--provider", provider)
    assert done.returncode == 5
    assert "put onnxruntime-gpu in its place" in done.stderr


def test_other_targets_and_names_are_refused(artifacts):
    with pytest.raises(UsageError, match="openvino does not run on 'cuda'; it runs on: the CPU"):
        open_runner("openvino", artifacts / "reference" / "openvino-fp32", 1, "cuda")
    with pytest.raises(UsageError, match="onnx does not run on 'rocm'; it runs on: the CPU, cuda, tensorrt"):
        open_runner("onnx", artifacts / "reference" / "onnx-fp32", 1, "rocm")


@pytest.mark.skipif(not NO_GPU, reason="this ONNX Runtime has CUDA")
def test_the_benchmark_says_not_measured(copies, tmp_path):
    file, few = tmp_path / "b.json", ("--rounds", 3, "--tokens", 2)
    done = run_command("asr-bench", "--artifacts", copies("onnx-int8"), "--provider", "cuda", *few, "--json", file)
    assert done.returncode == 0, done.stderr
    assert "onnx-int8 cuda: not measured" in done.stdout
    assert "onnx-int8" in json.loads(file.read_text())["samples"]
