"""OpenAI's own checkpoint files (``tiny.pt``): sizes and weights, renamed into a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core import conversions, generation, pickled, vocabulary
from asr_core import folder as layout
from asr_core.errors import CheckpointError
from asr_core.tokens import load_tokenizer

if TYPE_CHECKING:
    import torch

SIZES = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer", "n_vocab", "n_text_ctx", "n_text_state",
         "n_text_head", "n_text_layer")  # fmt: skip
# Buffers that openai-whisper rebuilds when it makes a model; some writers save them all the same.
HEADS = "alignment_heads"
NOT_WEIGHTS = ("decoder.mask", HEADS)
# Longer names first: ``cross_attn_ln`` is not ``cross_attn``'s.
RENAMED = (
    (".blocks.", ".layers."),
    (".cross_attn_ln.", ".encoder_attn_layer_norm."),
    (".attn_ln.", ".self_attn_layer_norm."),
    (".mlp_ln.", ".final_layer_norm."),
    (".mlp.0.", ".fc1."),
    (".mlp.2.", ".fc2."),
    (".cross_attn.", ".encoder_attn."),
    (".attn.", ".self_attn."),
    (".query.", ".q_proj."),
    (".key.", ".k_proj."),
    (".value.", ".v_proj."),
    (".out.", ".out_proj."),
    ("encoder.ln_post.", "encoder.layer_norm."),
    ("decoder.ln.", "decoder.layer_norm."),
    ("decoder.token_embedding.", "decoder.embed_tokens."),
)
# A vocabulary's tokens that are neither languages nor the English vocabulary's shorter text.
OTHER_TOKENS = 51765
FIRST_MULTILINGUAL = 51865  # a vocabulary this long has languages
# Cross-attention heads that follow the audio, by OpenAI's names of its models (openai-whisper, _ALIGNMENT_HEADS), and the
# sizes that tell the models: layers and heads of the decoder, mel bands, size of the vocabulary.
ALIGNMENT_HEADS = {
    "tiny.en": ((4, 6, 80, 51864), "1.0 2.0 2.5 3.0 3.1 3.2 3.3 3.4"),
    "tiny": ((4, 6, 80, 51865), "2.2 3.0 3.2 3.3 3.4 3.5"),
    "base.en": ((6, 8, 80, 51864), "3.3 4.7 5.1 5.5 5.7"),
    "base": ((6, 8, 80, 51865), "3.1 4.2 4.3 4.7 5.1 5.2 5.4 5.6"),
    "small.en": (
        (12, 12, 80, 51864),
        "6.6 7.0 7.3 7.8 8.2 8.5 8.7 9.0 9.4 9.8 9.10 10.0 10.1 10.2 10.3 10.6 10.11 11.2 11.4",
    ),
    "small": ((12, 12, 80, 51865), "5.3 5.9 8.0 8.4 8.7 8.8 9.0 9.7 9.9 10.5"),
    "medium.en": (
        (24, 16, 80, 51864),
        "11.4 14.1 14.12 14.14 15.4 16.0 16.4 16.9 17.12 17.14 18.7 18.10 18.15 20.0 20.3 20.9 20.14 21.12",
    ),
    "medium": ((24, 16, 80, 51865), "13.15 15.4 15.15 16.1 20.0 23.4"),
    "large-v1": ((32, 20, 80, 51865), "9.19 11.2 11.4 11.17 22.7 22.11 22.17 23.2 23.15"),
    "large-v2": (
        (32, 20, 80, 51865),
        "10.12 13.17 16.11 16.12 16.13 17.15 17.16 18.4 18.11 18.19 19.11 21.2 21.3 22.3 22.9 22.12 23.5 23.7 23.13 25.5 26.1 26.12 27.15",  # noqa: E501
    ),
    "large-v3": ((32, 20, 128, 51866), "7.0 10.17 12.18 13.12 16.1 17.14 19.11 21.4 24.1 25.6"),
    "large-v3-turbo": ((4, 20, 128, 51866), "2.4 2.11 3.3 3.6 3.11 3.14"),
}


def convert(file: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder of a ``.pt`` file, from the cache where it was converted before, and remarks on it.

    The tokenizer is the ``tokenizer.json`` beside the file or openai-whisper's own vocabulary. Raises
    :class:`CheckpointError` where the file is damaged, holds code, is no Whisper, or has no tokenizer.
    """
    beside = [found for found in layout.small_files(file.parent) if found.name in layout.TOKENIZER_FILES]
    given = any(found.name == layout.TOKENIZER for found in beside)
    whisper = None if given else vocabulary.assets()
    if not given and whisper is None:
        raise CheckpointError(
            f"{file} comes without a tokenizer: pip install openai-whisper (which ships OpenAI's vocabularies), or put the "
            f"model's {layout.TOKENIZER} beside the file."
        )
    inputs = {"file": layout.fingerprint([file]), "name": file.stem, "tokenizer": layout.fingerprint(beside) if given else ""}

    def write(folder: Path) -> list[str]:
        return _write(file, beside if given else [], whisper, folder)

    return conversions.converted(file.stem, inputs, write)


def alignment_heads(name: str, dims: dict[str, int]) -> list[list[int]] | None:
    """The heads of the OpenAI model of this name or, whatever the file's name, of these sizes; None where there is none."""
    sizes = (dims["n_text_layer"], dims["n_text_head"], dims["n_mels"], dims["n_vocab"])
    fitting = {model: heads for model, (own, heads) in ALIGNMENT_HEADS.items() if own == sizes}
    if not fitting:
        return None
    # The two oldest large models have the same sizes; the later one has been the one called "large".
    heads = fitting.get(name) or list(fitting.values())[-1]
    return [[int(number) for number in pair.split(".")] for pair in heads.split()]


def renamed(name: str) -> str:
    """Hugging Face's name of one of OpenAI's tensors."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    if name.endswith(".positional_embedding"):
        name = name.replace(".positional_embedding", ".embed_positions.weight")
    return f"model.{name}"


def _write(file: Path, beside: list[Path], whisper: Path | None, folder: Path) -> list[str]:
    dims, saved = _read(file)
    weights = {name: tensor for name, tensor in saved.items() if name not in NOT_WEIGHTS}
    english = dims["n_vocab"] < FIRST_MULTILINGUAL
    for found in beside:
        shutil.copyfile(found, folder / found.name)
    if whisper is not None:
        known = dims["n_vocab"] - OTHER_TOKENS - (0 if english else 1)
        vocabulary.write_tokenizer(whisper, folder, english=english, known=known)
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.get_vocab_size()
    if tokens > dims["n_vocab"] or (whisper is not None and tokens != dims["n_vocab"]):
        whose = f"beside {file}" if whisper is None else "of openai-whisper"
        raise CheckpointError(f"{file} has a vocabulary of {dims['n_vocab']} tokens; the tokenizer {whose} has {tokens}.")
    whole, _ = generation.complete({}, {}, tokenizer)
    heads = _saved_heads(saved) or alignment_heads(file.stem, dims)
    if heads is not None:
        whole["alignment_heads"] = heads
    config = _config(dims, whole, str(next(iter(weights.values())).dtype).removeprefix("torch."))
    layout.write_json(folder / layout.GENERATION, whole)
    layout.write_json(folder / layout.CONFIG, config)
    pickled.save({renamed(name): tensor for name, tensor in weights.items()}, folder / layout.SINGLE)
    return [] if heads is not None else [f"{file.name} has the sizes of none of OpenAI's models: its alignment heads are unknown"]


def _read(file: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    import torch

    loaded = pickled.load(file)
    if not isinstance(loaded, dict) or not {"dims", "model_state_dict"} <= loaded.keys():
        found = f": it has {', '.join(map(str, list(loaded)[:4]))}" if isinstance(loaded, dict) and loaded else ""
        raise CheckpointError(f"{file} is not an OpenAI Whisper checkpoint (one has 'dims' and 'model_state_dict'){found}.")
    dims, weights = loaded["dims"], loaded["model_state_dict"]
    missing = [name for name in SIZES if not isinstance(dims.get(name), int)]
    if missing:
        raise CheckpointError(f"{file} is not an OpenAI Whisper checkpoint: its dims lack {', '.join(missing)}.")
    if dims["n_audio_state"] != dims["n_text_state"]:
        raise CheckpointError(f"{file} is no Whisper: encoder and decoder differ in width.")
    if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()) or not weights.keys() - set(NOT_WEIGHTS):
        raise CheckpointError(f"{file} holds no weights (tensors by name).")
    return dims, weights


def _saved_heads(weights: dict[str, torch.Tensor]) -> list[list[int]]:
    """The heads that a file carries as openai-whisper keeps them in memory: a (sparse) mask of layers × heads."""
    heads: list[list[int]] = weights[HEADS].to_dense().nonzero().tolist() if HEADS in weights else []
    return heads


def _config(dims: dict[str, int], ids: dict[str, Any], dtype: str) -> dict[str, Any]:
    width = dims["n_text_state"]
    return {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "num_mel_bins": dims["n_mels"],
        "max_source_positions": dims["n_audio_ctx"],
        "max_target_positions": dims["n_text_ctx"],
        "d_model": width,
        "encoder_layers": dims["n_audio_layer"],
        "decoder_layers": dims["n_text_layer"],
        "encoder_attention_heads": dims["n_audio_head"],
        "decoder_attention_heads": dims["n_text_head"],
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "vocab_size": dims["n_vocab"],
        **{key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")},
        **{key: ids[key] for key in ("suppress_tokens", "begin_suppress_tokens")},
    }
