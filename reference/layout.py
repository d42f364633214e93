"""Writes a trained model as a folder in the hub's Whisper file layout."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import WhisperConfig, WhisperForConditionalGeneration

from reference import checkpoint_path
from reference.tokenizer import (
    END,
    LANGUAGE_MODEL,
    LANGUAGE_TOKENS,
    NO_SPEECH,
    NO_TIMESTAMPS,
    PREVIOUS,
    SPACE,
    START,
    TRANSCRIBE,
    TRANSLATE,
    non_speech_ids,
    write_tokenizer,
)

Heads = list[tuple[int, int]]


def model_config(tokenizer: Tokenizer) -> WhisperConfig:
    """Return the architecture: Whisper's, small, with the real sizes' heads of 64."""
    end = tokenizer.token_to_id(END)
    return WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(),
        num_mel_bins=80,
        d_model=128,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_source_positions=1500,
        max_target_positions=448,
        decoder_start_token_id=tokenizer.token_to_id(START),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        begin_suppress_tokens=_begin_suppressed(tokenizer),
        suppress_tokens=_suppressed(tokenizer),
        dropout=0.0,
    )


def write_checkpoint(folder: Path, model: WhisperForConditionalGeneration, tokenizer_folder: Path, heads: Heads) -> None:
    """Write every file of the hub's layout into a new or existing folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_folder.iterdir():
        shutil.copyfile(file, folder / file.name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "proj_out.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "dtype": "float32",
        "num_hidden_layers": model.config.encoder_layers,
    }
    _write_json(folder / "config.json", model.config.to_diff_dict() | config)
    _write_json(folder / "generation_config.json", _generation_config(tokenizer, heads))
    _write_json(folder / "preprocessor_config.json", _PREPROCESSOR)
    spelling = checkpoint_path() / "normalizer.json"
    if spelling != folder / spelling.name:
        shutil.copyfile(spelling, folder / spelling.name)


def write_tokenizer_once(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder, trained first where the folder has none."""
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


_PREPROCESSOR: dict[str, Any] = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 80,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480_000,
    "nb_max_frames": 3_000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "WhisperProcessor",
    "return_attention_mask": False,
    "sampling_rate": 16_000,
}


def _generation_config(tokenizer: Tokenizer, heads: Heads) -> dict[str, Any]:
    ids = tokenizer.token_to_id
    return {
        "alignment_heads": [list(head) for head in heads],
        "begin_suppress_tokens": _begin_suppressed(tokenizer),
        "bos_token_id": ids(END),
        "decoder_start_token_id": ids(START),
        "eos_token_id": ids(END),
        "is_multilingual": True,
        "lang_to_id": {token: ids(token) for token in LANGUAGE_TOKENS},
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "no_timestamps_token_id": ids(NO_TIMESTAMPS),
        "pad_token_id": ids(END),
        "prev_sot_token_id": ids(PREVIOUS),
        "return_timestamps": False,
        "suppress_tokens": _suppressed(tokenizer),
        "task_to_id": {"transcribe": ids(TRANSCRIBE), "translate": ids(TRANSLATE)},
    }


def _begin_suppressed(tokenizer: Tokenizer) -> list[int | None]:
    """Return what a text cannot begin with: a lone space.

    Whisper also forbids the end of text there, and so has to say something about silence; this
    model has learned to say nothing.
    """
    return [tokenizer.token_to_id(SPACE)]


def _suppressed(tokenizer: Tokenizer) -> list[int | None]:
    never = (START, TRANSLATE, TRANSCRIBE, LANGUAGE_MODEL, PREVIOUS, NO_SPEECH)
    return [*non_speech_ids(tokenizer), *map(tokenizer.token_to_id, never)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
