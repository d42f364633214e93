"""The reference's tokenizer files: a byte-level BPE and Whisper's special tokens in its order."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from reference import grammar

SPACE = "\u0120"  # how the byte-level BPE writes one
END = "<|endoftext|>"
START = "<|startoftranscript|>"
TRANSLATE, TRANSCRIBE = "<|translate|>", "<|transcribe|>"
LANGUAGE_MODEL, PREVIOUS = "<|startoflm|>", "<|startofprev|>"
NO_SPEECH, NO_TIMESTAMPS = "<|nospeech|>", "<|notimestamps|>"
# The newest models know a hundredth language; the multilingual sizes before them have 99.
LANGUAGE_TOKENS = tuple(f"<|{code}|>" for code in list(LANGUAGES)[:99])
SPECIAL_TOKENS = (
    *(END, START, *LANGUAGE_TOKENS, TRANSLATE, TRANSCRIBE),
    *(LANGUAGE_MODEL, PREVIOUS, NO_SPEECH, NO_TIMESTAMPS),
)
TIME_STEP = 0.02  # seconds between two timestamp tokens
TIMESTAMP_TOKENS = tuple(f"<|{step * TIME_STEP:.2f}|>" for step in range(1501))

# What Whisper never says: speaker tags and music signs, after openai-whisper's list. Signs of
# _MUSIC share their first bytes, so suppressing a first token is enough for them.
_SIGNS = (
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *("<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("'),
    *("((", "))", "(((", ")))", "[[", "]]", "{{", "}}", "♪♪", "♪♪♪"),
)
_MUSIC = "♩♪♫♬♭♮♯"
_LEADING = (" -", " '")  # fine inside a word, not before it

_MOST_MERGES = 4_096  # more than it takes to make each word one token


def write_tokenizer(folder: Path) -> None:
    """Train the BPE on the grammar and write every tokenizer file of the hub's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _build(_corpus())
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    model = json.loads(tokenizer.to_str())["model"]
    _write_json(folder / "vocab.json", {**model["vocab"], END: tokenizer.token_to_id(END)})
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    added = (*SPECIAL_TOKENS[1:], *TIMESTAMP_TOKENS)
    _write_json(folder / "added_tokens.json", {t: tokenizer.token_to_id(t) for t in added})
    _write_json(folder / "special_tokens_map.json", _special_tokens_map())
    _write_json(folder / "tokenizer_config.json", _config(tokenizer))


def non_speech_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of speaker tags and music signs, sorted, by openai-whisper's rule."""

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    found = {ids(text)[0] for text in _LEADING}
    for sign in (*_SIGNS, *_MUSIC):
        for encoded in (ids(sign), ids(" " + sign)):
            if len(encoded) == 1 or sign in _MUSIC:
                found.add(encoded[0])
    return sorted(found)


def _corpus() -> Iterable[str]:
    """Yield every word of the grammar, then the signs: often enough to become single tokens."""
    for language in grammar.LANGUAGES:
        for word in grammar.words(language):
            yield from [f" {word}"] * 10
    for sign in (*_SIGNS, *_MUSIC, *(text.strip() for text in _LEADING)):
        yield from (sign, " " + sign) * 10


def _build(corpus: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + _MOST_MERGES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([_added(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([_added(token, special=False) for token in TIMESTAMP_TOKENS])
    prefix = [(token, tokenizer.token_to_id(token)) for token in (START, NO_TIMESTAMPS)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} {NO_TIMESTAMPS} $A:0 {END}:0",
        pair=f"{START} {NO_TIMESTAMPS} $A:0 $B:1 {END}:1",
        special_tokens=[*prefix, (END, tokenizer.token_to_id(END))],
    )
    return tokenizer


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _special_tokens_map() -> dict[str, Any]:
    """Return the hub's map: transformers takes the last token's id + 1 as the first timestamp."""
    end = {"content": END, "lstrip": False, "normalized": False, "rstrip": False}
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {"additional_special_tokens": list(SPECIAL_TOKENS)} | {name: {**end, "single_word": False} for name in names}


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    decoder = {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "bos_token": END,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": END,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "tokenizer_class": "WhisperTokenizer",
        "unk_token": END,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
