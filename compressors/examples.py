"""What models are trained on: the recipe's synthesised windows, or the clips of a NeMo manifest or LibriSpeech folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from asr_core import audio
from asr_core.errors import AudioError, UsageError
from asr_core.tokens import TokenIds, load_tokenizer
from parity import data

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint

IGNORED = -100  # a label without loss
WINDOWS = "windows"
MELS, SCRIPTS = "mels.npy", "scripts.json"
SYNTHESISED_MELS = 80


@dataclass(frozen=True)
class Example:
    """A window: mel float32 [n_mels, 3000], the decoder's inputs, and a label for each input (IGNORED: no loss).

    ``clip`` is the SHA-256 of a real clip's samples.
    """

    mel: Tensor
    inputs: list[int]
    labels: list[int]
    clip: str | None = None

    @property
    def prompt(self) -> list[int]:
        """The inputs up to the first text label."""
        return self.inputs[: self.text]

    @property
    def text(self) -> int:
        """How many inputs the prompt has: the text's first label is the last prompt token's."""
        last = max(i for i, label in enumerate(self.labels) if label == IGNORED) if IGNORED in self.labels else -1
        return last + 2


@dataclass(frozen=True)
class Batch:
    """Examples side by side: mel [B, n_mels, 3000], inputs and labels int64 [B, T]; padding has no loss.

    ``states`` [B, positions, d] are the encoder's, where that is not trained and they are known.
    """

    mel: Tensor
    inputs: Tensor
    labels: Tensor
    states: Tensor | None = None

    @property
    def heard(self) -> dict[str, Any]:
        """What transformers' model is given beside the decoder's inputs."""
        return {"input_features": self.mel} if self.states is None else {"encoder_outputs": (self.states,)}

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        states = None if self.states is None else self.states.to(device)
        return Batch(self.mel.to(device), self.inputs.to(device), self.labels.to(device), states)


class Examples(Protocol):
    """Examples by index; ``digest`` names their content."""

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def collate(examples: Sequence[Example], end: int) -> Batch:
    """Put examples side by side, padded with the end token."""
    width = max(len(example.inputs) for example in examples)
    return Batch(
        torch.stack([example.mel for example in examples]),
        torch.tensor([[*e.inputs, *[end] * (width - len(e.inputs))] for e in examples]),
        torch.tensor([[*e.labels, *[IGNORED] * (width - len(e.labels))] for e in examples]),
    )


def order(count: int, step: int, batch: int, seed: int) -> list[int]:
    """The indices of a step's batch: every example comes up once before any does again, in an order of each round's own."""
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, within = divmod(place, count)
        shuffled = list(range(count))
        Random(f"{seed}-{epoch}").shuffle(shuffled)  # noqa: S311 - not a secret
        chosen.append(shuffled[within])
    return chosen


def gather(checkpoint: Checkpoint, source: Path | None, windows: int, seed: int, work: Path) -> Examples:
    """The examples of a training: the clips of ``source``, or ``windows`` synthesised ones, kept below ``work``."""
    if source is None:
        return Synthesised.make(checkpoint, windows, seed, work / WINDOWS)
    return Clips(checkpoint, data.read(source))


class Synthesised:
    """The carried reference's own kind of windows, of its curriculum's last stage: 30 s of synthesised sentences."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.digest = digest
        self._mels = np.load(folder / MELS, mmap_mode="r")
        self._scripts: list[dict[str, list[int]]] = json.loads((folder / SCRIPTS).read_text(encoding="utf-8"))

    @classmethod
    def make(cls, checkpoint: Checkpoint, windows: int, seed: int, folder: Path) -> Synthesised:
        """Synthesise the windows, or find them in ``folder``, where they get their name only once all are there."""
        if checkpoint.dims.n_mels != SYNTHESISED_MELS:
            raise UsageError(
                f"synthesised windows have {SYNTHESISED_MELS} mel bins, this model wants {checkpoint.dims.n_mels}: "
                "give clips of your own with -p data=FILE."
            )
        named = folder / f"{windows}-{seed}"
        if not named.exists():
            partial = folder / f"{windows}-{seed}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _synthesise(checkpoint.path / "tokenizer.json", windows, seed, partial)
            partial.rename(named)
        return cls(named, f"synthesised-{windows}-{seed}")

    def __len__(self) -> int:
        return len(self._scripts)

    def __getitem__(self, index: int) -> Example:
        script = self._scripts[index]
        return Example(torch.from_numpy(self._mels[index].astype(np.float32)), script["inputs"], script["labels"])


class _LastStage:
    """The progress that the recipe's batches follow: of a training that is over, so that every window has 30 s."""

    value = 1.0


def _synthesise(tokenizer: Path, windows: int, seed: int, folder: Path) -> None:
    """Write mels float16 [windows, 80, 3000], which is as fine as training needs, and their scripts."""
    shape = (windows, SYNTHESISED_MELS, audio.WINDOW_FRAMES)
    mels = np.lib.format.open_memmap(folder / MELS, mode="w+", dtype=np.float16, shape=shape)
    scripts = []
    for i, (mel, inputs, labels) in enumerate(islice(_windows(tokenizer, seed), windows)):
        mels[i] = mel
        scripts.append({"inputs": inputs, "labels": labels})
    mels.flush()
    (folder / SCRIPTS).write_text(json.dumps(scripts), encoding="utf-8")


def _windows(tokenizer: Path, seed: int) -> Iterator[tuple[Tensor, list[int], list[int]]]:
    """The windows of the recipe's batches, one by one, with nothing behind the end."""
    from asr_core import registry

    registry.require("train")
    from reference.batches import Batches

    for batch in Batches(tokenizer, _LastStage(), seed):
        for mel, inputs, labels in zip(batch.mel, batch.inputs.tolist(), batch.labels.tolist(), strict=True):
            length = 1 + max(i for i, label in enumerate(labels) if label != IGNORED)
            yield mel, inputs[:length], labels[:length]


class Clips:
    """Clips with transcripts, each a window; those without a text are left out."""

    def __init__(self, checkpoint: Checkpoint, utterances: Sequence[data.Utterance]) -> None:
        self._ids = TokenIds.read(checkpoint.path, checkpoint.generation, checkpoint.dims.n_text_ctx)
        self._tokenizer = load_tokenizer(checkpoint.path)
        self._filters = audio.mel_filters(checkpoint.dims.n_mels)
        self._room = checkpoint.dims.n_text_ctx
        self._clips = [utterance for utterance in utterances if utterance.text.strip()]
        if not self._clips:
            raise UsageError("the training data has no transcripts: every entry's text is empty.")
        listed = [[str(clip.path), clip.text, clip.language] for clip in self._clips]
        self.digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Example:
        clip = self._clips[index]
        samples = audio.load_audio(clip.path)
        if len(samples) > audio.WINDOW_SAMPLES:
            raise AudioError(f"{clip.path} has {len(samples) / audio.SAMPLE_RATE:.0f} s; training takes clips of up to 30 s.")
        prompt = self._ids.prompt(clip.language)
        text = self._tokenizer.encode(f" {clip.text.strip()}", add_special_tokens=False).ids
        tokens = [*prompt, *text, self._ids.end][: self._room + 1]
        labels = [IGNORED] * (len(prompt) - 1) + tokens[len(prompt) :]
        mel = torch.from_numpy(audio.log_mel(samples, self._filters))
        return Example(mel, tokens[:-1], labels, hashlib.sha256(samples.tobytes()).hexdigest())
