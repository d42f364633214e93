"""Random checkpoints that are written file by file."""

import json
import math

import torch
from transformers import WhisperForConditionalGeneration

from asr_core.checkpoint import Checkpoint
from reference import shapes


def test_a_sharded_random_checkpoint_is_whole(tmp_path):
    folder = shapes.write_sharded(shapes.SHAPES["mini-large-v3"], tmp_path / "sharded", "float16", shard_mb=4)
    model, found = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert model.dtype == torch.float16
    assert {name for names in found.values() for name in names} <= {"proj_out.weight"}
    checkpoint = Checkpoint.open(folder)
    assert model.state_dict()["model.decoder.layers.1.fc1.weight"].equal(
        checkpoint.weights.read("model.decoder.layers.1.fc1.weight")
    )
    assert 0.019 < model.state_dict()["model.decoder.embed_tokens.weight"].float().std() < 0.021
    files = list(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    # Only a tensor larger than that makes a file larger; headers are small.
    largest = max(math.prod(checkpoint.weights.shape(name)) for name in checkpoint.weights.names) * 2
    assert max(file.stat().st_size for file in files) < max(4e6, largest) + 10_000
    total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(math.prod(checkpoint.weights.shape(name)) * 2 for name in checkpoint.weights.names)


def test_shards_do_not_change_the_weights(tmp_path):
    few, many = (
        Checkpoint.open(shapes.write_sharded(shapes.SHAPES["mini"], tmp_path / f"{size}", shard_mb=size)) for size in (2, 100)
    )
    assert few.weights.names == many.weights.names
    assert all(few.weights.read(name).equal(many.weights.read(name)) for name in few.weights.names)
