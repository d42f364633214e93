"""The stages of the reference: transformers' own model, watched by hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from asr_core.audio import SAMPLE_RATE
from asr_core.checkpoint import Checkpoint
from runners._stages import STATES, Array, Recorder, Stepped, Values
from runners.pytorch import PyTorchRunner, State


class Runner(PyTorchRunner):
    """The runner over a model with hooks."""

    def __init__(self, checkpoint: Checkpoint, threads: int, recorder: Recorder) -> None:
        super().__init__(checkpoint, threads)
        encoder, decoder = self.model.model.encoder, self.model.model.decoder

        # What a block's norm reads is what the block before has written.
        def reads(module: Any, stage: str) -> None:
            module.register_forward_pre_hook(_keep(recorder, stage))

        def makes(module: Any, stage: str) -> None:
            module.register_forward_hook(_keep(recorder, stage))

        reads(encoder.layers[0].self_attn_layer_norm, "encoder.stem")
        for i, layer in enumerate(encoder.layers):
            reads(layer.final_layer_norm, f"encoder.{i}.attention")
            makes(layer, f"encoder.{i}.mlp")
        makes(encoder.layer_norm, STATES)
        reads(decoder.layers[0].self_attn_layer_norm, "decoder.embedding")
        for i, layer in enumerate(decoder.layers):
            reads(layer.encoder_attn_layer_norm, f"decoder.{i}.attention")
            reads(layer.final_layer_norm, f"decoder.{i}.cross")
            makes(layer, f"decoder.{i}.mlp")

    def cross_of(self, state: State) -> Values:
        """Cross-attention K and V [H, F, E] by stage, from transformers' cache."""
        found: Values = {}
        for i, layer in enumerate(state.cache.cross_attention_cache.layers):
            found |= {f"cross.{i}.keys": layer.keys[0].numpy(), f"cross.{i}.values": layer.values[0].numpy()}
        return found


def _keep(recorder: Recorder, stage: str) -> Callable[..., None]:
    """A hook before or after a module's forward pass: the last of its arguments is what to keep, or a tuple of it."""

    def hook(*given: Any) -> None:
        value = given[-1]
        tensor: torch.Tensor = value[0] if isinstance(value, tuple) else value
        recorder.add(stage, np.asarray(tensor.detach()))

    return hook


def open(path: Path, threads: int) -> Stepped:
    """Open a checkpoint folder."""
    recorder = Recorder()
    return Stepped(Runner(Checkpoint.open(path), threads, recorder), recorder)


def features(samples: Array, n_mels: int, folder: Path | None = None) -> Array:
    """One window's log-mel by transformers, [n_mels, 3000], with the settings of ``folder`` or with Whisper's."""
    extractor = (
        WhisperFeatureExtractor(feature_size=n_mels)
        if folder is None
        else WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    )
    mel: Array = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0].astype(np.float32)
    return mel
