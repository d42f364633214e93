"""Measure one runner in one process: what it computes goes to files, what it costs into the returned dictionary.

Every function here runs inside :func:`asr_core.isolate.run`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from asr_core import isolate
from asr_core.artifact import Artifact
from asr_core.decode import DecodeOptions
from asr_core.tokens import load_tokenizer, text_of
from parity import data
from runners.base import Runner, open_runner

DECODED = "decoded.jsonl"
REFERENCE = "pytorch"


def weights_file(folder: Path, index: int) -> Path:
    """Where a probe's encoder states and logits are kept."""
    return folder / f"weights-{index}.npz"


def measure(
    target: str,
    path: str,
    work: str,
    folder: str,
    reference: str | None,
    probes: list[int],
    threads: int,
    max_new_tokens: int | None,
    progress: isolate.Progress,
) -> dict[str, Any]:
    """Decode every prepared utterance freely and score the probes under teacher forcing.

    ``reference`` is the folder of PyTorch's own measurement, whose tokens force the probes; None when this is that one. The
    utterances' mels lie in ``work``. Writes ``decoded.jsonl`` and ``weights-<i>.npz`` below ``folder``; returns costs: load
    seconds, peak RSS in MB, size in MB, the kind of decoder, and whether its time is that of the runtime.
    """
    mels = np.load(Path(work) / data.MELS, mmap_mode="r")
    options = DecodeOptions(max_new_tokens=max_new_tokens)
    source = Path(path)
    size_mb = _checkpoint_mb(source) if reference is None else Artifact.open(source).size_mb
    started = time.perf_counter()
    runner = open_runner(target, source, threads)
    load_s = time.perf_counter() - started
    runner.generate(np.array(mels[:1]), options)  # warm-up: allocations and lazy compilation are not the speed
    tokenizer = load_tokenizer(source)
    with (Path(folder) / DECODED).open("w", encoding="utf-8") as stream:
        for i, mel in enumerate(mels):
            decoded = runner.generate(np.array(mel[None]), options)[0]
            print(json.dumps(asdict(decoded) | {"text": text_of(tokenizer, decoded.tokens)}), file=stream)
            progress(f"{i + 1}/{len(mels)}")
    forced = read_decoded(Path(reference or folder))
    for i in probes:
        _score(runner, np.array(mels[i : i + 1]), forced[i]["tokens"], weights_file(Path(folder), i))
    runner.close()
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


def margins(path: str, work: str, reference: str, positions: dict[str, int], threads: int) -> dict[str, Any]:
    """PyTorch's top-2 logit margin at one position each of some utterances (given by index): how decided it was there."""
    mels = np.load(Path(work) / data.MELS, mmap_mode="r")
    runner = open_runner(REFERENCE, Path(path), threads)
    forced = read_decoded(Path(reference))
    return {
        index: _margin(runner, np.array(mels[int(index)][None]), forced[int(index)]["tokens"][:position])
        for index, position in positions.items()
    }


def _margin(runner: Runner, mel: np.ndarray[Any, np.dtype[np.float32]], tokens: list[int]) -> float:
    logits = runner.score(mel, [*runner.tokens.prompt(), *tokens])
    if logits is None:
        raise TypeError("the reference runner scores")
    last = logits[-1].copy()
    last[runner.tokens.suppress] = -np.inf
    if not tokens:
        last[runner.tokens.begin_suppress] = -np.inf
    second, first = np.partition(last, -2)[-2:]
    return float(first - second)


def _score(runner: Runner, mel: np.ndarray[Any, np.dtype[np.float32]], tokens: list[int], file: Path) -> None:
    prompt = runner.tokens.prompt()
    logits = runner.score(mel, [*prompt, *tokens])
    arrays = {"encoder": runner.encoder_states(mel)[0]}
    if logits is not None:
        arrays["logits"] = logits[len(prompt) - 1 :]
    np.savez(file, allow_pickle=False, **arrays)


def _checkpoint_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
