import json

import pytest
from transformers import WhisperTokenizer

from asr_core.checkpoint import Checkpoint
from asr_core.errors import CheckpointError, UsageError
from asr_core.tokens import TokenIds, load_tokenizer, text_of, write_bundle

SHAPES = ["mini", "mini.en", "mini-large-v3"]


@pytest.fixture(scope="module", params=["reference", *SHAPES])
def checkpoint(request, shape_folder) -> Checkpoint:
    return Checkpoint.open("reference" if request.param == "reference" else shape_folder(request.param))


@pytest.fixture(scope="module")
def theirs(checkpoint) -> WhisperTokenizer:
    return WhisperTokenizer.from_pretrained(checkpoint.path)


def ids_of(checkpoint: Checkpoint) -> TokenIds:
    return TokenIds.read(checkpoint.path, checkpoint.generation, checkpoint.dims.n_text_ctx)


def test_special_ids_are_transformers(checkpoint, theirs):
    ids = ids_of(checkpoint)
    expected = {
        "<|startoftranscript|>": ids.start,
        "<|endoftext|>": ids.end,
        "<|notimestamps|>": ids.no_timestamps,
        "<|0.00|>": ids.timestamp_begin,
        "<|nospeech|>": ids.no_speech,
    }
    assert {token: theirs.convert_tokens_to_ids(token) for token in expected} == expected
    assert ids.max_new_tokens == 224


@pytest.mark.parametrize("language", ["en", "es"])
@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_prompt_is_transformers(checkpoint, theirs, language, task):
    ids = ids_of(checkpoint)
    if not checkpoint.multilingual:
        if (language, task) == ("en", "transcribe"):
            assert ids.prompt() == theirs.prefix_tokens
        else:
            with pytest.raises(UsageError, match="only transcribes English"):
                ids.prompt(language, task)
        return
    theirs.set_prefix_tokens(language=language, task=task)
    assert ids.prompt(language, task) == theirs.prefix_tokens


def test_prompt_lists_what_the_model_knows(shape_folder):
    ids = ids_of(Checkpoint.open(shape_folder("mini-large-v3")))
    assert len(ids.languages) == 100
    with pytest.raises(UsageError, match=r"unknown language 'xx'; this model knows: af, am, .*, yue, zh\."):
        ids.prompt("xx")
    with pytest.raises(UsageError, match=r"unknown task 'sing'; this model knows: transcribe, translate\."):
        ids.prompt("en", "sing")


@pytest.mark.parametrize("text", ["Thursday at nine", "¿dónde está el tomate?", "Zoë's café: 3 €", "日本語 🎉", ""])
def test_text_is_transformers(checkpoint, theirs, text):
    tokenizer = load_tokenizer(checkpoint.path)
    words = tokenizer.encode(text, add_special_tokens=False).ids
    assert words == theirs(text, add_special_tokens=False).input_ids
    ids = ids_of(checkpoint)
    whole = [*ids.prompt(), ids.timestamp_begin, *words, ids.timestamp_begin + 77, ids.end]
    assert text_of(tokenizer, whole) == theirs.decode(whole, skip_special_tokens=True).strip()


def test_text_of_a_broken_character(checkpoint, theirs):
    tokenizer = load_tokenizer(checkpoint.path)
    half = tokenizer.encode("é", add_special_tokens=False).ids[:1]
    assert text_of(tokenizer, half) == theirs.decode(half, skip_special_tokens=True).strip()


def test_suppression_lists_come_from_the_generation_config(checkpoint):
    ids = ids_of(checkpoint)
    assert ids.suppress == sorted(checkpoint.generation["suppress_tokens"])
    assert ids.begin_suppress == sorted(checkpoint.generation["begin_suppress_tokens"])


def test_old_name_of_the_no_speech_token(mini):
    path = mini / "tokenizer.json"
    path.write_text(path.read_text().replace("<|nospeech|>", "<|nocaptions|>"))
    assert ids_of(Checkpoint.open(mini)).no_speech == 50362


def test_a_tokenizer_of_another_model(mini):
    path = mini / "tokenizer.json"
    path.write_text(path.read_text().replace("<|startoftranscript|>", "<s>"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has no <\|startoftranscript\|> token"):
        ids_of(Checkpoint.open(mini))


def test_a_damaged_tokenizer(mini):
    (mini / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(mini)


@pytest.mark.parametrize("name", SHAPES)
def test_bundle_gives_transformers_the_right_extractor(shape_folder, tmp_path, name):
    from transformers import WhisperFeatureExtractor

    checkpoint = Checkpoint.open(shape_folder(name))
    write_bundle(checkpoint.path, checkpoint.dims.n_mels, [(1, 0)], tmp_path)
    extractor = WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.feature_size == checkpoint.dims.n_mels
    default = WhisperFeatureExtractor(feature_size=checkpoint.dims.n_mels).to_dict()
    assert {**json.loads((tmp_path / "preprocessor_config.json").read_text()), **default} == {
        **default,
        "processor_class": "WhisperProcessor",
    }
