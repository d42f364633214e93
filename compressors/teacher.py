"""What a student is to say: the teacher's logits, computed as they are needed or kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asr_core.decode import DecodeOptions
from asr_core.tokens import TokenIds
from compressors.examples import IGNORED, Batch, Example, Examples

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint
    from compressors.model import Model


class Target(Protocol):
    """What the student is compared with at the labelled positions of one batch."""

    @property
    def states(self) -> Tensor | None:
        """The teacher's encoder states [B, T, d], where it has them at hand."""
        ...

    def divergence(self, logits: Tensor) -> Tensor:
        """Mean KL(teacher || student) in nats, of logits [n, vocab]."""
        ...


@dataclass(frozen=True)
class Whole:
    """The whole distribution: log-probabilities [n, vocab] at a temperature, and the encoder states."""

    logs: Tensor
    temperature: float
    states: Tensor | None = None

    def divergence(self, logits: Tensor) -> Tensor:
        """Exact."""
        student = (logits / self.temperature).log_softmax(-1)
        return nn.functional.kl_div(student, self.logs, reduction="none", log_target=True).sum(-1).mean()


@dataclass(frozen=True)
class Top:
    """The likeliest tokens: their log-probabilities [n, k] at a temperature, and ids [n, k]; the others count as one."""

    logs: Tensor
    ids: Tensor
    temperature: float
    states: Tensor | None = None

    def divergence(self, logits: Tensor) -> Tensor:
        """Of the distributions over the k tokens and "any other": never above the exact one, equal to it where k is all."""
        student = (logits / self.temperature).log_softmax(-1).gather(-1, self.ids)
        named = (self.logs.exp() * (self.logs - student)).sum(-1)
        rest, others = remainder(self.logs), remainder(student)
        return (named + torch.where(rest > 0, rest * (rest.clamp(min=TINY).log() - others.clamp(min=TINY).log()), 0.0)).mean()


TINY = 1e-9
NEGLIGIBLE = 1e-6  # a rest below float32's resolution of a sum of probabilities is none


def remainder(logs: Tensor) -> Tensor:
    """The probability of everything that is not named."""
    rest = 1 - logs.exp().sum(-1)
    return torch.where(rest > NEGLIGIBLE, rest, 0.0)


class Live:
    """A teacher that answers as it is asked; its encoder states come along, but for a batch that has them: those are its own."""

    def __init__(self, model: Model, temperature: float, device: torch.device) -> None:
        self._module = model.module().to(device).requires_grad_(requires_grad=False)
        self._temperature = temperature

    def target(self, indices: Sequence[int], batch: Batch) -> Target:
        """The answers to a batch."""
        with torch.no_grad():
            said = self._module(**batch.heard, decoder_input_ids=batch.inputs, use_cache=False)
        logits = said.logits.float()[batch.labels != IGNORED]
        states = said.encoder_last_hidden_state if batch.states is None else None
        return Whole((logits / self._temperature).log_softmax(-1), self._temperature, states)


class Kept:
    """A teacher whose answers to every example are written down once, in a file of each example's own.

    ``folder`` may serve several students: what it holds is named after teacher, examples and settings. With ``pseudo``, the
    examples' labels are the teacher's own transcripts.
    """

    def __init__(
        self, teacher: Checkpoint, model: Model, examples: Examples, folder: Path, *, top: int, temperature: float, pseudo: bool
    ) -> None:
        from runners.base import open_runner

        self.digest = f"{examples.digest}-{pseudo}"
        self._examples, self._top, self._temperature, self._pseudo = examples, top, temperature, pseudo
        settings = [teacher.fingerprint[:16], examples.digest, f"top{top}", f"t{temperature:g}", "own" if pseudo else "given"]
        self._folder = folder / "-".join(settings)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._module = model.module()
        self._runner = open_runner("pytorch", teacher.path, torch.get_num_threads())
        self._ids = TokenIds.read(teacher.path, teacher.generation, teacher.dims.n_text_ctx)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        """The example, with the labels to train on."""
        example = self._examples[index]
        if not self._pseudo:
            return example
        file = self._folder / f"{index}.json"
        if not file.exists():
            _write(file, json.dumps(self._heard(example)).encode())
        return relabelled(example, json.loads(file.read_text(encoding="utf-8")))

    def target(self, indices: Sequence[int], batch: Batch) -> Target:
        """The answers to a batch of the examples at ``indices``."""
        answers = [self._answer(index) for index in indices]
        device = batch.mel.device
        logs, ids = (torch.cat([answer[part] for answer in answers]).to(device) for part in ("logs", "ids"))
        return Top(logs, ids.long(), self._temperature)

    def _answer(self, index: int) -> dict[str, Tensor]:
        file = self._folder / f"{index}.safetensors"
        if not file.exists():
            partial = _partial(file)
            save_file(self._asked(self[index]), partial)
            partial.replace(file)
        answer: dict[str, Tensor] = load_file(file)
        return answer

    def _asked(self, example: Example) -> dict[str, Tensor]:
        inputs, labels = torch.tensor([example.inputs]), torch.tensor([example.labels])
        with torch.inference_mode():
            logits = self._module(input_features=example.mel[None], decoder_input_ids=inputs, use_cache=False).logits.float()
        logs = (logits[labels != IGNORED] / self._temperature).log_softmax(-1)
        top = logs.topk(min(self._top, logs.shape[-1]))
        return {"logs": top.values, "ids": top.indices.int()}

    def _heard(self, example: Example) -> list[int]:
        """The teacher's greedy transcript of a window, under the prompt that the example has."""
        start = example.prompt.index(self._ids.start)
        asked = set(example.prompt[start:])
        options = DecodeOptions(
            language=next((code for code, index in self._ids.languages.items() if index in asked), "en"),
            task=next((name for name, index in self._ids.tasks.items() if index in asked), "transcribe"),
            timestamps=self._ids.no_timestamps not in asked,
            prompt=tuple(example.prompt[1:start]),  # behind <|startofprev|>
        )
        return self._runner.generate(example.mel[None].numpy(), options)[0].tokens


def relabelled(example: Example, heard: list[int]) -> Example:
    """The example with another text; its end token stays the last label."""
    prompt, end = example.prompt, example.labels[-1]
    labels = [*example.labels[: len(prompt) - 1], *heard, end]
    return Example(example.mel, [*prompt, *heard], labels, example.clip)


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial-{os.getpid()}")


def _write(file: Path, content: bytes) -> None:
    partial = _partial(file)
    partial.write_bytes(content)
    partial.replace(file)
