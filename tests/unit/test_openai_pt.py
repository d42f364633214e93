"""OpenAI's checkpoint files, written and read by openai-whisper itself."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import whisper
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import LANGUAGES, get_tokenizer

from asr_core import openai_pt, vocabulary
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import CheckpointError
from asr_core.tokens import TokenIds, load_tokenizer
from runners.base import open_runner
from tests import oracles

# Bands, vocabulary and decoder layers of OpenAI's families, and the dtype in which it saves them.
FAMILIES = {
    "multilingual": (80, 51865, 2, torch.float32),
    "english": (80, 51864, 2, torch.float16),
    "large-v3": (128, 51866, 2, torch.float16),
    "turbo": (128, 51866, 1, torch.float16),
}


def model_of(family: str) -> Whisper:
    bands, vocab, decoder_layers, dtype = FAMILIES[family]
    torch.manual_seed(0)
    model = Whisper(ModelDimensions(bands, 1500, 64, 1, 2, vocab, 448, 64, 1, decoder_layers)).eval()
    weights = oracles.loud(model.state_dict(), "decoder.token_embedding.weight", "decoder.positional_embedding")
    model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in weights.items()})
    return model


def write(family: str, file: Path) -> Path:
    model = model_of(family)
    weights = {name: tensor.to(FAMILIES[family][3]) for name, tensor in model.state_dict().items()}
    torch.save({"dims": model.dims.__dict__, "model_state_dict": weights}, file)
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openai")
    return lambda family: file if (file := folder / f"{family}.pt").exists() else write(family, file)


def refusal(source: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(source)
    return str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_openai_whispers(files, export_here, family):
    """Written by openai-whisper, converted, exported and decoded: what openai-whisper decodes of the file."""
    checkpoint = Checkpoint.open(files(family))
    assert checkpoint.name == family
    model = whisper.load_model(str(files(family)), device="cpu")
    features = oracles.mel(model.dims.n_mels)
    options = DecodingOptions(language="en", without_timestamps=True, fp16=False, sample_len=oracles.NEW_TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = DecodingTask(model, options)
        expected = task.run(torch.from_numpy(features))[0].tokens
    assert len(set(expected)) > 5
    artifact = export_here(checkpoint.path, "ctranslate2", "fp32")
    runner = open_runner("ctranslate2", artifact.path, 1)
    assert runner.generate(features, DecodeOptions(max_new_tokens=oracles.NEW_TOKENS))[0].tokens == expected
    ids = TokenIds.read(checkpoint.path, checkpoint.generation, checkpoint.dims.n_text_ctx)
    own = task.tokenizer
    assert tuple(ids.suppress) == task._get_suppress_tokens()
    assert ids.begin_suppress == sorted([*own.encode(" "), own.eot])
    assert ids.prompt() == [*own.sot_sequence_including_notimestamps]
    assert (ids.no_speech, ids.timestamp_begin) == (own.no_speech, own.timestamp_begin)
    assert list(ids.languages) == (list(LANGUAGES)[: own.num_languages] if model.is_multilingual else [])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_the_files(files, family):
    checkpoint = Checkpoint.open(files(family))
    saved = torch.load(files(family), weights_only=True)["model_state_dict"]
    assert {openai_pt.renamed(name) for name in saved} == set(checkpoint.weights.names)
    for name, tensor in saved.items():
        ours = checkpoint.weights.read(openai_pt.renamed(name))
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)


def test_openai_whisper_reads_ours(shape_folder):
    """A Hugging Face checkpoint's weights, put back under OpenAI's names, say there what they say in transformers."""
    folder = shape_folder("mini")
    model = Whisper(ModelDimensions(80, 1500, 64, 1, 2, 51865, 448, 64, 1, 2)).eval()
    weights = Checkpoint.open(folder).state_dict()
    model.load_state_dict({name: weights[openai_pt.renamed(name)] for name in model.state_dict()})
    features, tokens = torch.from_numpy(oracles.mel(80)), torch.tensor([[50258, 50259, 50359, 50363, 400, 1000]])
    with torch.inference_mode():
        ours = model(features, tokens)
        theirs = oracles.transformers_model(folder)(features, decoder_input_ids=tokens).logits
    # float32 in another order of operations; the logits are of size 1.
    assert torch.allclose(ours, theirs, atol=1e-5)


TEXTS = (
    "Hello, world! It's 3.14159 o'clock — don't you think?\n\n  indented\ttext",
    "Добрый день, мир. 你好，世界。こんにちは ♪♪ [music] ((laughs))",
    "naïve façade Ελληνικά العربية हिन्दी 🎧🎙️  trailing   ",
)


@pytest.mark.parametrize(("english", "languages"), [(False, 99), (False, 100), (True, 99)])
def test_the_vocabulary_is_openais(tmp_path, english, languages):
    vocabulary.write_tokenizer(vocabulary.assets(), tmp_path, english=english, known=languages)
    ours = load_tokenizer(tmp_path)
    theirs = get_tokenizer(not english, num_languages=languages).encoding
    assert ours.get_vocab_size() == theirs.n_vocab
    assert all(ours.token_to_id(token) == index for token, index in theirs._special_tokens.items())
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == text
    assert json.loads((tmp_path / "normalizer.json").read_text())["colour"] == "color"


@pytest.mark.parametrize("name", sorted(set(whisper._ALIGNMENT_HEADS) - {"large", "turbo"}))
def test_alignment_heads_are_openais(name):
    layers, heads, mels, vocab = openai_pt.ALIGNMENT_HEADS[name][0]
    model = Whisper(ModelDimensions(mels, 1, 64, 1, 0, vocab, 1, 1, 1, 0))
    model.dims.n_text_layer, model.dims.n_text_head = layers, heads
    model.set_alignment_heads(whisper._ALIGNMENT_HEADS[name])
    dims = {"n_text_layer": layers, "n_text_head": heads, "n_mels": mels, "n_vocab": vocab}
    assert openai_pt.alignment_heads(name, dims) == model.alignment_heads.indices().T.tolist()


def test_saved_alignment_heads_are_taken(files, tmp_path):
    saved = torch.load(files("multilingual"), weights_only=True)
    saved["model_state_dict"] |= {
        "alignment_heads": torch.tensor([[False], [True]]).to_sparse(),
        "decoder.mask": torch.zeros(448, 448),
    }
    torch.save(saved, tmp_path / "tuned.pt")
    checkpoint = Checkpoint.open(tmp_path / "tuned.pt")
    assert checkpoint.generation["alignment_heads"] == [[1, 0]]
    assert checkpoint.remarks == ()
    assert "alignment heads are unknown" in Checkpoint.open(files("multilingual")).remarks[0]


def test_converted_once_and_never_in_place(files, conversions):
    file = files("multilingual")
    before = file.read_bytes()
    first = Checkpoint.open(file)
    assert first.path.parent == conversions
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    again = Checkpoint.open(file)
    assert again == first
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp
    assert file.read_bytes() == before
    assert Checkpoint.open(first.path).fingerprint == first.fingerprint
    assert not [left for left in conversions.iterdir() if left.name.startswith(".")]


def test_a_tokenizer_beside_the_file(files, shape_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "assets", lambda: None)
    file = shutil.copyfile(files("multilingual"), tmp_path / "model.pt")
    assert "comes without a tokenizer: pip install openai-whisper" in refusal(file)
    shutil.copyfile(shape_folder("mini") / "tokenizer.json", tmp_path / "tokenizer.json")
    checkpoint = Checkpoint.open(file)
    assert (checkpoint.path / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    shutil.copyfile(shape_folder("mini-large-v3") / "tokenizer.json", tmp_path / "tokenizer.json")
    assert "has a vocabulary of 51865 tokens; the tokenizer beside" in refusal(file)


class Code:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_code_is_not_run(tmp_path, capsys):
    torch.save({"dims": {}, "model_state_dict": Code()}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"dims": Code()}))
    for name in ("new.pt", "old.pt"):
        message = refusal(tmp_path / name)
        assert "holds more than tensors" in message
        assert "Nothing of it was run" in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kept", [0, 1000, -1000])
def test_truncated(files, tmp_path, kept):
    (tmp_path / "cut.pt").write_bytes(files("multilingual").read_bytes()[:kept])
    assert "is not a complete PyTorch file" in refusal(tmp_path / "cut.pt")


def test_no_whisper(files, tmp_path):
    file = tmp_path / "other.pt"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "epoch": 3}, file)
    assert "is not an OpenAI Whisper checkpoint (one has 'dims' and 'model_state_dict'): it has state_dict, epoch" in refusal(
        file
    )
    torch.save({"dims": {"n_mels": 80}, "model_state_dict": {}}, file)
    assert "its dims lack n_audio_ctx" in refusal(file)
    saved = torch.load(files("multilingual"), weights_only=True)
    saved["dims"]["n_vocab"] = 51900
    torch.save(saved, file)
    assert "has a vocabulary of 51900 tokens; the tokenizer of openai-whisper has 51866" in refusal(file)
    saved["dims"]["n_vocab"] = 51865
    del saved["model_state_dict"]["encoder.conv1.bias"]
    torch.save(saved, file)
    assert "tensor model.encoder.conv1.bias is missing" in refusal(file)
    assert refusal(tmp_path / "absent.pt") == f"{tmp_path / 'absent.pt'}: no such folder, and not a hub id (owner/name)."
