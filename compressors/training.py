"""The training loop: AdamW over latent tensors, a state on disk to go on from after a kill, a stop where gradients break."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from asr_core.compressed import Effect
from asr_core.errors import ExportError
from asr_core.isolate import Progress
from compressors import examples as data
from compressors import latent
from compressors.base import Applied, Parameters
from compressors.calibration import Calibration
from compressors.examples import IGNORED, Batch, Examples
from compressors.latent import Latent
from compressors.linears import effect
from compressors.model import Model
from compressors.teacher import Kept, Live, Target

STATE = "state.pt"
ENCODED = "encoded"  # folder of the encoder states, where the encoder is not trained
SAVE_EVERY_S = 60.0  # a killed run loses no more than this
WARM_UP = 0.1  # share of the steps
LOWEST = 0.05  # share of the peak rate at the last step
CLIP_NORM = 1.0
RECENT = 20  # steps that the shown loss is the mean of


class Schedule(Parameters):
    """What every method that trains takes: how long, how fast, and on what."""

    steps: int = Field(default=300, ge=1, description="optimiser steps")
    batch: int = Field(default=4, ge=1, description="windows in a step")
    rate: float = Field(default=5e-5, gt=0, description="peak learning rate; higher ones damage a converged model")
    data: Path | None = Field(
        default=None, description="NeMo manifest or LibriSpeech folder, up to 30 s a clip; else the recipe's synthesised windows"
    )
    windows: int = Field(default=256, ge=1, description="how many windows to synthesise")
    seed: int = Field(default=0, description="of the windows and their order")
    half: bool = Field(default=False, description="multiply in bfloat16; weights stay float32")


@dataclass(frozen=True)
class Weighing:
    """What the loss adds up: cross-entropy, T² KL(teacher || student), and the encoder states' mean square error."""

    entropy: float
    divergence: float
    encoder: float
    temperature: float = 1.0


class DivergedError(ExportError):
    """A training whose gradients are no numbers any more; ``applied`` is the last good model, of ``step``."""

    def __init__(self, message: str, applied: Applied, step: int) -> None:
        super().__init__(message)
        self.applied, self.step = applied, step


@dataclass
class Run:
    """A training in progress: what a state file holds."""

    latents: Mapping[str, Latent]
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, file: Path) -> None:
        """Write the state under its name only once it is whole."""
        state = {"latents": self._parts(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
        torch.save(state, partial)
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Go on from a state."""
        state = torch.load(file, weights_only=True, map_location="cpu")
        for mine, kept in zip(self._parts(), state["latents"], strict=True):
            mine.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _parts(self) -> list[Tensor]:
        return [part.data for one in self.latents.values() for part in one.trained]


class Encoded:
    """The states of an encoder that is not trained: computed once for every example, and kept in half precision."""

    def __init__(self, module: nn.Module, folder: Path) -> None:
        self._encoder = module.get_submodule("model.encoder")
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def states(self, indices: Sequence[int], mel: Tensor) -> Tensor:
        """Float32 [B, positions, d] of the examples at ``indices``, whose mels are given."""
        return torch.stack([self._of(index, one) for index, one in zip(indices, mel, strict=True)]).to(mel.device)

    def _of(self, index: int, mel: Tensor) -> Tensor:
        file = self._folder / f"{index}.npy"
        if not file.exists():
            with torch.inference_mode():
                states = self._encoder(mel[None]).last_hidden_state[0].cpu().half().numpy()
            partial = file.with_name(f"{index}.partial-{os.getpid()}.npy")
            np.save(partial, states)
            partial.replace(file)
        return torch.from_numpy(np.load(file)).float()


def _trains_encoder(made: Mapping[str, Latent]) -> bool:
    return any(one.trained and name.startswith(latent.ENCODER) for name, one in made.items())


def device() -> torch.device:
    """Where to train: on a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: Model,
    made: Mapping[str, Latent],
    examples: Examples,
    teacher: Live | Kept,
    weighing: Weighing,
    schedule: Schedule,
    work: Path,
    progress: Progress,
) -> Applied:
    """Train the latents; ``work`` keeps the state, and a run that finds one there goes on from it.

    Raises :class:`DivergedError` with the last saved model where a gradient is not finite.
    """
    where = device()
    for one in made.values():
        one.move(where)
    trained = [part for one in made.values() for part in one.trained]
    run = Run(made, torch.optim.AdamW(trained, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.0))
    file = work / STATE
    if file.exists():
        run.load(file)
        progress(f"goes on from step {run.step} of {schedule.steps}")
    else:
        work.mkdir(parents=True, exist_ok=True)
        run.save(file)
    module = model.module().to(where)
    encoded = None if _trains_encoder(made) else Encoded(module, work / ENCODED)
    saved, recent = time.monotonic(), deque[float](maxlen=RECENT)
    while run.step < schedule.steps:
        chosen = data.order(len(examples), run.step, schedule.batch, schedule.seed)
        batch = data.collate([examples[i] for i in chosen], model.config["eos_token_id"]).to(where)
        if encoded:
            batch = replace(batch, states=encoded.states(chosen, batch.mel))
        loss = loss_of(module, made, batch, teacher.target(chosen, batch), weighing, half=schedule.half)
        if not _learn(run, trained, loss, schedule):
            raise _diverged(model, run, file)
        recent.append(float(loss.detach()))
        progress(f"step {run.step} of {schedule.steps}, loss {sum(recent) / len(recent):.3f}")
        if time.monotonic() - saved > SAVE_EVERY_S:
            run.save(file)
            saved = time.monotonic()
    run.save(file)
    return applied(model, made)


def loss_of(
    module: nn.Module, made: Mapping[str, Latent], batch: Batch, target: Target, weighing: Weighing, *, half: bool = False
) -> Tensor:
    """The weighed loss of a batch."""
    given = {"decoder_input_ids": batch.inputs, "use_cache": False, **batch.heard}
    with torch.autocast(batch.mel.device.type, dtype=torch.bfloat16, enabled=half):
        said: Any = torch.func.functional_call(module, latent.values(made), kwargs=given, tie_weights=False)
    judged = batch.labels != IGNORED
    logits = said.logits.float()[judged]
    loss = weighing.entropy * nn.functional.cross_entropy(logits, batch.labels[judged])
    loss = loss + weighing.divergence * weighing.temperature**2 * target.divergence(logits)
    if weighing.encoder and target.states is not None:
        loss = loss + weighing.encoder * nn.functional.mse_loss(said.encoder_last_hidden_state.float(), target.states.float())
    return loss


def _learn(run: Run, trained: list[nn.Parameter], loss: Tensor, schedule: Schedule) -> bool:
    """Take a step; False, with nothing changed, where the gradients are no numbers."""
    for group in run.optimizer.param_groups:
        group["lr"] = schedule.rate * rate_share(run.step, schedule.steps)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if not bool(nn.utils.clip_grad_norm_(trained, CLIP_NORM).isfinite()):
        return False
    run.optimizer.step()
    run.step += 1
    return True


def rate_share(step: int, steps: int) -> float:
    """Share of the peak rate: a linear warm-up, then a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _diverged(model: Model, run: Run, file: Path) -> DivergedError:
    at = run.step + 1
    run.load(file)
    message = f"the gradients of step {at} are not finite (too high a rate, or broken data). Try a lower rate."
    return DivergedError(message, applied(model, run.latents), run.step)


def applied(model: Model, made: Mapping[str, Latent]) -> Applied:
    """What the training made, and its effect on every matrix that moved."""
    trained = latent.finished(model, made)
    return Applied(trained, effects(model, trained, [name for name, one in made.items() if one.trained]))


def effects(before: Model, after: Model, names: Sequence[str]) -> list[Effect]:
    """What became of the matrices among some tensors."""
    return [
        effect(name, before.tensors[name], after.tensors[name], after.form(name))
        for name in names
        if before.tensors[name].ndim == 2  # noqa: PLR2004 - matrices
    ]


def work_of(calibration: Calibration, method: str) -> Path:
    """Where a training step may keep its files."""
    if calibration.work is None:
        raise ValueError(f"{method} needs a folder to work in: Calibration.work")
    return calibration.work
