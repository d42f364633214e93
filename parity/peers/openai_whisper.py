"""openai-whisper over the checkpoint's weights, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PEER = "openai-whisper"
OPENS = "checkpoint"
PRECISIONS = ("fp32",)
ENVIRONMENT = "ASR_EXPORT_PEERS_PYTHON"
WINDOW = 480_000  # samples
VOCABULARIES = (51_864, 51_865, 51_866)
# Hugging Face's names, in the order of replacing, and openai's.
RENAMED = {
    "model.": "",
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


def open(folder: Path, precision: str, threads: int, scratch: Path) -> Any:
    """Its model and its greedy decoding; its tokens are OpenAI's, so a checkpoint with others is not for it."""
    import torch
    import whisper
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["vocab_size"] not in VOCABULARIES:
        raise ValueError("it knows OpenAI's vocabularies only")
    torch.set_num_threads(threads)
    model = whisper.model.Whisper(
        whisper.model.ModelDimensions(
            config["num_mel_bins"], config["max_source_positions"], config["d_model"], config["encoder_attention_heads"],
            config["encoder_layers"], config["vocab_size"], config["max_target_positions"], config["d_model"],
            config["decoder_attention_heads"], config["decoder_layers"],
        )
    )  # fmt: skip
    weights = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    renamed = {_renamed(name): tensor for part in weights for name, tensor in part.items() if name != "proj_out.weight"}
    model.load_state_dict(renamed)
    model.eval()
    end = whisper.tokenizer.get_tokenizer(multilingual=model.is_multilingual, num_languages=model.num_languages).eot

    def hear(samples: Any, language: str, tokens: int | None) -> tuple[str, int]:
        mel = whisper.log_mel_spectrogram(np.pad(samples, (0, WINDOW - len(samples))), model.dims.n_mels)
        # -1: its own list of what is not spoken.
        forced = {"sample_len": tokens, "suppress_tokens": [-1, end]} if tokens else {}
        options = whisper.DecodingOptions(language=language, without_timestamps=True, fp16=False, **forced)
        heard = whisper.decode(model, mel, options)
        return heard.text.strip(), len(heard.tokens)

    return hear


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name
