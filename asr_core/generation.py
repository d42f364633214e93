"""Rebuild what a checkpoint's generation config lacks from the tokens that its tokenizer has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from asr_core.tokens import suppressed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<|startoftranscript|>", "<|endoftext|>"
TRANSLATE, TRANSCRIBE = "<|translate|>", "<|transcribe|>"
PREVIOUS, NO_TIMESTAMPS = "<|startofprev|>", "<|notimestamps|>"
LANGUAGE = re.compile(r"<\|[a-z]{2,4}\|>")
# OpenAI's English vocabulary is one token shorter: nothing else tells its language tokens, which mean nothing, from real ones.
ENGLISH_END = 50256


def languages(tokenizer: Tokenizer) -> dict[str, int]:
    """Language tokens and their ids: those that lie between the start and the tasks, in the vocabulary's order."""
    start, tasks = tokenizer.token_to_id(START), tokenizer.token_to_id(TRANSLATE)
    if start is None or tasks is None:
        return {}
    between = {str(tokenizer.id_to_token(index)): index for index in range(start + 1, tasks)}
    return {token: index for token, index in between.items() if LANGUAGE.fullmatch(token)}


def multilingual(generation: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether the model is prompted with a language and a task: what its generation config says, else its vocabulary."""
    if "is_multilingual" in generation:
        return bool(generation["is_multilingual"])
    return tokenizer.token_to_id(END) != ENGLISH_END and bool(languages(tokenizer))


def complete(generation: dict[str, Any], config: dict[str, Any], tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """A generation config that says all that decoding needs, and what was added, as sentences.

    Nothing that the checkpoint states is changed. ``config`` is the model's: older checkpoints state their suppression lists
    there. Alignment heads can't be rebuilt from tokens.
    """
    remarks = []
    whole = dict(generation)
    if not whole:
        whole = _new(config, tokenizer)
        remarks.append("generation_config.json is missing: rebuilt from config.json and the tokenizer")
    if not multilingual(whole, tokenizer):
        return whole, remarks
    rebuilt = {
        "lang_to_id": languages(tokenizer),
        "task_to_id": {token[2:-2]: tokenizer.token_to_id(token) for token in (TRANSCRIBE, TRANSLATE)},
    }
    lost = [key for key, value in rebuilt.items() if not whole.get(key) and value]
    if lost and generation:
        remarks.append(f"generation_config.json has no {' and no '.join(lost)}: taken from the tokenizer's tokens")
    return whole | {key: rebuilt[key] for key in lost} | ({"is_multilingual": True} if lost else {}), remarks


def _new(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    blank = tokenizer.encode(" ", add_special_tokens=False).ids
    return {
        "begin_suppress_tokens": _stated(config, "begin_suppress_tokens", sorted({*blank, *([] if end is None else [end])})),
        "bos_token_id": end,
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "is_multilingual": multilingual({}, tokenizer),
        "max_initial_timestamp_index": 50,
        "max_length": config.get("max_target_positions", 448),
        "no_timestamps_token_id": tokenizer.token_to_id(NO_TIMESTAMPS),
        "pad_token_id": end,
        "prev_sot_token_id": tokenizer.token_to_id(PREVIOUS),
        "return_timestamps": False,
        "suppress_tokens": _stated(config, "suppress_tokens", list(suppressed(tokenizer))),
    }


def _stated(config: dict[str, Any], key: str, otherwise: list[int]) -> list[int]:
    return otherwise if config.get(key) is None else list(config[key])
