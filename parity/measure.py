"""Measure one runner in one process: what it computes goes to files, what it costs into the returned dictionary.

Every function here runs inside :func:`asr_core.isolate.run`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from asr_core import decode, isolate
from asr_core.artifact import Artifact
from asr_core.audio import WINDOW_SECONDS
from asr_core.decode import Decoded, DecodeOptions, Logits, Mel
from asr_core.tokens import TokenIds, load_tokenizer, text_of
from parity import data, modes, suite
from parity.weights import top2_margin, weights_file
from runners.base import Runner, StepRunner, open_runner

DECODED = "decoded.jsonl"
REFERENCE = "pytorch"


def measure(
    target: str,
    path: str,
    work: str,
    folder: str,
    reference: str | None,
    probes: list[int],
    threads: int,
    max_new_tokens: int | None,
    level: suite.Level | None,
    progress: isolate.Progress,
) -> dict[str, Any]:
    """Decode every prepared utterance freely and score the probes under teacher forcing.

    ``reference`` is the folder of PyTorch's own measurement, whose tokens force the probes; None when this is that one: then
    the top-2 margin of every step is kept too. The utterances' mels lie in ``work``, those of the probes once more in its folder
    ``cases``. Writes ``decoded.jsonl`` and
    ``weights-<i>.npz`` below ``folder``; returns costs: load seconds, peak RSS in MB, size in MB, the kind of decoder, and
    whether its time is that of the runtime; and, where ``level`` is given, what came out of the failure classes and of
    :mod:`parity.modes`.
    """
    opened = _Opened(target, Path(path), threads, Path(work), max_new_tokens)
    opened.decode(Path(work), Path(folder), progress)
    progress("probes")
    tokens = [one["tokens"] for one in read_decoded(Path(reference or folder))]
    forced = {i: tokens[i] for i in probes}
    opened.score(Path(work), Path(folder), forced)
    costs = opened.costs()
    if level:
        costs |= opened.cases(Path(work) / data.CASES, list(forced.values()), level, progress)
    opened.runner.close()
    return costs


def measure_part(
    target: str,
    path: str,
    work: str,
    folder: str,
    probes: list[int],
    forced: list[list[int]] | None,
    threads: int,
    max_new_tokens: int | None,
    level: suite.Level | None,
    progress: isolate.Progress,
) -> dict[str, Any]:
    """A share of :func:`measure`'s work, over the utterances that lie in ``work``; the model stays open for the next share.

    Without ``level``: the utterances, decoded and scored; with it, the failure classes and the modes of transcription, and
    ``work`` holds the probes alone. ``forced`` are PyTorch's tokens of each probe; None for PyTorch itself, which forces its own.
    """
    key = (target, path, threads, max_new_tokens)
    if key not in _kept:
        _kept[key] = _Opened(target, Path(path), threads, Path(work), max_new_tokens)
    opened = _kept[key]
    if level is None:
        opened.decode(Path(work), Path(folder), progress)
    if forced is None:
        own = read_decoded(Path(folder))
        forced = [own[i]["tokens"] for i in probes]
    if level is not None:
        return opened.cases(Path(work), forced, level, progress)
    opened.score(Path(work), Path(folder), dict(zip(probes, forced, strict=True)))
    return opened.costs()


class _Opened:
    """A runner that has warmed up, and what is done with it."""

    def __init__(self, target: str, source: Path, threads: int, work: Path, max_new_tokens: int | None) -> None:
        self.target, self.source, self.threads, self.max_new_tokens = target, source, threads, max_new_tokens
        self.size_mb = _checkpoint_mb(source) if self.is_reference else Artifact.open(source).size_mb
        started = time.perf_counter()
        self.runner = open_runner(target, source, threads)
        self.load_s = time.perf_counter() - started
        # Allocations and lazy compilation are not the speed.
        mels = np.load(work / data.MELS, mmap_mode="r")
        self.runner.generate(np.array(mels[:1]), self._policies(work)[0])
        self.tokenizer = load_tokenizer(source)

    @property
    def is_reference(self) -> bool:
        return self.target == REFERENCE

    def _policies(self, work: Path) -> list[DecodeOptions]:
        return [DecodeOptions(language=one.language, max_new_tokens=self.max_new_tokens) for one in data.prepared(work)]

    def decode(self, work: Path, folder: Path, progress: isolate.Progress) -> None:
        """Decode every utterance into ``decoded.jsonl``."""
        mels, utterances = np.load(work / data.MELS, mmap_mode="r"), data.prepared(work)
        with (folder / DECODED).open("w", encoding="utf-8") as stream:
            for i, (mel, utterance, options) in enumerate(zip(mels, utterances, self._policies(work), strict=True)):
                if self.is_reference:
                    decoded, margins = with_margins(self.runner, np.array(mel[None]), options)
                    extra = {"margins": margins}
                else:
                    decoded, extra = self.runner.generate(np.array(mel[None]), options)[0], {}
                said = {"text": text_of(self.tokenizer, decoded.tokens), "duration_s": utterance.duration}
                print(json.dumps(asdict(decoded) | said | extra), file=stream)
                progress(f"{i + 1}/{len(mels)}")

    def score(self, work: Path, folder: Path, forced: Mapping[int, list[int]]) -> None:
        """Force tokens on some utterances, into ``weights-<i>.npz``."""
        mels, policies = np.load(work / data.MELS, mmap_mode="r"), self._policies(work)
        for i, tokens in forced.items():
            prompt = self.runner.tokens.prompt(policies[i].language)
            _score(self.runner, np.array(mels[i : i + 1]), prompt, tokens, weights_file(folder, i))

    def cases(self, work: Path, forced: Sequence[list[int]], level: suite.Level, progress: isolate.Progress) -> dict[str, Any]:
        """What comes out of the failure classes and of the modes of transcription; ``forced`` are the tokens of every probe."""
        progress("failure classes")
        # One thread where there were several, two where there was one.
        reopened = partial(open_runner, self.target, self.source, 2 if self.threads == 1 else 1)
        found = suite.run(self.runner, work, level, reopened, margins=self.is_reference)
        progress("timestamps, beams, words, long form")
        return {"suite": found, "modes": modes.run(self.runner, self.source, work, forced, level)}

    def costs(self) -> dict[str, Any]:
        """What the runner is, and what it took so far."""
        return {
            "decoder": self.runner.decoder,
            "timed": self.runner.timed,
            "timing_needs": self.runner.timing_needs,
            "load_s": self.load_s,
            "peak_rss_mb": isolate.peak_rss_mb(),
            "size_mb": self.size_mb,
        }


# The one model of this process that stays open from one share to the next.
_kept: dict[tuple[Any, ...], _Opened] = {}


def read_decoded(folder: Path) -> list[dict[str, Any]]:
    """The free-running results of a measurement, one dictionary an utterance."""
    return [json.loads(line) for line in (folder / DECODED).read_text(encoding="utf-8").splitlines()]


def policy(tokens: TokenIds, languages: list[str], max_new_tokens: int | None) -> dict[str, Any]:
    """The decode policy that every free-running figure was measured under, as JSON-able data."""
    options = DecodeOptions(max_new_tokens=max_new_tokens)
    return {
        "search": "greedy",
        "temperature_fallback": False,
        "languages": languages,
        "task": options.task,
        "timestamps": False,
        "prompts": [tokens.prompt(language, options.task) for language in languages],
        "suppress_tokens": tokens.suppress,
        "begin_suppress_tokens": tokens.begin_suppress,
        "max_new_tokens": options.max_new_tokens or tokens.max_new_tokens,
        "window_s": WINDOW_SECONDS,
        "batch": 1,
    }


class _Watched:
    """A runner whose next-token logits are kept as they come, so that looking at them later takes none of its time."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        self.tokens = runner.tokens
        self.dims = runner.dims
        self.text = runner.text
        self.seen: list[Logits] = []

    def encode(self, mel: Mel) -> Any:
        """As the runner's."""
        return self.runner.encode(mel)

    def step(self, tokens: np.ndarray[Any, np.dtype[np.int64]], state: Any) -> Logits:
        """As the runner's."""
        logits = self.runner.step(tokens, state)
        self.seen.append(logits[:, -1])
        return logits

    def step_at(self, tokens: np.ndarray[Any, np.dtype[np.int64]], state: Any, wanted: Sequence[int]) -> Logits:
        """As the runner's."""
        return self.step(tokens, state)[:, wanted]

    def reorder(self, state: Any, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        """As the runner's."""
        return self.runner.reorder(state, rows)

    def restart(self, state: Any, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        """As the runner's."""
        return self.runner.restart(state, rows)


def with_margins(runner: Runner, mel: Mel, options: DecodeOptions) -> tuple[Decoded, list[float]]:
    """Decode one window with PyTorch, whose steps return memory of their own, and tell the top-2 logit margin of every step.

    The margins are those between tokens that the policy allows; the end token's step is one of them.
    """
    if not isinstance(runner, StepRunner):
        raise TypeError("the reference runner steps")
    watched = _Watched(runner)
    decoded = decode.generate(watched, mel, options)[0]
    filters = decode.filters_for(runner.tokens, options)
    for produced, logits in enumerate(watched.seen):
        for logit_filter in filters:
            logit_filter.apply(logits, [decoded.tokens[:produced]])
    return decoded, [float(top2_margin(logits[0])) for logits in watched.seen]


def _score(runner: Runner, mel: Mel, prompt: list[int], tokens: list[int], file: Path) -> None:
    logits = runner.score(mel, [*prompt, *tokens])
    arrays = {"encoder": runner.encoder_states(mel)[0]}
    if logits is not None:
        arrays["logits"] = logits[len(prompt) - 1 :]
    np.savez(file, allow_pickle=False, **arrays)


def _checkpoint_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
