"""Measure one runner in one process: what it computes goes to files, what it costs into the returned dictionary.

Every function here runs inside :func:`asr_core.isolate.run`.
"""

from __future__ import annotations

import json
import time
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
    the top-2 margin of every step is kept too. The utterances' mels lie in ``work``. Writes ``decoded.jsonl`` and
    ``weights-<i>.npz`` below ``folder``; returns costs: load seconds, peak RSS in MB, size in MB, the kind of decoder, and
    whether its time is that of the runtime; and, where ``level`` is given, what came out of the failure classes and of
    :mod:`parity.modes`.
    """
    mels = np.load(Path(work) / data.MELS, mmap_mode="r")
    utterances = data.prepared(Path(work))
    policies = [DecodeOptions(language=one.language, max_new_tokens=max_new_tokens) for one in utterances]
    source = Path(path)
    size_mb = _checkpoint_mb(source) if target == REFERENCE else Artifact.open(source).size_mb
    started = time.perf_counter()
    runner = open_runner(target, source, threads)
    load_s = time.perf_counter() - started
    runner.generate(np.array(mels[:1]), policies[0])  # warm-up: allocations and lazy compilation are not the speed
    tokenizer = load_tokenizer(source)
    with (Path(folder) / DECODED).open("w", encoding="utf-8") as stream:
        for i, (mel, options) in enumerate(zip(mels, policies, strict=True)):
            if reference is None:
                decoded, margins = with_margins(runner, np.array(mel[None]), options)
                extra = {"margins": margins}
            else:
                decoded, extra = runner.generate(np.array(mel[None]), options)[0], {}
            print(json.dumps(asdict(decoded) | {"text": text_of(tokenizer, decoded.tokens)} | extra), file=stream)
            progress(f"{i + 1}/{len(mels)}")
    forced = read_decoded(Path(reference or folder))
    progress("probes")
    for i in probes:
        prompt = runner.tokens.prompt(policies[i].language)
        _score(runner, np.array(mels[i : i + 1]), prompt, forced[i]["tokens"], weights_file(Path(folder), i))
    costs = _costs(runner, load_s, size_mb)
    if level:
        progress("failure classes")
        # One thread where there were several, two where there was one.
        reopened = partial(open_runner, target, source, 2 if threads == 1 else 1)
        costs["suite"] = suite.run(runner, Path(work), level, reopened, margins=reference is None)
        progress("timestamps, beams, words, long form")
        costs["modes"] = modes.run(runner, source, Path(work), probes, [forced[i]["tokens"] for i in probes], level)
    runner.close()
    return costs


def _costs(runner: Runner, load_s: float, size_mb: float) -> dict[str, Any]:
    return {
        "decoder": runner.decoder,
        "timed": runner.timed,
        "timing_needs": runner.timing_needs,
        "load_s": load_s,
        "peak_rss_mb": isolate.peak_rss_mb(),
        "size_mb": size_mb,
    }


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
