"""Folders that older tools or fine-tuning left incomplete, and everything else that a fine-tune may be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration, WhisperTokenizer

from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import CheckpointError
from asr_core.tokens import load_tokenizer, text_of
from runners.base import open_runner
from tests import oracles

REBUILT = ("lang_to_id", "task_to_id", "no_timestamps_token_id", "decoder_start_token_id", "is_multilingual", "eos_token_id",
           "prev_sot_token_id")  # fmt: skip


@pytest.fixture
def copy(shape_folder, tmp_path):
    """A copy of a shape's folder that a test may change, its tokens dependent on the place and the audio."""

    def folder(shape: str) -> Path:
        path = shutil.copytree(shape_folder(shape), tmp_path / shape)
        names = ("encoder_attn.v_proj.weight", "encoder_attn.out_proj.weight", "conv")
        embedding, positions = "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"
        weights = oracles.loud(load_file(path / "model.safetensors"), embedding, positions, *names)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(folder)
    return str(raised.value)


def generation(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def forget(folder: Path, *keys: str) -> None:
    kept = {key: value for key, value in generation(folder).items() if key not in keys}
    (folder / "generation_config.json").write_text(json.dumps(kept))


def pickle_weights(folder: Path, *, sharded: bool = False) -> None:
    """Save as transformers did before safetensors, the tied head included."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    if not sharded:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = sorted(weights)
    places = {name: f"pytorch_model-0000{1 + ('decoder' in name or 'proj' in name)}-of-00002.bin" for name in names}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def add_tokens(folder: Path) -> None:
    """Add words and a sign to the tokenizer and rows to the embedding, as fine-tuning for a domain does."""
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["oesophagogastroduodenoscopy", "<|speaker|>", "ŵŷ"])
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    old = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embedding = model.get_input_embeddings().weight.data
    embedding[old:] = torch.randn(embedding[old:].shape, generator=torch.Generator().manual_seed(0)) * 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shard(folder: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5MB")


LAYOUTS = {
    "added tokens": ("mini", add_tokens),
    "added tokens, English": ("mini.en", add_tokens),
    "128 mels": ("mini-large-v3", lambda folder: None),
    "turbo": ("mini-turbo", lambda folder: None),
    "distil, English": ("mini-distil.en", lambda folder: None),
    "pickled in shards": ("mini", lambda folder: pickle_weights(folder, sharded=True)),
    "in shards": ("mini", shard),
    "bfloat16": ("mini", lambda folder: oracles.transformers_model(folder).to(torch.bfloat16).save_pretrained(folder)),
    "no languages": ("mini", lambda folder: forget(folder, "lang_to_id", "task_to_id", "is_multilingual")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tokens_are_transformers(copy, export_here, layout):
    shape, change = LAYOUTS[layout]
    folder = copy(shape)
    before, vocab = generation(folder), Checkpoint.open(folder).dims.vocab
    change(folder)
    checkpoint = Checkpoint.open(folder)
    artifact = export_here(checkpoint.path, "ctranslate2", "fp32")
    runner = open_runner("ctranslate2", artifact.path, 1)
    features = oracles.mel(checkpoint.dims.n_mels)
    expected = oracles.transformers_tokens(oracles.transformers_model(folder), features, before)
    assert len(set(expected)) > 2
    assert runner.generate(features, DecodeOptions(max_new_tokens=oracles.NEW_TOKENS))[0].tokens == expected
    assert any(token >= vocab for token in expected) is (change is add_tokens)
    assert checkpoint.multilingual is not shape.endswith(".en")


def test_added_tokens_are_text(copy):
    folder = copy("mini")
    add_tokens(folder)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.dims.vocab == 51868
    assert checkpoint.path == folder
    # After the timestamps, yet text: transformers' tokenizer says so too.
    ids = [400, 51866, 51865, 50364, 51864, 51867, 50257]
    theirs = WhisperTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
    assert text_of(load_tokenizer(folder), ids) == theirs.strip()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 51868, "content": "one more"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer.json has 51869 tokens, the model 51868: it is another model's, or was never resized" in refusal(folder)


@pytest.mark.parametrize("shape", ["mini", "mini.en", "mini-large-v3"])
def test_a_lost_generation_config(shape_folder, tmp_path, shape):
    """Everything but the alignment heads comes back; the suppression lists from config.json, or openai-whisper's."""
    folder = shutil.copytree(shape_folder(shape), tmp_path / shape)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"suppress_tokens": [5, 6], "begin_suppress_tokens": None}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.remarks == ("generation_config.json is missing: rebuilt from config.json and the tokenizer",)
    whole = generation(shape_folder(shape))
    assert {key: checkpoint.generation.get(key) for key in REBUILT} == {key: whole.get(key) for key in REBUILT}
    assert checkpoint.generation["suppress_tokens"] == [5, 6]
    assert whole["eos_token_id"] in checkpoint.generation["begin_suppress_tokens"]
    assert not (folder / "generation_config.json").exists()
    assert Checkpoint.open(checkpoint.path).fingerprint == checkpoint.fingerprint


@pytest.mark.parametrize("key", ["lang_to_id", "task_to_id"])
def test_lost_languages(mini, key):
    """transformers drops them when it saves a generation config that it made from a model config."""
    whole = generation(mini)
    forget(mini, key, "is_multilingual")
    checkpoint = Checkpoint.open(mini)
    assert checkpoint.generation == whole
    assert checkpoint.remarks == (f"generation_config.json has no {key}: taken from the tokenizer's tokens",)
    assert (checkpoint.path / "model.safetensors").resolve() == mini / "model.safetensors"
    assert key not in generation(mini)


def test_a_slow_tokenizer(mini, shape_folder):
    """What transformers saved before tokenizer.json: the vocabulary, the merges, the added tokens."""
    tokenizer = json.loads((mini / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    (mini / "added_tokens.json").write_text(json.dumps(added))
    (mini / "tokenizer.json").unlink()
    checkpoint = Checkpoint.open(mini)
    assert checkpoint.remarks == ("tokenizer.json made from vocab.json and merges.txt",)
    ours, whole = (json.loads((path / "tokenizer.json").read_text()) for path in (checkpoint.path, shape_folder("mini")))
    assert ours["model"]["vocab"] == whole["model"]["vocab"]
    assert {token["content"]: token["id"] for token in ours["added_tokens"]} == added


def test_pickled_weights_are_the_same_tensors(mini, shape_folder):
    pickle_weights(mini, sharded=True)
    before = {file.name: file.read_bytes() for file in mini.iterdir()}
    checkpoint, single = Checkpoint.open(mini), Checkpoint.open(shape_folder("mini"))
    assert checkpoint.remarks == ("pytorch_model-00001-of-00002.bin converted to safetensors",)
    assert all(torch.equal(checkpoint.weights.read(name), single.weights.read(name)) for name in single.weights.names)
    assert {file.name: file.read_bytes() for file in mini.iterdir()} == before
    (mini / "pytorch_model-00002-of-00002.bin").unlink()
    assert "the shards pytorch_model-00002-of-00002.bin named in pytorch_model.bin.index.json are missing" in refusal(mini)


def test_bad_pickles(mini, conversions):
    weights = load_file(mini / "model.safetensors")
    (mini / "model.safetensors").unlink()
    file = mini / "pytorch_model.bin"
    torch.save(weights | {"code": print}, file)
    assert "holds more than tensors: loading it could run code" in refusal(mini)
    torch.save(weights | {"epoch": 3}, file)
    assert "holds no weights (tensors by name)" in refusal(mini)
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:-1000])
    assert "pytorch_model.bin is not a complete PyTorch file" in refusal(mini)
    weights["proj_out.weight"] = torch.zeros(51865, 64)
    torch.save(weights, file)
    assert "an untied head is not a Whisper model" in refusal(mini)
    assert not [left for left in conversions.iterdir() if left.name.startswith(".")]


def test_a_head_that_would_be_random(mini):
    config = json.loads((mini / "config.json").read_text())
    (mini / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "tie_word_embeddings=false, and the weights no proj_out.weight" in refusal(mini)


def test_another_models_tokenizer(mini, shape_folder):
    shutil.copyfile(shape_folder("mini.en") / "tokenizer.json", mini / "tokenizer.json")
    assert "starts with token 50258, tokenizer.json's <|startoftranscript|> is 50257" in refusal(mini)


def test_what_killed_conversions_left_is_removed(mini, conversions):
    pickle_weights(mini)
    left = conversions / ".partial-999999999-x"
    left.mkdir(parents=True)
    Checkpoint.open(mini)
    assert not left.exists()
