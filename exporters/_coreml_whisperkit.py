"""Core ML as WhisperKit loads it: ``MelSpectrogram``, ``AudioEncoder`` and ``TextDecoder``, each an ``.mlpackage``.

Names and shapes are those of whisperkittools' models and of WhisperKit's ``Models.swift``. The decoder takes one token, projects
the encoder's states for the cross-attention at every step, and returns its new K and V; the host writes them into the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core import audio, registry
from asr_core.artifact import TensorSpec
from asr_core.checkpoint import Checkpoint
from asr_core.errors import ExportError
from asr_core.folder import small_files
from asr_core.isolate import Progress
from exporters.coreml import NEIGHBOURS, Traceable, load_weights, package, problems

if TYPE_CHECKING:
    from torch import Tensor

    from asr_core.dims import Dims

# WhisperKit's caches and logits are float16.
PRECISIONS = ("fp16", "int8")
CARRIES = dict.fromkeys(PRECISIONS, ("factors", "heads"))
FLOOR = 1e-10  # of mel energies before the logarithm, as in openai-whisper
LOG10 = 2.302585092994046
INTEGERS = ("input_ids", "cache_length")


def export(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> list[TensorSpec]:
    """Write the three packages and the configuration; returns the packages' inputs and outputs."""
    reasons = problems(checkpoint, precision)
    if reasons:
        raise ExportError(f"Core ML cannot hold {checkpoint.name} as {precision}:\n" + "\n".join(f"  - {r}" for r in reasons))
    registry.import_alone("coremltools.optimize.coreml", without=NEIGHBOURS)
    specs: list[TensorSpec] = []
    # The spectrogram spans more than float16 does, and has no weights to compress.
    for name, describe, weights in (
        ("MelSpectrogram", _mel, "fp32"),
        ("AudioEncoder", _encoder, precision),
        ("TextDecoder", _decoder, precision),
    ):
        progress(name)
        specs += package(name, describe, checkpoint, folder, weights, progress)
    for file in small_files(checkpoint.path):
        (folder / file.name).write_bytes(file.read_bytes())
    return specs


def _mel(checkpoint: Checkpoint) -> Traceable:
    """The spectrogram of a window's samples: the Fourier transform of every frame as one convolution."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    dims = checkpoint.dims
    angles = 2 * np.pi / audio.N_FFT * np.outer(np.arange(audio.N_FFT // 2 + 1), np.arange(audio.N_FFT))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi / audio.N_FFT * np.arange(audio.N_FFT))
    half = audio.N_FFT // 2

    class Mel(nn.Module):
        """Samples float32 [480000] → [1, n_mels, 1, 3000]."""

        waves: Tensor
        filters: Tensor
        before: Tensor
        after: Tensor

        def __init__(self) -> None:
            super().__init__()
            waves = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)]) * hann).float()[:, None]
            self.register_buffer("waves", waves)
            self.register_buffer("filters", torch.from_numpy(audio.mel_filters(dims.n_mels)))
            # Reflection without the edge, before the first sample and after the last.
            self.register_buffer("before", torch.arange(half, 0, -1, dtype=torch.int32))
            last = audio.WINDOW_SAMPLES - 2
            self.register_buffer("after", torch.arange(last, last - half, -1, dtype=torch.int32))

        def forward(self, samples: Tensor) -> Tensor:
            padded = torch.cat([samples[self.before], samples, samples[self.after]])
            cosines, sines = F.conv1d(padded[None, None], self.waves, stride=audio.HOP).split(half + 1, 1)
            power = (cosines * cosines + sines * sines)[:, :, : audio.WINDOW_FRAMES]
            log = torch.log((self.filters @ power).clamp_min(FLOOR)) / LOG10
            log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8.0)
            return ((log + 4.0) / 4.0)[:, :, None]

    return Traceable(
        module=Mel(),
        inputs={"audio": (audio.WINDOW_SAMPLES,)},
        outputs={"melspectrogram_features": (1, dims.n_mels, 1, audio.WINDOW_FRAMES)},
    )


def _encoder(checkpoint: Checkpoint) -> Traceable:
    import torch
    from torch import nn

    from asr_core import graph

    dims = checkpoint.dims
    with torch.device("meta"):
        encoder = graph.encoder(checkpoint)
    load_weights(encoder, "model.encoder.", checkpoint)

    class AudioEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, mel: Tensor) -> Tensor:
            states: Tensor = self.encoder(mel.squeeze(2))
            return states.transpose(1, 2).unsqueeze(2)

    return Traceable(
        module=AudioEncoder(),
        inputs={"melspectrogram_features": (1, dims.n_mels, 1, 2 * dims.n_audio_ctx)},
        outputs={"encoder_output_embeds": (1, dims.d_model, 1, dims.n_audio_ctx)},
        float32=("melspectrogram_features",),
    )


def _decoder(checkpoint: Checkpoint) -> Traceable:
    """The step; with the mean attention of the alignment heads, from which WhisperKit makes word timestamps."""
    import torch
    from torch import nn

    from asr_core import graph

    dims = checkpoint.dims
    heads = checkpoint.alignment_heads
    with torch.device("meta"):
        decoder = graph.decoder(checkpoint)
    load_weights(decoder, "model.decoder.", checkpoint)

    class TextDecoder(nn.Module):
        """One token; ``written`` is 1 at its place in the cache, ``padding`` is -10000 beyond it."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(
            self, token: Tensor, position: Tensor, keys: Tensor, values: Tensor, written: Tensor, states: Tensor, padding: Tensor
        ) -> tuple[Tensor, ...]:
            encoded = states.squeeze(2).transpose(1, 2)
            x = decoder.embed(token[None], position)
            made: list[tuple[Tensor, Tensor]] = []
            weights: list[Tensor] = []
            caches = zip(_rows(keys, dims), _rows(values, dims), strict=True)
            for layer, (k_past, v_past) in zip(decoder.blocks, caches, strict=True):
                attn, h = layer.self_attn, layer.self_attn_layer_norm(x)
                new = attn.k_proj(h), attn.v_proj(h)
                here = written[:, :, None]
                k, v = (old * (1 - here) + row * here for old, row in zip((k_past, v_past), new, strict=True))
                k, v = (graph.split_heads(rows, attn.heads) for rows in (k, v))
                x = x + attn.output(graph.attend(attn.query(h), k, v, padding[:, None, None]))
                cross_k, cross_v = layer.encoder_attn.keys_values(encoded)
                q = layer.encoder_attn.query(layer.encoder_attn_layer_norm(x))
                attention = (q @ cross_k.transpose(-1, -2)).softmax(-1)
                x = x + layer.encoder_attn.output(attention @ cross_v)
                x = x + layer.fc2(torch.nn.functional.gelu(layer.fc1(layer.final_layer_norm(x))))
                made.append(new)
                weights.append(attention)
            logits = torch.nn.functional.linear(decoder.layer_norm(x), decoder.embed_tokens.weight)
            updates = (torch.cat(rows, -1).transpose(1, 2)[:, :, None] for rows in zip(*made, strict=True))
            chosen = [weights[layer][:, head, 0] for layer, head in heads]
            return (logits, *updates, torch.cat(chosen).mean(0, keepdim=True))

    width, updates = dims.d_model * dims.decoder_layers, ("key_cache_updates", "value_cache_updates")
    cache = (1, width, 1, dims.n_text_ctx)
    return Traceable(
        module=TextDecoder(),
        inputs={
            "input_ids": (1,),
            "cache_length": (1,),
            "key_cache": cache,
            "value_cache": cache,
            "kv_cache_update_mask": (1, dims.n_text_ctx),
            "encoder_output_embeds": (1, dims.d_model, 1, dims.n_audio_ctx),
            "decoder_key_padding_mask": (1, dims.n_text_ctx),
        },
        outputs={
            "logits": (1, 1, dims.vocab),
            **dict.fromkeys(updates, (1, width, 1, 1)),
            "alignment_heads_weights": (1, dims.n_audio_ctx),
        },
        integers=INTEGERS,
    )


def _rows(cache: Tensor, dims: Dims) -> Any:
    """[1, L · D, 1, 448] → per layer [1, 448, D]."""
    return cache.squeeze(2).transpose(1, 2).split(dims.d_model, -1)
