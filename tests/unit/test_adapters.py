"""PEFT adapters, written by peft itself over a random base."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import CheckpointError
from runners.base import open_runner
from tests import oracles

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
KINDS = {
    "lora": peft.LoraConfig(**LORA),
    "patterns": peft.LoraConfig(**LORA, rank_pattern={"decoder.layers.1.*": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "biases-and-modules": peft.LoraConfig(**LORA, bias="lora_only", modules_to_save=["layer_norm"]),
    "every-linear": peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_2_SEQ_LM"),
    "loha": peft.LoHaConfig(r=2, target_modules=["fc1"], init_weights=False),
}


@pytest.fixture(scope="module")
def base(shape_folder, tmp_path_factory) -> Path:
    """A base whose tokens depend on the place and the audio."""
    folder = shutil.copytree(shape_folder("mini"), tmp_path_factory.mktemp("base") / "base")
    names = ("encoder_attn.v_proj.weight", "encoder_attn.out_proj.weight", "conv")
    embedding, positions = "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"
    weights = oracles.loud(load_file(folder / "model.safetensors"), embedding, positions, *names)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(base: Path, folder: Path, config: peft.PeftConfig, **named: object) -> Path:
    """Save an adapter of random weights, its saved modules and biases changed as training would change them."""
    torch.manual_seed(0)
    model = peft.get_peft_model(oracles.transformers_model(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name and "hada_" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    edit(folder, base_model_name_or_path=str(base), **named)
    return folder


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return lambda kind: folder if (folder := root / kind).exists() else write(base, folder, KINDS[kind])


@pytest.fixture
def lora(adapters, tmp_path) -> Path:
    """A copy of the plain adapter that a test may damage."""
    return shutil.copytree(adapters("lora"), tmp_path / "adapter")


def refusal(source: Path | str, adapter: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(source, adapter)
    return str(raised.value)


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.tensor([[50258, 50259, 50359, 50363, 400, 1000, 2000]])
    with torch.inference_mode():
        return model(input_features=torch.from_numpy(oracles.mel(80)), decoder_input_ids=tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(base, adapters, kind):
    """The merged checkpoint says what peft says with the adapter beside the weights."""
    checkpoint = Checkpoint.open(adapters(kind))
    assert checkpoint.name == f"base+{kind}"
    assert checkpoint.remarks == (f"adapter {kind} merged into base",)
    unmerged = peft.PeftModel.from_pretrained(oracles.transformers_model(base), adapters(kind)).eval()
    expected = logits(unmerged.base_model.model)
    # The same sums in another order, in float32, on logits of size 1; every adapter here moves them by 1e-2 or more.
    assert (logits(oracles.transformers_model(checkpoint.path)) - expected).abs().max() < 2e-5
    assert (logits(oracles.transformers_model(base)) - expected).abs().max() > 1e-2


def test_the_tokens_are_pefts(base, adapters, export_here):
    checkpoint = Checkpoint.open(base, adapters("every-linear"))
    unmerged = peft.PeftModel.from_pretrained(oracles.transformers_model(base), adapters("every-linear")).eval()
    features = oracles.mel(80)
    expected = oracles.transformers_tokens(unmerged.base_model.model, features, checkpoint.generation)
    assert len(set(expected)) > 5
    artifact = export_here(checkpoint.path, "ctranslate2", "fp32")
    assert artifact.manifest.fingerprint == checkpoint.fingerprint
    runner = open_runner("ctranslate2", artifact.path, 1)
    assert runner.generate(features, DecodeOptions(max_new_tokens=oracles.NEW_TOKENS))[0].tokens == expected


def test_one_merge_however_it_is_named(base, lora, shape_folder, conversions):
    before = {file: file.read_bytes() for folder in (base, lora) for file in folder.iterdir()}
    first = Checkpoint.open(lora)
    assert Checkpoint.open(base, lora) == first
    assert first.path.parent == conversions
    assert Checkpoint.open(first.path).fingerprint == first.fingerprint
    assert {file: file.read_bytes() for folder in (base, lora) for file in folder.iterdir()} == before
    shutil.copytree(shape_folder("mini"), lora / "mini")
    edit(lora, base_model_name_or_path="mini")  # beside the adapter
    other = Checkpoint.open(lora)
    assert (other.name, other.fingerprint == first.fingerprint) == ("mini+adapter", False)


def test_a_pickled_adapter(lora):
    merged = Checkpoint.open(lora).fingerprint
    torch.save(load_file(lora / "adapter_model.safetensors"), lora / "adapter_model.bin")
    (lora / "adapter_model.safetensors").unlink()
    assert Checkpoint.open(lora).fingerprint == merged
    torch.save({"a": print}, lora / "adapter_model.bin")
    assert "holds more than tensors" in refusal(lora)


def test_another_base(lora, shape_folder):
    message = refusal(shape_folder("mini-large-v3"), lora)
    assert "(LORA) cannot be merged into mini-large-v3" in message
    assert "lora_A.weight has shape (4, 64), the base wants (4, 128)" in message
    assert "… and" in message


def test_no_such_modules(lora):
    edit(lora, target_modules=["query"])
    assert "Target modules {'query'} not found in the base model" in refusal(lora)


def test_every_tensor_has_its_place(lora):
    weights = load_file(lora / "adapter_model.safetensors")
    name = min(weights)
    weights["base_model.model.model.extra.weight"] = weights.pop(name)
    save_file(weights, lora / "adapter_model.safetensors")
    message = refusal(lora)
    assert f"{name} is missing" in message
    assert "base_model.model.model.extra.weight has no place in the base" in message


@pytest.mark.parametrize(("kind", "reason"), [("PREFIX_TUNING", "it changes prompts, not weights"), ("HOMEMADE", "HOMEMADE")])
def test_other_kinds(lora, kind, reason):
    edit(lora, peft_type=kind)
    assert reason in refusal(lora)


def test_a_head_of_its_own(base, tmp_path):
    config = peft.LoraConfig(**LORA, modules_to_save=["proj_out"])
    assert "an untied head is not a Whisper model" in refusal(write(base, tmp_path / "headed", config))


def test_incomplete_adapters(lora, base, tmp_path):
    assert "holds no adapter_config.json" in refusal(base, base)
    assert "only one can be merged" in refusal(lora, lora)
    edit(lora, base_model_name_or_path=str(tmp_path / "gone"), revision=None)
    message = refusal(lora)
    assert f"{lora} is an adapter over {tmp_path / 'gone'}, which is not here" in message
    assert f"--model BASE --adapter {lora}" in message
    edit(lora, base_model_name_or_path=None)
    assert "names no base" in refusal(lora)
    (lora / "adapter_model.safetensors").unlink()
    assert "but no adapter_model.safetensors" in refusal(base, lora)
    shutil.copyfile(lora / "adapter_config.json", shutil.copytree(base, tmp_path / "both") / "adapter_config.json")
    assert "holds a model and an adapter" in refusal(tmp_path / "both")


def test_tokens_that_the_base_has_not(lora, base):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 51865, "content": "<|new|>"})
    (lora / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer has 1 tokens that the base's has not: <|new|>" in refusal(lora)
