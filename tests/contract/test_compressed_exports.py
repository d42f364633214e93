"""A compressed checkpoint in every target: factored, narrower and shallower on one side, and the same model everywhere."""

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from asr_core import build, registry
from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from compressors import base, folder
from compressors.model import Model
from runners.base import open_runner

STEPS = (
    ("layers", {"decoder": [1]}),
    ("ffn", {"share": 0.5, "criterion": "magnitude", "refit": False, "side": "encoder"}),
    ("lowrank", {"criterion": "svd", "rank": 24}),
)
FACTORED = "model.encoder.layers.0.fc1"


@pytest.fixture(scope="module")
def small(talkative, tmp_path_factory) -> Checkpoint:
    source = Checkpoint.open(talkative)
    model = Model.open(source)
    for method, given in STEPS:
        model = base.method(method).apply(model, base.parameters(method, given), None, lambda stage: None).model
    return folder.write(tmp_path_factory.mktemp("small") / "small", source, model, [], [], None)[0]


@pytest.fixture(scope="module")
def mel() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 80, 3000)).astype(np.float32)


@pytest.fixture(scope="module")
def states(small, mel) -> np.ndarray:
    """Plain transformers' encoder states of the merged weights, of which every tensor must have loaded."""
    model, loading = WhisperForConditionalGeneration.from_pretrained(small.path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.inference_mode():
        found: np.ndarray = model.eval().model.encoder(torch.from_numpy(mel)).last_hidden_state.numpy()
    return found


@pytest.mark.parametrize("target", registry.names("exporters"))
def test_a_smaller_checkpoint_is_the_same_model_in_every_target(small, mel, states, export_here, target):
    artifact = export_here(small.path, target, "fp32")
    factored = "factors" in build.exporter(target).CARRIES.get("fp32", ())
    assert any(notice.startswith("low-rank weights") for notice in artifact.manifest.notices) != factored
    opened, pytorch = open_runner(target, artifact.path, 1), open_runner("pytorch", small.path, 1)
    scale = np.abs(states).max()
    np.testing.assert_allclose(opened.encoder_states(mel) / scale, states / scale, atol=1e-4)
    options = DecodeOptions(max_new_tokens=12)
    assert opened.generate(mel, options)[0].tokens == pytorch.generate(mel, options)[0].tokens
    assert stored(artifact, small.graph_weights.read(f"{FACTORED}.right.weight")) == factored
    assert stored(artifact, small.weights.read(f"{FACTORED}.weight")) != factored


def stored(artifact: Artifact, matrix: torch.Tensor) -> bool:
    """Whether a file of the artifact holds a matrix as it is, or transposed."""
    files = [(artifact.path / entry.path).read_bytes() for entry in artifact.manifest.files]
    return any(one.contiguous().numpy().tobytes() in file for one in (matrix, matrix.T) for file in files)
