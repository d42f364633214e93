"""The recipe: `python -m reference.train --out DIR` trains the reference on a CPU."""

import math
import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface, AttentionMaskInterface, WhisperForConditionalGeneration
from transformers.masking_utils import eager_mask
from transformers.models.whisper.modeling_whisper import WhisperAttention

from reference import layout
from reference.alignment import alignment_heads
from reference.batches import IGNORED, STAGES, Batch, Batches, Writer, stage_at
from reference.examination import Examination
from reference.synth import PHONEME_CLASSES
from reference.tokenizer import START, TIMESTAMP_TOKENS

PEAK_RATE = 1e-3
WARM_UP = 200  # steps
DECAY_FROM = 0.55  # share of the training at which the cosine begins
SAVE_EVERY = 90.0  # seconds
# Naming the sounds: synthesis knows which phoneme is spoken when, so the encoder is told, frame by frame; attention alone
# did not find the audio in the time that a CPU has. The layer that names them is thrown away afterwards.
SOUND_WEIGHT = 0.5
# Another such layer names the piece of a word that is being spoken, so that a state knows the word around it: a decoder of
# two layers cannot put words together from sounds.
PIECE_WEIGHT = 1.0
PIECE_STRIDE = 2  # every second position is enough
# Guided attention (Tachibana et al. 2018): the last layer's cross-attention is told where the next token is spoken, and one
# head of the layer before it where the token just written was.
GUIDE_WEIGHT = 1.0
GUIDED_HEADS = [(1, 0), (1, 1)]
FOLLOWING_HEAD = (0, 0)
# The encoder's heads begin, and are kept, looking at what was spoken just before (the first head of each layer) and just after
# (the second): left to itself, attention spread over the window for most of the training, and knew sounds but no words.
NEAR_WEIGHT = 2.0
NEAR = 14  # positions
NEAR_ENOUGH = 0.7  # of a head's attention
NEAR_STRIDE = 8  # every eighth position is enough
# One token a window tells its language, and whether anyone speaks, and one that all is said: they count as much as several
# tokens of text.
ONCE_WEIGHT = 3.0
# A timestamp that is wrong by a step or two is nearly right.
TIME_SPREAD = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1])


@dataclass
class Run:
    """A training run: what a checkpoint holds and a resumed run continues from."""

    model: WhisperForConditionalGeneration
    listener: nn.Linear  # names sounds
    reader: nn.Linear  # names pieces of words
    optimizer: torch.optim.Optimizer
    step: int = 0
    audio: float = 0.0  # seconds heard
    clock: float = 0.0  # seconds trained

    def hear(self, batch: Batch) -> torch.Tensor:
        """Return the logits [batch, tokens, vocabulary] of a batch."""
        return decode(self.model, encode(self.model, batch.mel, batch.first), batch)[0]

    def save(self, path: Path) -> None:
        """Write the run, atomically: an interrupted write leaves the older file."""
        state = {
            "model": self.model.state_dict(),
            "listener": self.listener.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "audio": self.audio,
            "clock": self.clock,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a saved run."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.listener.load_state_dict(state["listener"])
        self.reader.load_state_dict(state["reader"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.audio, self.clock = state["step"], state["audio"], state["clock"]


def new_run(tokenizer: Tokenizer, seed: int) -> Run:
    """Return an untrained model with its optimizer."""
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(layout.model_config(tokenizer))
    model.set_attn_implementation(ATTENTION)
    for layer in model.model.encoder.layers:
        _look_near(layer.self_attn)
    writer = Writer(tokenizer)
    _order_timestamps(model, writer.first_timestamp)
    listener = nn.Linear(model.config.d_model, PHONEME_CLASSES)
    reader = nn.Linear(model.config.d_model, writer.end)
    layers = (model, listener, reader)
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]  # not the sinusoids
    optimizer = torch.optim.AdamW(trained, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return Run(model, listener, reader, optimizer)


def _attend(
    _: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **__: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what attention reads, [batch, positions, heads, width], and its weights.

    It returns its weights, which fused kernels do not, and takes less time than they: the softmax stays in bfloat16.
    """
    with torch.autocast("cpu", enabled=False):
        scores = query @ key.transpose(2, 3)  # the query is scaled already
        weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights


ATTENTION = "training"
AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)


@torch.no_grad()
def _look_near(attention: WhisperAttention) -> None:
    """Add to the queries and keys what makes the first head look a little before its position, the second a little after.

    Keys show their position's sine and cosine in the quicker half of the frequencies, queries those of a position near by.
    """
    width = attention.head_dim
    frequency = torch.arange(width // 2)
    sine, cosine = frequency, frequency + attention.embed_dim // 2  # where the encoder's positions hold them
    step = math.log(10_000) / (attention.embed_dim // 2 - 1)
    for head, offset in enumerate((-NEAR / 2, NEAR / 2)):
        angle = offset * torch.exp(-step * frequency)
        rows = head * width + 2 * frequency
        attention.k_proj.weight[rows, sine] += 1
        attention.k_proj.weight[rows + 1, cosine] += 1
        attention.q_proj.weight[rows, sine] += angle.cos()
        attention.q_proj.weight[rows, cosine] += angle.sin()
        attention.q_proj.weight[rows + 1, cosine] += angle.cos()
        attention.q_proj.weight[rows + 1, sine] -= angle.sin()


@torch.no_grad()
def _order_timestamps(model: WhisperForConditionalGeneration, first: int) -> None:
    """Begin with timestamps that are like their neighbours, as the encoder's positions are: each one is rarely seen."""
    positions = model.model.encoder.embed_positions.weight
    embedding = model.model.decoder.embed_tokens.weight
    embedding[first : first + len(positions)] = positions * embedding[:first].std() * math.sqrt(2)


def encode(model: WhisperForConditionalGeneration, mel: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return encoder states [batch, frames / 2, width] of windows of any length up to 30 s.

    The model's own forward insists on 30 s; a part of a window, which begins at the position `first` [batch], needs no
    others.
    """
    encoder = model.model.encoder
    hidden = nn.functional.gelu(encoder.conv1(mel))
    hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[first[:, None] + torch.arange(hidden.shape[1])]
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    states: torch.Tensor = encoder.layer_norm(hidden)
    return states


def decode(
    model: WhisperForConditionalGeneration, states: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return teacher-forced logits [batch, tokens, vocabulary] over encoder states and each layer's cross-attention."""
    decoded = model.model.decoder(input_ids=batch.inputs, encoder_hidden_states=states, use_cache=False, output_attentions=True)
    return model.proj_out(decoded.last_hidden_state), decoded.cross_attentions


@dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats a token, of sounds and pieces in nats a position, misplaced attention in nats a token."""

    entropy: torch.Tensor
    sounds: torch.Tensor
    pieces: torch.Tensor
    guide: torch.Tensor
    near: torch.Tensor
    right: torch.Tensor  # share of the positions whose piece is named rightly

    def values(self) -> list[float]:
        """Return every figure."""
        return [float(getattr(self, field.name).detach()) for field in fields(self)]

    @property
    def total(self) -> torch.Tensor:
        """What is minimised."""
        named = SOUND_WEIGHT * self.sounds + PIECE_WEIGHT * self.pieces
        return self.entropy + named + GUIDE_WEIGHT * self.guide + NEAR_WEIGHT * self.near


def losses(run: Run, writer: Writer, batch: Batch, *, half: bool) -> Losses:
    """Return the losses of a batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), _looks(run.model) as looks:
        states = encode(run.model, batch.mel, batch.first)
        scores, attention = decode(run.model, states, batch)
        named = run.listener(states)
        pieces = batch.pieces[:, ::PIECE_STRIDE]
        read = run.reader(states[:, ::PIECE_STRIDE][pieces != IGNORED])
    written = torch.cat([torch.full_like(batch.spans[:, :1], math.nan), batch.spans[:, :-1]], dim=1)
    spoken = (pieces != IGNORED).sum()
    layer, head = FOLLOWING_HEAD
    guided = [misplacement(attention[layer][:, head], batch.spans) for layer, head in GUIDED_HEADS]
    return Losses(
        entropy(scores.float(), batch, writer),
        nn.functional.cross_entropy(named.float().flatten(0, 1), batch.sounds.flatten(), ignore_index=IGNORED),
        nn.functional.cross_entropy(read.float(), pieces[pieces != IGNORED], reduction="sum") / spoken.clamp(min=1),
        torch.stack([*guided, misplacement(attention[layer][:, head], written)]).mean(),
        torch.stack([farsightedness(weights) for weights in looks]).mean(),
        (read.argmax(-1) == pieces[pieces != IGNORED]).sum() / spoken.clamp(min=1),
    )


@contextmanager
def _looks(model: WhisperForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """Collect the encoder's attention, [batch, heads, positions, positions] of each layer."""
    looks: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, output: looks.append(output[1]))
        for layer in model.model.encoder.layers
    ]
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


def farsightedness(weights: torch.Tensor) -> torch.Tensor:
    """Return the mean of how much attention [batch, 2, positions, positions] lacks in its neighbourhood, in nats."""
    positions = torch.arange(weights.shape[-1])
    distance = positions - positions[::NEAR_STRIDE, None]
    before, after = (distance <= 0) & (distance >= -NEAR), (distance >= 0) & (distance <= NEAR)
    mass = (weights[:, :, ::NEAR_STRIDE].float() * torch.stack([before, after])).sum(-1)
    lacking: torch.Tensor = (math.log(NEAR_ENOUGH) - mass.clamp(min=1e-6).log()).clamp(min=0).mean()
    return lacking


def entropy(scores: torch.Tensor, batch: Batch, writer: Writer) -> torch.Tensor:
    """Return the mean cross-entropy of logits [batch, tokens, vocabulary]; a timestamp's neighbours are not all wrong."""
    judged = batch.labels != IGNORED
    labels, log = batch.labels[judged], scores[judged].log_softmax(-1)
    first, reach = writer.first_timestamp, len(TIME_SPREAD) // 2
    times = (labels >= first)[:, None]
    near = labels[:, None] + torch.arange(-reach, reach + 1) * times
    near = torch.where(times, near.clamp(first, first + len(TIMESTAMP_TOKENS) - 1), near)
    each = -(log.gather(1, near) * TIME_SPREAD).sum(-1)
    once = (batch.inputs[judged] == writer.id(START)) | (labels == writer.end)
    weights = 1 + (ONCE_WEIGHT - 1) * once
    mean: torch.Tensor = (each * weights).sum() / weights.sum()
    return mean


def misplacement(weights: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Return the mean -log of the attention [batch, tokens, positions] that falls into each token's span."""
    positions = torch.arange(weights.shape[-1])
    inside = (positions >= spans[..., :1]) & (positions <= spans[..., 1:])
    spoken = inside.any(-1)
    mass = (weights.float() * inside).sum(-1).clamp(min=1e-6)
    mean: torch.Tensor = -(mass.log() * spoken).sum() / spoken.sum().clamp(min=1)
    return mean


def learn(run: Run, writer: Writer, batch: Batch, progress: float, *, half: bool) -> Losses:
    """Take one optimiser step, perhaps in bfloat16, and return its losses."""
    rate = learning_rate(run.step, progress)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    measured = losses(run, writer, batch, half=half)
    run.optimizer.zero_grad(set_to_none=True)
    measured.total.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.step += 1
    run.audio += batch.seconds
    return measured


def learning_rate(step: int, progress: float) -> float:
    """Return the rate: a linear warm-up, a plateau, then a cosine to nearly zero."""
    decay = max(0.0, (progress - DECAY_FROM) / (1 - DECAY_FROM))
    cosine = 0.5 * (1 + math.cos(math.pi * min(decay, 1.0)))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * max(cosine, 0.01)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--minutes", type=float, default=100.0, show_default=True, help="Of training: the schedule's length.")
@click.option("--threads", type=int, default=1, show_default=True, help="Of the trainer.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--half/--no-half", default=True, help="Multiply in bfloat16; weights stay float32.")
def main(*, out: Path, minutes: float, threads: int, seed: int, half: bool) -> None:
    """Train the reference; run again with the same folder, it continues."""
    torch.set_num_threads(threads)
    torch.multiprocessing.set_sharing_strategy("file_system")  # the other one loses connections on a busy machine
    tokenizer = layout.write_tokenizer_once(out / "tokenizer")
    run = new_run(tokenizer, seed)
    state = out / "run.pt"
    if state.is_file():
        run.load(state)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt, so that nothing learned is lost
    try:
        train(run, out, minutes * 60, seed, half=half)
    finally:
        run.save(state)
    heads = alignment_heads(run.model, tokenizer)
    layout.write_checkpoint(out / "checkpoint", run.model, out / "tokenizer", heads)


def train(run: Run, out: Path, seconds: float, seed: int, *, half: bool) -> None:
    """Train until the run has lasted so many seconds, saving it and its checkpoint folder on the way."""
    tokenizer = layout.write_tokenizer_once(out / "tokenizer")
    progress = multiprocessing.Value("d", run.clock / seconds, lock=False)
    # Another seed after a resumption: the same sentences again would teach nothing new.
    batches = Batches(out / "tokenizer" / "tokenizer.json", progress, seed + run.step)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=8))
    writer, examination = Writer(tokenizer), Examination(tokenizer)
    means, saved, before = [10.0] * 5 + [0.0], run.clock, time.monotonic()
    while run.clock < seconds:
        progress.value = run.clock / seconds
        measured = learn(run, writer, next(loader), progress.value, half=half)
        means = [mean + 0.02 * (value - mean) for mean, value in zip(means, measured.values(), strict=True)]
        now = time.monotonic()
        run.clock, before = run.clock + now - before, now
        if run.clock - saved > SAVE_EVERY:
            saved = run.clock
            run.save(out / "run.pt")
            stage = STAGES.index(stage_at(progress.value))
            layout.write_checkpoint(out / f"checkpoint-{stage}", run.model, out / "tokenizer", GUIDED_HEADS)
            state = "loss {:.3f}, sounds {:.3f}, pieces {:.3f}, guide {:.3f}, near {:.3f}, pieces right {:.3f}".format(*means)
            click.echo(f"{run.clock / 60:.1f} min, {run.audio / 3600:.1f} h, stage {stage}, step {run.step}, {state}")
            click.echo(examination.marks(run.hear))


if __name__ == "__main__":
    main()
