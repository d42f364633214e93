"""openai-whisper over one of our checkpoints: the same weights and vocabulary, none of our code."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
import whisper.decoding
from tokenizers.pre_tokenizers import ByteLevel
from whisper.decoding import DecodingOptions, DecodingResult, MaximumLikelihoodRanker
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import Tokenizer, get_encoding

from asr_core.checkpoint import Checkpoint

# Hugging Face's names, in the order of replacing, and openai's.
RENAMED = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "embed_tokens": "token_embedding",
    "encoder.layer_norm": "encoder.ln_post",
    "decoder.layer_norm": "decoder.ln",
    ".layers.": ".blocks.",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "self_attn_layer_norm": "attn_ln",
    "final_layer_norm": "mlp_ln",
    "encoder_attn": "cross_attn",
    "self_attn": "attn",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
}


class _Whisper(Whisper):
    """openai's model, which infers from the size of the vocabulary what a checkpoint says."""

    is_multilingual = True
    num_languages = 99


def model(checkpoint: Checkpoint, heads: list[tuple[int, int]]) -> Whisper:
    """openai's model with the checkpoint's weights; ``heads`` are the alignment heads."""
    dims = checkpoint.dims
    model = _Whisper(
        ModelDimensions(
            dims.n_mels,
            dims.n_audio_ctx,
            dims.d_model,
            dims.encoder_heads,
            dims.encoder_layers,
            dims.vocab,
            dims.n_text_ctx,
            dims.d_model,
            dims.decoder_heads,
            dims.decoder_layers,
        )
    )
    model.is_multilingual, model.num_languages = checkpoint.multilingual, len(checkpoint.generation.get("lang_to_id") or ())
    model.load_state_dict({_renamed(name): tensor for name, tensor in checkpoint.state_dict().items()})
    mask = torch.zeros(dims.decoder_layers, dims.decoder_heads, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return model.eval()


@contextmanager
def policy_of(checkpoint: Checkpoint) -> Iterator[None]:
    """Whisper's decoding and transcribing with the checkpoint's vocabulary and its list of what cannot come first.

    Where openai-whisper divides by the length of an empty answer, which its own list excludes, it is taken for one long.
    """
    content = json.loads((checkpoint.path / "generation_config.json").read_text(encoding="utf-8"))
    begin = content.get("begin_suppress_tokens") or []

    def get_tokenizer(multilingual: bool, *, language: str | None = None, task: str | None = None, **_: int) -> Tokenizer:
        return tokenizer(checkpoint.path, *((language or "en", task or "transcribe") if multilingual else (None, None)))

    class Begin(whisper.decoding.SuppressBlank):
        def apply(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
            if tokens.shape[1] == self.sample_begin:
                logits[:, begin] = -np.inf

    class Ranker(MaximumLikelihoodRanker):
        def rank(self, tokens: list[list[torch.Tensor]], sum_logprobs: list[list[float]]) -> list[int]:
            if self.length_penalty is None:
                tokens = [[t if len(t) else torch.zeros(1) for t in group] for group in tokens]
            return super().rank(tokens, sum_logprobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whisper.decoding, "get_tokenizer", get_tokenizer)
        patch.setattr(import_module("whisper.transcribe"), "get_tokenizer", get_tokenizer)  # the package hides it
        patch.setattr(whisper.decoding, "SuppressBlank", Begin)
        patch.setattr(whisper.decoding, "MaximumLikelihoodRanker", Ranker)
        yield


def decode(checkpoint: Checkpoint, model: Whisper, windows: torch.Tensor, **options: Any) -> list[DecodingResult]:
    """Decode windows one by one with openai's own loop, by default in English, greedily, with the checkpoint's own lists.

    ``windows`` are mels [B, n_mels, 3000] or what the model's encoder made of them.
    """
    options = {"language": "en", "suppress_tokens": checkpoint.generation["suppress_tokens"], **options, "fp16": False}
    with policy_of(checkpoint):
        return [whisper.decoding.decode(model, window, DecodingOptions(**options)) for window in windows]


class Gaps:
    """How undecided openai's beam search was: of each window, the smallest gap between a candidate that it kept and one not.

    Gaps are in summed log-probability while searching, and in the ranker's score between the two best in the end.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.smallest: list[float] = []
        update, rank = whisper.decoding.BeamSearchDecoder.update, MaximumLikelihoodRanker.rank
        patch.setattr(whisper.decoding.BeamSearchDecoder, "update", lambda *args: self._seen(*args) or update(*args))
        patch.setattr(MaximumLikelihoodRanker, "rank", lambda *args: self._ranked(*args) or rank(*args))

    def _seen(self, beam: Any, tokens: torch.Tensor, logits: torch.Tensor, sums: torch.Tensor) -> None:
        if beam.finished_sequences is None:
            self.smallest.append(np.inf)
        rows = 1 if beam.finished_sequences is None else beam.beam_size  # all rows are the same one at first
        best = (logits.log_softmax(-1) + sums[:, None])[:rows]
        best[:, beam.eot] = -torch.inf
        found = best.flatten().topk(beam.beam_size + 1).values
        self.smallest[-1] = min(self.smallest[-1], float(found[-2] - found[-1]))

    def _ranked(self, ranker: Any, tokens: list[list[torch.Tensor]], sums: list[list[float]]) -> None:
        lengths = [max(len(found), 1) for found in tokens[0]]
        alpha = ranker.length_penalty
        scores = sorted(s / (n if alpha is None else ((5 + n) / 6) ** alpha) for s, n in zip(sums[0], lengths, strict=True))
        if len(scores) > 1:
            self.smallest[-1] = min(self.smallest[-1], scores[-1] - scores[-2])


def _renamed(name: str) -> str:
    name = name.removeprefix("model.")
    for theirs, openai in RENAMED.items():
        name = name.replace(theirs, openai)
    return name


def tokenizer(folder: Path, language: str | None = "en", task: str | None = "transcribe") -> Tokenizer:
    """openai's tokenizer over the folder's vocabulary; language and task None for an English-only model."""
    content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = {token: index for token, index in content["model"]["vocab"].items() if token not in special}
    pattern = get_encoding("gpt2")._pat_str
    encoding = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=_as_bytes(vocab), special_tokens=special)
    return Tokenizer(encoding, num_languages=100, language=language, task=task)


def _as_bytes(vocab: dict[str, int]) -> dict[bytes, int]:
    """A byte-level vocabulary as the bytes that it stands for: printable ones are themselves, the others shifted beyond 255."""
    shifted = sorted(char for char in ByteLevel.alphabet() if ord(char) > 255)
    printable = {ord(char): char for char in ByteLevel.alphabet() if ord(char) <= 255}
    rest = (byte for byte in range(256) if byte not in printable)
    byte_of = {char: byte for byte, char in printable.items()} | dict(zip(shifted, rest, strict=True))
    return {bytes(byte_of[char] for char in token): index for token, index in vocab.items()}


def transcribe(checkpoint: Checkpoint, model: Whisper, audio: np.ndarray, **options: Any) -> dict[str, Any]:
    """openai's ``transcribe()``, float32 samples [n] at 16 kHz, with the checkpoint's vocabulary: text, segments, language."""
    with policy_of(checkpoint):
        result: dict[str, Any] = import_module("whisper.transcribe").transcribe(model, audio, fp16=False, **options)
    return result
