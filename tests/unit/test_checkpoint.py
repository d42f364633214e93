import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from asr_core.checkpoint import Checkpoint
from asr_core.errors import CheckpointError


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(folder)
    return str(raised.value)


def test_opens_a_good_one(mini):
    checkpoint = Checkpoint.open(mini)
    assert checkpoint.name == "mini"
    assert checkpoint.multilingual
    assert (checkpoint.dims.d_model, checkpoint.dims.vocab, checkpoint.dims.n_text_ctx) == (64, 51865, 448)
    model = WhisperForConditionalGeneration.from_pretrained(mini)
    theirs = {name: tensor for name, tensor in model.state_dict().items() if name != "proj_out.weight"}
    ours = checkpoint.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_opens_the_carried_one(trained):
    assert trained.name == "reference"
    assert trained.multilingual


def test_english_only(shape_folder):
    assert not Checkpoint.open(shape_folder("mini.en")).multilingual


def test_fingerprint_knows_every_byte(mini):
    before = Checkpoint.open(mini).fingerprint
    assert Checkpoint.open(mini).fingerprint == before
    edit_json(mini / "generation_config.json", begin_suppress_tokens=[220])
    changed = Checkpoint.open(mini).fingerprint
    assert changed != before

    def nudge(weights):
        weights["model.encoder.conv1.bias"][0] += 1e-3

    edit_weights(mini, nudge)
    assert Checkpoint.open(mini).fingerprint not in (before, changed)


def test_missing_folder(tmp_path):
    assert refusal(tmp_path / "nothing") == f"{tmp_path / 'nothing'}: no such folder, and not a hub id (owner/name)."


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "is a file; --model takes a checkpoint folder" in refusal(tmp_path / "model.safetensors")


def test_empty_folder(tmp_path):
    assert "holds no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [("{", "is not valid JSON"), ("[]", "holds no JSON object")])
def test_damaged_config(mini, text, reason):
    (mini / "config.json").write_text(text)
    assert reason in refusal(mini)


def test_another_family(mini):
    edit_json(mini / "config.json", model_type="wav2vec2")
    assert "describes a 'wav2vec2' model, not 'whisper'" in refusal(mini)


def test_config_that_is_no_whisper(mini):
    edit_json(mini / "config.json", activation_function="relu", num_mel_bins=40, decoder_attention_heads=3)
    message = refusal(mini)
    for reason in ("activation_function='relu'", "num_mel_bins is 40", "not a multiple of the decoder's heads"):
        assert reason in message


def test_config_without_a_size(mini):
    config = json.loads((mini / "config.json").read_text())
    del config["d_model"]
    (mini / "config.json").write_text(json.dumps(config))
    assert "config.json lacks 'd_model'" in refusal(mini)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1000])
def test_truncated_weights(mini, kept):
    path = mini / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "is not a complete safetensors file" in refusal(mini)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_values(mini, value):
    def spoil(weights):
        weights["model.decoder.layers.1.fc1.weight"][3, 4] = value

    edit_weights(mini, spoil)
    assert "tensor model.decoder.layers.1.fc1.weight holds NaN or infinite values" in refusal(mini)


def test_every_reason_at_once(mini):
    def spoil(weights):
        del weights["model.encoder.conv1.bias"]
        weights["model.encoder.extra"] = torch.zeros(1)
        weights["model.decoder.layers.0.fc1.bias"] = torch.zeros(7)
        weights["proj_out.weight"] = torch.zeros(51865, 64)

    edit_weights(mini, spoil)
    for name in ("tokenizer.json", "vocab.json"):
        (mini / name).unlink()
    (mini / "generation_config.json").unlink()
    message = refusal(mini)
    for reason in (
        "tensor model.encoder.conv1.bias is missing",
        "tensor model.encoder.extra is not part of a Whisper model",
        "tensor model.decoder.layers.0.fc1.bias has shape (7,), the config says (256,)",
        "an untied head is not a Whisper model",
        "tokenizer.json is missing",
        "generation_config.json is missing",
    ):
        assert reason in message


def test_many_reasons_are_counted(mini):
    edit_json(mini / "config.json", decoder_layers=4)
    assert refusal(mini).count("is missing") == 10
    assert "and 38 more" in refusal(mini)


def test_no_weights(mini):
    (mini / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refusal(mini)


def shard(folder: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")


def test_sharded(mini, shape_folder):
    shard(mini)
    assert len(list(mini.glob("model-*.safetensors"))) > 1
    ours, single = Checkpoint.open(mini).state_dict(), Checkpoint.open(shape_folder("mini")).state_dict()
    assert ours.keys() == single.keys()
    assert all(torch.equal(ours[name], single[name]) for name in single)


def test_missing_shard(mini):
    shard(mini)
    victim = min(mini.glob("model-*.safetensors"))
    victim.unlink()
    assert f"the shards {victim.name} named in model.safetensors.index.json are missing" in refusal(mini)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(mini, shape_folder, dtype):
    WhisperForConditionalGeneration.from_pretrained(mini).to(dtype).save_pretrained(mini)
    state = Checkpoint.open(mini).state_dict()
    single = Checkpoint.open(shape_folder("mini")).state_dict()
    assert all(torch.equal(state[name], single[name].to(dtype).float()) for name in single)


def test_an_equal_head_is_fine(mini):
    def tie(weights):
        weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"].clone()

    edit_weights(mini, tie)
    assert "proj_out.weight" not in Checkpoint.open(mini).state_dict()


OPEN = """
import sys
from asr_core.checkpoint import Checkpoint
from asr_core.errors import CheckpointError
for source in sys.argv[1:]:
    try:
        checkpoint = Checkpoint.open(source)
        print(checkpoint.name, checkpoint.fingerprint)
    except CheckpointError as error:
        print(error)
"""


def open_in_process(*sources: str, **environment: str) -> list[str]:
    """The hub's client reads its environment once, so each case gets a process."""
    command = [sys.executable, "-c", OPEN, *sources]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()


def cache_model(cache: Path, source: Path, commit: str, revision: str) -> None:
    """Put a folder into a hub cache as the hub's client lays it out."""
    repo = cache / "models--owner--whisper-mini"
    (repo / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    (repo / "blobs").mkdir(exist_ok=True)
    (repo / "snapshots" / commit).mkdir(parents=True)
    for file in sorted(source.iterdir()):
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, repo / "blobs" / blob)
        (repo / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / blob)


def test_hub_ids_without_a_network(shape_folder, tmp_path):
    """A cached model opens; one that is not cached is a sentence, not a wait."""
    old, new = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
    cache_model(tmp_path, shape_folder("mini"), old, "refs/pr/1")
    cache_model(tmp_path, shape_folder("mini.en"), new, "main")
    name = "owner/whisper-mini"
    sources = (name, f"{name}@main", f"{name}@refs/pr/1", f"{name}@{old}", f"{name}@v9", "owner/absent")
    main, named, pinned, commit, unknown, absent = open_in_process(*sources, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    english, multilingual = (Checkpoint.open(shape_folder(shape)).fingerprint for shape in ("mini.en", "mini"))
    assert main == f"owner--whisper-mini {english}"
    assert named == f"owner--whisper-mini@main {english}"
    assert pinned == f"owner--whisper-mini@refs--pr--1 {multilingual}"
    assert commit == f"owner--whisper-mini@{old} {multilingual}"
    assert unknown == "owner/whisper-mini@v9 is not in the local hub cache, and HF_HUB_OFFLINE is set."
    assert absent == "owner/absent is not in the local hub cache, and HF_HUB_OFFLINE is set."


def test_unreachable_hub(tmp_path):
    """Nothing listens on port 9 of this machine."""
    answers = open_in_process("owner/absent", HF_HUB_CACHE=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert answers == ["owner/absent is not in the local hub cache, and the hub could not be reached."]
