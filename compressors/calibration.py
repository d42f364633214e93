"""Calibration data: what the inputs of linear layers look like, and which clips may show it.

A set of clips is halved: the first, third, fifth … calibrate, the others are held out to judge on. A checkpoint's record lists
the clips that it has seen, and measuring on one of them is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_core import audio
from asr_core.decode import DecodeOptions
from asr_core.errors import AudioError
from parity.data import Utterance

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

    from asr_core.checkpoint import Checkpoint
    from compressors.model import Model

CLIPS = 64  # a short clip gives only a dozen rows of the decoder's inputs, whose second moments are up to 5120 wide
LEAST_SECONDS = 10.0  # of sound, over all clips
SILENCE = 1e-3  # root mean square of 10 ms, of full scale 1 (-60 dB)
SAMPLES_PER_POSITION = 2 * audio.HOP  # of the encoder
# A window's padding together counts as this share of its sound. Short clips are mostly padding: with equal weights for every
# position, compression would spend its precision on silence.
PADDING = 0.05


# Told of the inputs [rows, K] of a linear layer for one window, and of how much each row counts, float32 [rows, 1].
Watcher = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Window:
    """One clip as a model takes it: mel float32 [1, n_mels, 3000], and tokens: the prompt, what the source heard, the end.

    ``clip`` is the SHA-256 of its samples; ``prompt`` counts the prompt's tokens, ``sound`` the encoder's positions before
    the padding.
    """

    clip: str
    mel: Tensor
    tokens: list[int]
    prompt: int
    sound: int

    def weights(self, positions: int) -> Tensor:
        """How much each encoder position counts, float32 [positions, 1]."""
        padding = positions - self.sound
        share = PADDING * self.sound / padding if padding > 0 else 1.0
        return torch.where(torch.arange(positions)[:, None] < self.sound, 1.0, min(1.0, share))


@dataclass(frozen=True)
class Moments:
    """What the inputs x [rows, K] of a linear layer were.

    ``second`` is float64 [K, K], the weighted mean of xᵀx; ``mean`` float64 [K], that of x; ``largest`` float32 [K] the
    largest magnitudes.
    """

    second: Tensor
    mean: Tensor
    largest: Tensor


def halves(utterances: Sequence[Utterance], clips: int = CLIPS) -> tuple[list[Utterance], list[Utterance]]:
    """Clips to calibrate on and clips to judge on, at most ``clips`` of each, spread evenly over the set."""

    def spread(half: Sequence[Utterance]) -> list[Utterance]:
        wanted = min(len(half), clips)
        return [half[i * len(half) // wanted] for i in range(wanted)]

    return spread(utterances[::2]), spread(utterances[1::2])


def windows(checkpoint: Checkpoint, utterances: Sequence[Utterance]) -> list[Window]:
    """The clips as a model takes them, each with the checkpoint's own greedy transcript."""
    from runners.base import open_runner

    runner = open_runner("pytorch", checkpoint.path, torch.get_num_threads())
    filters = audio.mel_filters(checkpoint.dims.n_mels)
    made = []
    for utterance in utterances:
        prompt = runner.tokens.prompt(utterance.language)
        samples = audio.load_audio(utterance.path)[: audio.WINDOW_SAMPLES]
        mel = audio.log_mel(samples, filters)[None]
        heard = runner.generate(mel, DecodeOptions(language=utterance.language))[0].tokens
        made.append(
            Window(
                clip=hashlib.sha256(samples.tobytes()).hexdigest(),
                mel=torch.from_numpy(mel),
                tokens=[*prompt, *heard, runner.tokens.end],
                prompt=len(prompt),
                sound=min(len(samples) // SAMPLES_PER_POSITION + 1, checkpoint.dims.n_audio_ctx),
            )
        )
    runner.close()
    return made


def check_sound(utterances: Sequence[Utterance]) -> None:
    """Raise :class:`AudioError` where clips are too short or too silent to calibrate on."""
    seconds = sum(_sounding(audio.load_audio(utterance.path)) for utterance in utterances)
    if seconds < LEAST_SECONDS:
        raise AudioError(
            f"the {len(utterances)} calibration clips hold {seconds:.1f} s of sound above -60 dB; at least "
            f"{LEAST_SECONDS:.0f} s are needed. Give more speech with --data."
        )


def _sounding(samples: NDArray[np.float32]) -> float:
    """Seconds that are not silence."""
    whole = len(samples) // audio.HOP
    power = np.square(samples[: whole * audio.HOP].reshape(whole, audio.HOP)).mean(1)
    return float((power > SILENCE**2).sum()) * audio.HOP / audio.SAMPLE_RATE


class Calibration:
    """The calibration windows of a run, and what a model computes on them.

    Windows are made when they are first asked for: a method that needs none costs none. Methods that train find the run's
    ``source`` here, a folder of their own in ``work``, and say in ``trained`` which clips they have heard.
    """

    def __init__(self, make: Callable[[], list[Window]], source: Checkpoint | None = None) -> None:
        self._make = make
        self.source = source
        self.work: Path | None = None
        self.trained: set[str] = set()
        self._windows: list[Window] | None = None
        self._moments: tuple[Model, dict[str, Moments]] | None = None

    @property
    def windows(self) -> list[Window]:
        """The clips."""
        if self._windows is None:
            self._windows = self._make()
        return self._windows

    @property
    def seen(self) -> list[str]:
        """The clips that any method has looked at, by their hashes."""
        return sorted({window.clip for window in self._windows or []} | self.trained)

    def moments(self, model: Model, names: Sequence[str] = ()) -> dict[str, Moments]:
        """Of the inputs of some linear layers, or all, by their weights, when the model hears the windows."""
        if names:
            return _moments(model, self.windows, names)
        if self._moments is None or self._moments[0] is not model:
            self._moments = (model, _moments(model, self.windows, [name for block in model.blocks for name in block]))
        return self._moments[1]


def logits(module: WhisperForConditionalGeneration, window: Window) -> Tensor:
    """Teacher-forced logits float32 [T, vocab] at the positions of the text and its end."""
    tokens = torch.tensor([window.tokens[:-1]])
    with torch.inference_mode():
        out: Tensor = module(input_features=window.mel, decoder_input_ids=tokens, use_cache=False).logits
    return out[0, window.prompt - 1 :]


def _moments(model: Model, heard: Sequence[Window], names: Sequence[str]) -> dict[str, Moments]:
    collectors = {name: _Collector(model.tensors[name].shape[1]) for name in names}
    watch(model, heard, collectors)
    return {name: collector.moments() for name, collector in collectors.items()}


def watch(model: Model, heard: Sequence[Window], watchers: Mapping[str, Watcher]) -> None:
    """Let the model hear the windows and tell each watcher the inputs of the linear layer whose weight it is listed under."""
    module = model.module()
    counted = torch.empty(0), torch.empty(0)

    def tell(name: str, x: Tensor) -> None:
        watchers[name](x.flatten(0, -2), counted[not reads_audio(name)])

    with ExitStack() as stack:
        for name in watchers:
            layer = module.get_submodule(name.removesuffix(".weight"))
            stack.enter_context(layer.register_forward_pre_hook(lambda _, given, name=name: tell(name, *given)))
        for window in heard:
            counted = window.weights(model.dims.n_audio_ctx), torch.ones(len(window.tokens) - 1, 1)
            logits(module, window)


def reads_audio(name: str) -> bool:
    """Whether a linear layer's inputs are audio positions: the encoder's, and the keys and values of cross-attention."""
    return name.startswith("model.encoder.") or name.endswith(("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight"))


class _Collector:
    """Adds up one layer's inputs."""

    def __init__(self, width: int) -> None:
        self.rows = 0.0
        self.second = torch.zeros(width, width, dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.largest = torch.zeros(width)

    def __call__(self, x: Tensor, weights: Tensor) -> None:
        weighted = x * weights
        self.rows += float(weights.sum())
        self.second += weighted.T @ x
        self.total += weighted.sum(0)
        self.largest = torch.maximum(self.largest, x.abs().amax(0))

    def moments(self) -> Moments:
        return Moments(self.second / self.rows, self.total / self.rows, self.largest)
