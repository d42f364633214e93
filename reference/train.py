"""The recipe: `python -m reference.train --out DIR --minutes N` trains the reference on a CPU."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import WhisperForConditionalGeneration

from reference import layout
from reference.alignment import alignment_heads
from reference.batches import IGNORED, LETTERS, Batch, Batches, collate, draw_utterance, stage_at

PEAK_RATE = 1e-3
WARM_UP = 200  # steps
DECAY_FROM = 0.6  # share of the training time at which the cosine begins
SAVE_EVERY = 180.0  # seconds
# Joint CTC and attention training (Watanabe et al. 2017): spelling the audio letter by letter teaches the encoder to
# align, which attention alone did not learn in the time that a CPU has; the letters' layer is thrown away afterwards.
CTC_SHARE = 0.3
# Guided attention (Tachibana et al. 2018): synthesis knows when each sentence is spoken, so the last layer's cross-attention
# is told where to look. Without it, windows of several sentences were not learned in the time.
GUIDE_SHARE = 0.2
ALL_HEADS = [(1, 0), (1, 1)]  # of the last decoder layer, until they are measured


@dataclass
class Run:
    """A training run: what a checkpoint holds and a resumed run continues from."""

    model: WhisperForConditionalGeneration
    speller: nn.Linear
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the run, atomically: an interrupted write leaves the older file."""
        state = {
            "model": self.model.state_dict(),
            "speller": self.speller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a saved run."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.speller.load_state_dict(state["speller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def new_run(tokenizer: Tokenizer, seed: int) -> Run:
    """Return an untrained model with its optimizer."""
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(layout.model_config(tokenizer))
    model.set_attn_implementation("eager")  # in short windows 0.7 of the fused kernel's time
    speller = nn.Linear(model.config.d_model, 1 + len(LETTERS))
    trained = [p for p in [*model.parameters(), *speller.parameters()] if p.requires_grad]  # not the sinusoids
    optimizer = torch.optim.AdamW(trained, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return Run(model, speller, optimizer)


def encode(model: WhisperForConditionalGeneration, mel: torch.Tensor) -> torch.Tensor:
    """Return encoder states [batch, frames / 2, width] of windows of any length up to 30 s.

    The model's own forward insists on 30 s; the first positions of a window need no others.
    """
    encoder = model.model.encoder
    hidden = nn.functional.gelu(encoder.conv1(mel))
    hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    states: torch.Tensor = encoder.layer_norm(hidden)
    return states


def logits(model: WhisperForConditionalGeneration, states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return teacher-forced logits [batch, tokens, vocabulary] over encoder states."""
    decoded = model.model.decoder(input_ids=batch.inputs, encoder_hidden_states=states, use_cache=False)
    scores: torch.Tensor = model.proj_out(decoded.last_hidden_state)
    return scores


@dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats a token, CTC in nats a letter, cross-attention's misplacement in nats a token."""

    entropy: torch.Tensor
    ctc: torch.Tensor
    guide: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """What is minimised."""
        return (1 - CTC_SHARE) * self.entropy + CTC_SHARE * self.ctc + GUIDE_SHARE * self.guide


def losses(run: Run, batch: Batch, *, half: bool) -> Losses:
    """Return the losses of a batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), _queries(run.model) as queries:
        states = encode(run.model, batch.mel)
        scores = logits(run.model, states, batch)
    spelled = run.speller(states.float()).log_softmax(-1).transpose(0, 1)
    return Losses(
        nn.functional.cross_entropy(scores.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED),
        nn.functional.ctc_loss(spelled, batch.letters, batch.positions, batch.letter_counts, zero_infinity=True),
        misplacement(run.model, queries[0].float(), states.float(), batch.spans),
    )


@contextmanager
def _queries(model: WhisperForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """Collect what the last decoder layer's cross-attention is asked with, [batch, tokens, width]."""
    asked: list[torch.Tensor] = []
    attention = model.model.decoder.layers[-1].encoder_attn
    hook = attention.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    try:
        yield asked
    finally:
        hook.remove()


def misplacement(
    model: WhisperForConditionalGeneration, asked: torch.Tensor, states: torch.Tensor, spans: torch.Tensor
) -> torch.Tensor:
    """Return the mean -log of the attention that falls into each label's span, over all heads of the last layer."""
    attention = model.model.decoder.layers[-1].encoder_attn
    heads = attention.num_heads
    queries = (attention.q_proj(asked) * attention.scaling).unflatten(-1, (heads, -1)).transpose(1, 2)
    keys = attention.k_proj(states).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (queries @ keys.transpose(-1, -2)).softmax(-1)
    positions = torch.arange(states.shape[1])
    inside = (positions >= spans[..., :1]) & (positions <= spans[..., 1:])
    spoken = inside.any(-1)
    mass = (weights * inside[:, None]).sum(-1).clamp(min=1e-6)
    mean: torch.Tensor = -(mass.log() * spoken[:, None]).sum() / (heads * spoken.sum().clamp(min=1))
    return mean


def learn(run: Run, batch: Batch, progress: float, *, half: bool) -> Losses:
    """Take one optimiser step, perhaps in bfloat16, and return its losses."""
    rate = learning_rate(run.step, progress)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    measured = losses(run, batch, half=half)
    run.optimizer.zero_grad(set_to_none=True)
    measured.total.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.step += 1
    return measured


def learning_rate(step: int, progress: float) -> float:
    """Return the rate: a linear warm-up, a plateau, then a cosine to nearly zero."""
    decay = max(0.0, (progress - DECAY_FROM) / (1 - DECAY_FROM))
    cosine = 0.5 * (1 + math.cos(math.pi * min(decay, 1.0)))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * max(cosine, 0.01)


@torch.no_grad()
def token_error(run: Run, tokenizer: Tokenizer, progress: float) -> float:
    """Return the teacher-forced share of wrong tokens on held-out sentences and voices."""
    random = Random(1)
    stage = stage_at(progress)
    wrong = total = 0
    for _ in range(8):
        group = [draw_utterance(random, stage, {}, held_out=True) for _ in range(4)]
        batch = collate(group, tokenizer, full=stage.full)
        judged = batch.labels != IGNORED
        wrong += int((logits(run.model, encode(run.model, batch.mel), batch).argmax(-1) != batch.labels)[judged].sum())
        total += int(judged.sum())
    return wrong / total


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--minutes", type=float, default=85.0, show_default=True, help="Training time.")
@click.option("--threads", type=int, default=1, show_default=True, help="Of the trainer.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--digits/--no-digits", default=True, help="Mix in human digits where they exist.")
@click.option("--half/--no-half", default=True, help="Multiply in bfloat16; weights stay float32.")
def main(*, out: Path, minutes: float, threads: int, seed: int, digits: bool, half: bool) -> None:
    """Train the reference; run again with the same folder, it continues."""
    torch.set_num_threads(threads)
    tokenizer = layout.write_tokenizer_once(out / "tokenizer")
    run = new_run(tokenizer, seed)
    state = out / "run.pt"
    if state.is_file():
        run.load(state)
    train(run, out, minutes * 60, seed, digits=digits, half=half)
    run.save(state)
    heads = alignment_heads(run.model, tokenizer)
    layout.write_checkpoint(out / "checkpoint", run.model, out / "tokenizer", heads)


def train(run: Run, out: Path, seconds: float, seed: int, *, digits: bool, half: bool) -> None:
    """Train until the run is `seconds` old, saving it and its checkpoint folder on the way."""
    tokenizer = layout.write_tokenizer_once(out / "tokenizer")
    shared = torch.tensor([run.seconds / seconds]).share_memory_()
    # Another seed after a resumption: the same sentences again would teach nothing new.
    batches = Batches(out / "tokenizer" / "tokenizer.json", shared, seed + run.step, digits=digits)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    entropy, ctc, guide, clock, saved = 10.0, 10.0, 10.0, time.monotonic(), time.monotonic()
    with Progress(*columns) as bar:
        task = bar.add_task("starting", total=seconds)
        while run.seconds < seconds:
            shared[0] = progress = run.seconds / seconds
            measured = learn(run, next(loader), progress, half=half)
            entropy += 0.02 * (float(measured.entropy.detach()) - entropy)
            ctc += 0.02 * (float(measured.ctc.detach()) - ctc)
            guide += 0.02 * (float(measured.guide.detach()) - guide)
            now = time.monotonic()
            run.seconds += now - clock
            clock = now
            state = f"step {run.step}, loss {entropy:.3f}, CTC {ctc:.3f}, guide {guide:.3f}"
            bar.update(task, completed=run.seconds, description=state)
            if now - saved > SAVE_EVERY:
                saved = now
                error = save_and_test(run, out, tokenizer, progress)
                bar.print(f"{run.seconds / 60:.0f} min, {state}, held-out token error {error:.2%}")
                clock = time.monotonic()


def save_and_test(run: Run, out: Path, tokenizer: Tokenizer, progress: float) -> float:
    """Save the run and its checkpoint folder and return the token error on held-out windows."""
    run.save(out / "run.pt")
    layout.write_checkpoint(out / "checkpoint", run.model, out / "tokenizer", ALL_HEADS)
    return token_error(run, tokenizer, progress)


if __name__ == "__main__":
    main()
