"""What training's log says about held-out windows: teacher-forced, so that it costs seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from reference.batches import IGNORED, POSITIONS_A_SECOND, STAGES, Batch, Pool, Stage, Utterance, Writer, collate, draw_utterance
from reference.tokenizer import LANGUAGE_TOKENS, NO_SPEECH, TIME_STEP, TIMESTAMP_TOKENS

PART = 10.0  # seconds of a window whose errors are counted together
_SEED = 1
_WINDOWS = 4  # in a batch
_BATCHES = 9


Hears = Callable[[Batch], torch.Tensor]  # a model: logits [batch, tokens, vocabulary] of a batch's labels


@dataclass(frozen=True)
class Sheet:
    """Held-out windows of one stage."""

    name: str
    batches: tuple[tuple[list[Utterance], Batch], ...]


class Examination:
    """Short, middling and full windows of held-out voices and sentences, always the same ones."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        random = Random(_SEED)
        self._writer = Writer(tokenizer)
        self._first_time, self._end = self._writer.first_timestamp, self._writer.end
        self._no_speech = self._writer.id(NO_SPEECH)
        self._languages = [self._writer.id(token) for token in LANGUAGE_TOKENS]
        pool = Pool(random, held_out=True)
        chosen = {"short": STAGES[1], "middling": STAGES[3], "full": STAGES[-1]}
        self._sheets = [self._sheet(name, random, stage, pool) for name, stage in chosen.items()]

    @torch.no_grad()
    def marks(self, hears: Hears) -> str:
        """Return every sheet's figures in a line of its own."""
        return "\n".join(f"    {sheet.name}: {self._mark(sheet, hears)}" for sheet in self._sheets)

    def _sheet(self, name: str, random: Random, stage: Stage, pool: Pool) -> Sheet:
        groups = [[draw_utterance(random, stage, pool) for _ in range(_WINDOWS)] for _ in range(_BATCHES)]
        return Sheet(name, tuple((group, collate(group, self._writer, full=stage.full)) for group in groups))

    def _mark(self, sheet: Sheet, hears: Hears) -> str:
        text: dict[str, list[bool]] = {}
        late: list[float] = []
        language: list[bool] = []
        silence: dict[bool, list[float]] = {True: [], False: []}
        for group, batch in sheet.batches:
            scores = hears(batch).float()
            for row, utterance in enumerate(group):
                start = int((batch.labels[row] != IGNORED).nonzero()[0])  # of the transcript
                silence[not utterance.segments].append(float(scores[row, start].softmax(-1)[self._no_speech]))
                if utterance.segments:
                    best = self._languages[int(scores[row, start, self._languages].argmax())]
                    language.append(best == int(batch.labels[row, start]))
                late += self._lateness(scores[row], batch.labels[row])
                for part, wrong in self._wrong(scores[row], batch.labels[row], batch.spans[row]):
                    text.setdefault("translated" if utterance.translated else part, []).append(wrong)
        parts = ", ".join(f"{part} {_percent(wrong)}" for part, wrong in sorted(text.items()))
        quiet, loud = (sum(p) / max(len(p), 1) for p in (silence[True], silence[False]))
        return (
            f"tokens wrong {parts}; language {_percent(language)}, timestamps {sum(late) / max(len(late), 1):.3f} s, "
            f"no speech {quiet:.2f} of silence and {loud:.2f} of speech"
        )

    def _wrong(self, scores: torch.Tensor, labels: torch.Tensor, spans: torch.Tensor) -> list[tuple[str, bool]]:
        """Return the part of the window and whether it is wrong for each token of text, and for the end of it."""
        written = labels.clone()
        written[labels > self._end] = IGNORED
        found = []
        for place in (written != IGNORED).nonzero().flatten().tolist():
            seconds = float(spans[place, 0]) / POSITIONS_A_SECOND
            part = "at the end" if int(labels[place]) == self._end else f"from {max(seconds, 0) // PART * PART:.0f} s"
            best = int(scores[place, : self._end + 1].argmax())
            found.append((part, best != int(labels[place])))
        return found

    def _lateness(self, scores: torch.Tensor, labels: torch.Tensor) -> list[float]:
        times = scores[labels >= self._first_time][:, self._first_time : self._first_time + len(TIMESTAMP_TOKENS)]
        truth = labels[labels >= self._first_time] - self._first_time
        errors: list[float] = ((times.argmax(-1) - truth).abs() * TIME_STEP).tolist()
        return errors


def _percent(flags: list[bool]) -> str:
    return f"{sum(flags) / max(len(flags), 1):.1%} of {len(flags)}"
