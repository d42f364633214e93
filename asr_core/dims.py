"""Sizes of a Whisper model, and the tensors that a model of these sizes has."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

HEAD = "proj_out.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


class Frozen(BaseModel):
    """Base of the validated value types that cross a boundary."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Dims(Frozen):
    """Sizes of a Whisper model."""

    n_mels: int
    n_audio_ctx: int
    n_text_ctx: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_ffn: int
    decoder_ffn: int
    vocab: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Dims:
        """Read the sizes from a Hugging Face ``config.json``."""
        return cls(
            n_mels=config["num_mel_bins"],
            n_audio_ctx=config["max_source_positions"],
            n_text_ctx=config["max_target_positions"],
            d_model=config["d_model"],
            encoder_layers=config["encoder_layers"],
            decoder_layers=config["decoder_layers"],
            encoder_heads=config["encoder_attention_heads"],
            decoder_heads=config["decoder_attention_heads"],
            encoder_ffn=config["encoder_ffn_dim"],
            decoder_ffn=config["decoder_ffn_dim"],
            vocab=config["vocab_size"],
        )

    @property
    def head_dim(self) -> int:
        """Width of one decoder attention head."""
        return self.d_model // self.decoder_heads


def expected_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Whisper model of these sizes (the tied head left out)."""
    d = dims.d_model
    shapes: dict[str, tuple[int, ...]] = {
        "model.encoder.conv1.weight": (d, dims.n_mels, 3),
        "model.encoder.conv1.bias": (d,),
        "model.encoder.conv2.weight": (d, d, 3),
        "model.encoder.conv2.bias": (d,),
        "model.encoder.embed_positions.weight": (dims.n_audio_ctx, d),
        "model.decoder.embed_tokens.weight": (dims.vocab, d),
        "model.decoder.embed_positions.weight": (dims.n_text_ctx, d),
        **_norm("model.encoder.layer_norm", d),
        **_norm("model.decoder.layer_norm", d),
    }
    for i in range(dims.encoder_layers):
        shapes |= _layer(f"model.encoder.layers.{i}", ("self_attn",), d, dims.encoder_ffn)
    for i in range(dims.decoder_layers):
        shapes |= _layer(f"model.decoder.layers.{i}", ("self_attn", "encoder_attn"), d, dims.decoder_ffn)
    return shapes


def _norm(name: str, d: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def _layer(prefix: str, attentions: tuple[str, ...], d: int, ffn: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.fc1.weight": (ffn, d),
        f"{prefix}.fc1.bias": (ffn,),
        f"{prefix}.fc2.weight": (d, ffn),
        f"{prefix}.fc2.bias": (d,),
        **_norm(f"{prefix}.final_layer_norm", d),
    }
    for attention in attentions:
        shapes |= _norm(f"{prefix}.{attention}_layer_norm", d)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{prefix}.{attention}.{projection}.weight"] = (d, d)
            if projection != "k_proj":
                shapes[f"{prefix}.{attention}.{projection}.bias"] = (d,)
    return shapes
