"""The reference's own noise: how far PyTorch moves from itself, and the bounds that float artifacts get from that.

PyTorch hears the probes again with other thread counts, in batches, with attention as separate products, with rounded
weights and in half precision throughout. What it then does to its own answers, an artifact may do too.
"""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from asr_core import isolate, registry
from asr_core.decode import Logits
from asr_core.errors import GateError
from parity import data, measure, weights
from runners.base import StepRunner

BATCH = 4  # enough rows for the libraries' other matrix kernels, few enough for the memory of large models
THREADS = (1, 2)
FIGURES = ("encoder_max_abs", "encoder_error", "logits_max_abs", "logits_error", "logits_kl_max", "top1_agreement")
# The spacing of a format's numbers at 1: nothing can be known of a value more closely than to one step of its format.
SPACING = {"fp32": float(np.finfo(np.float32).eps), "fp16": float(np.finfo(np.float16).eps)}
# A choice between two tokens flips when one logit falls and the other rises, each by the noise of a logit.
TIE_LOGITS = 2


@dataclass(frozen=True)
class Variant:
    """One way in which the reference hears the probes again; ``kind`` is what ``thresholds.toml`` calls it."""

    kind: str
    what: str
    threads: int | None = None
    batch: int = 1
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Noise:
    """What a variant changed: figures as in :func:`parity.weights.figures`, None where it could not run here (``reason``)."""

    kind: str
    what: str
    seconds: float
    reason: str = ""
    encoder_max_abs: float | None = None
    encoder_error: float | None = None
    logits_max_abs: float | None = None
    logits_error: float | None = None
    logits_kl_max: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The measured noise, and the reference's largest logit over the probes, which gives the noise of a logit its least.

    ``own_s`` is how many seconds it took, without the start of its process.
    """

    noise: tuple[Noise, ...]
    probes: tuple[int, ...]
    logits_scale: float
    own_s: float = 0.0

    def bounds(self, precision: str) -> dict[str, dict[str, Any]]:
        """The bounds that a precision gets from the noise, with how they came about; none for a precision without a recipe.

        ``encoder_error`` and ``logits_error`` are factor x max(noise, spacing of the format); ``near_tie``, in logits, is
        twice the largest error of a logit, without a factor. Precisions without a factor get ``near_tie`` alone.
        """
        recipe = recipes().get(precision.partition("-")[0])
        if recipe is None:
            return {}
        chosen = [one for one in self.noise if one.kind in recipe["noise"] and not one.reason]
        spacing = SPACING.get(recipe["spacing"], 0.0)
        bounds = {}
        if "factor" in recipe:
            for name in ("encoder_error", "logits_error"):
                bounds[name] = _bound(recipe["factor"], _largest(chosen, name), spacing)
        tie = _bound(
            {"value": TIE_LOGITS, "reason": recipe["reason"]}, _largest(chosen, "logits_max_abs"), spacing * self.logits_scale
        )
        return bounds | {"near_tie": tie}

    def document(self, margins: Iterable[float]) -> dict[str, Any]:
        """How the bounds came about, as JSON-able data: each measurement, each bound, the reference's ``margins`` by step."""
        every = np.sort([margin for margin in margins if np.isfinite(margin)])
        bounds = {precision: self.bounds(precision) for precision in recipes()}
        return {
            "probes": list(self.probes),
            "logits_scale": self.logits_scale,
            "noise": [asdict(one) for one in self.noise],
            "bounds": bounds,
            "formula": {
                "encoder_error, logits_error": "factor × max(noise, spacing)",
                "near_tie": f"{TIE_LOGITS} × max(noise of a logit, spacing × largest logit)",
            },
            "margins": {
                "steps": len(every),
                "quantiles": {str(q): float(np.quantile(every, q)) for q in (0, 0.01, 0.05, 0.5)} if len(every) else {},
                "undecided_steps": {name: int((every < one["near_tie"]["max"]).sum()) for name, one in bounds.items()},
            },
        }


def recipes() -> dict[str, Any]:
    """Which noise a precision is entitled to, and the factor upon it: ``[calibration.*]`` of ``thresholds.toml``."""
    text = resources.files("parity").joinpath("thresholds.toml").read_text(encoding="utf-8")
    return cast("dict[str, Any]", tomllib.loads(text)["calibration"])


def calibrate(
    path: Path,
    work: Path,
    reference: Path,
    probes: Sequence[int],
    *,
    threads: int,
    timeout: float | None = None,
    progress: isolate.Progress = lambda stage: None,
) -> Calibration:
    """Measure the noise of the checkpoint at ``path`` in a process of its own, within ``timeout`` seconds.

    The mels of the probes lie in ``work``; ``reference`` is the measurement of all utterances, ``probes`` their places in it.
    Raises the child's error, or :class:`~asr_core.errors.GateError` where it died or hung: nothing could be judged then.
    """
    arguments = {"path": str(path), "work": str(work), "reference": str(reference), "probes": list(probes), "threads": threads}
    outcome = isolate.run("parity.calibration:measure_noise", arguments, progress=progress, threads=threads, timeout=timeout)
    if outcome.error is not None:
        raise outcome.error
    if outcome.status != "ok":
        raise GateError(f"PyTorch's own noise could not be measured ({outcome.status}): {outcome.reason}")
    found = outcome.result
    return Calibration(tuple(Noise(**one) for one in found["noise"]), tuple(probes), found["logits_scale"], outcome.own_s)


def measure_noise(
    path: str, work: str, reference: str, probes: list[int], threads: int, progress: isolate.Progress
) -> dict[str, Any]:
    """Inside :func:`asr_core.isolate.run`: every variant over the probes, against the reference's own files."""
    # Before torch is loaded: a second thread that spins on a busy machine costs ten times what it computes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    mels, utterances = np.load(Path(work) / data.MELS), data.prepared(Path(work))
    decoded = measure.read_decoded(Path(reference))
    forced = [decoded[index]["tokens"] for index in probes]
    expected = [_kept(Path(reference), index) for index in probes]
    noise = []
    for variant in variants(threads):
        progress(f"noise: {variant.what}")
        started = time.perf_counter()
        try:
            runner = cast("Any", registry.load("runners", measure.REFERENCE)).open(
                Path(path), variant.threads or threads, **dict(variant.options)
            )
            prompts = [runner.tokens.prompt(utterance.language) for utterance in utterances]
            answers = _hear(runner, mels, list(zip(prompts, forced, strict=True)), variant.batch)
            figures = weights.figures([weights.probe(*pair) for pair in zip(expected, answers, strict=True)])
            failure = "" if all(np.isfinite(figures[name]) for name in FIGURES) else "this checkpoint overflows in it"
        except (RuntimeError, NotImplementedError) as error:  # torch's own way to say that a type has no kernel here
            failure = str(error).partition("\n")[0]
        seconds = time.perf_counter() - started
        kept = {} if failure else {name: figures[name] for name in FIGURES}
        noise.append(asdict(Noise(variant.kind, variant.what, seconds, failure, **kept)))
    scale = max(float(np.abs(arrays["logits"]).max()) for arrays in expected)
    return {"noise": noise, "logits_scale": scale}


def variants(threads: int) -> list[Variant]:
    """The ways in which a reference measured with ``threads`` threads hears the probes again."""
    others = [Variant("threads", f"{count} threads", threads=count) for count in THREADS if count != threads]
    return [
        *others,
        Variant("batch", f"batches of {BATCH}", batch=BATCH),
        Variant("order", "attention as separate products", options=(("attention", "eager"),)),
        Variant("fp16-weights", "float16 weights, float32 arithmetic", options=(("weights", "float16"),)),
        Variant("fp16", "float16 weights and arithmetic", options=(("compute", "float16"),)),
        Variant("bf16-weights", "bfloat16 weights, float32 arithmetic", options=(("weights", "bfloat16"),)),
    ]


def _hear(
    runner: StepRunner, mels: NDArray[np.float32], asked: list[tuple[list[int], list[int]]], batch: int
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Encoder states and logits of the probes under their prompts and the reference's tokens, ``batch`` at a time.

    The last batch is filled up with the first probes: rows of a short one would be computed as a smaller batch is.
    """
    prompt = len(asked[0][0])  # as long in every language
    rows = list(range(len(asked)))
    for start in range(0, len(rows), batch):
        chosen = list(islice(cycle(rows), start, start + batch))
        longest = max(len(asked[row][1]) for row in chosen)
        # What follows a sequence's end can't change what came before it.
        sequences = [asked[row] for row in chosen]
        forced = [before + tokens + [runner.tokens.end] * (longest - len(tokens)) for before, tokens in sequences]
        state = runner.encode(mels[chosen])
        logits = _forced(runner, state, np.array(forced, np.int64), prompt)
        states = state.encoded.float().numpy()  # PyTorch's state holds them: no need to encode twice
        for place, row in enumerate(chosen[: len(rows) - start]):
            kept = logits[place, prompt - 1 : prompt + len(asked[row][1])]
            yield {"encoder": states[place], "logits": kept}


def _forced(runner: StepRunner, state: Any, tokens: NDArray[np.int64], prompt: int) -> Logits:
    """Logits float32 [B, T, vocab], the prompt in one pass and each later token in its own step, as decoding feeds them."""
    pieces = [tokens[:, :prompt], *(tokens[:, i : i + 1] for i in range(prompt, tokens.shape[1]))]
    return np.concatenate([runner.step(piece, state) for piece in pieces], axis=1)


def _kept(reference: Path, index: int) -> dict[str, NDArray[np.float32]]:
    with np.load(weights.weights_file(reference, index)) as file:
        return dict(file)


def _largest(chosen: Iterable[Noise], figure: str) -> float:
    return max((getattr(one, figure) for one in chosen), default=0.0)


def _bound(factor: Mapping[str, Any], noise: float, floor: float) -> dict[str, Any]:
    bound = factor["value"] * max(noise, floor)
    return {"max": bound, "noise": noise, "floor": floor, "factor": factor["value"], "reason": factor["reason"]}
