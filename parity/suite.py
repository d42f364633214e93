"""The failure classes that every backend is put through beside the utterances: where silent bad exports have been found.

After the utterances, each backend decodes a handful of windows alone, again, in a batch, with another number of threads and
under another prompt, in the same session; PyTorch goes through the same. What came out is judged as a pure function of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from asr_core import audio
from asr_core.decode import DecodeOptions, Mel
from parity.data import Utterance
from runners.base import Runner

Level = Literal["quick", "full"]
Results = dict[str, Any]
WINDOWS = "suite.npz"
CLIP, OTHER_CLIP = "clip", "another clip"
# Windows of each level, in the order in which one session hears them.
LEVELS: Mapping[str, tuple[str, ...]] = {
    "quick": (CLIP, "silence", "0.1 s"),
    "full": (CLIP, OTHER_CLIP, "silence", "noise", "0.1 s", "29.9 s", "30 s", "clipping"),
}
# Noise and untrained weights can go on for ever; what a cache or a front end breaks, it breaks in fewer tokens than these.
MOST_TOKENS = 64
CLIPPING_GAIN = 30.0  # speech at a tenth of full scale is cut off through most of its syllables
NOISE_LEVEL = 0.1


def prepare(utterances: list[Utterance], n_mels: int, folder: Path) -> None:
    """Write the log-mels of all windows, float32 [n_mels, 3000] by name, to ``suite.npz`` in a folder."""
    speech = _speech(utterances)
    english = [utterance for utterance in utterances if utterance.language == "en"]  # the prompt of these cases
    wordy = sorted(english or utterances, key=lambda utterance: len(utterance.text))
    first = audio.load_audio(wordy[-1].path)
    noise = np.random.default_rng(0).standard_normal(audio.WINDOW_SAMPLES).astype(np.float32)
    tenth = audio.SAMPLE_RATE // 10
    sounds = {
        CLIP: first,
        OTHER_CLIP: audio.load_audio(wordy[len(wordy) // 2].path),
        "silence": np.zeros(audio.WINDOW_SAMPLES, np.float32),
        "noise": NOISE_LEVEL * noise,
        "0.1 s": first[len(first) // 2 :][:tenth],
        "29.9 s": speech[:-tenth],
        "30 s": speech,
        "clipping": np.clip(CLIPPING_GAIN * first, -1, 1),
    }
    filters = audio.mel_filters(n_mels)
    mels: dict[str, Any] = {name: audio.log_mel(samples, filters) for name, samples in sounds.items()}
    np.savez(folder / WINDOWS, allow_pickle=False, **mels)


def _speech(utterances: list[Utterance]) -> NDArray[np.float32]:
    """Thirty seconds of utterances, one after another, from the first one on again where there are too few."""
    pieces: list[NDArray[np.float32]] = []
    while sum(map(len, pieces)) < audio.WINDOW_SAMPLES:
        pieces.append(audio.load_audio(utterances[len(pieces) % len(utterances)].path))
    return np.concatenate(pieces)[: audio.WINDOW_SAMPLES]


def run(runner: Runner, work: Path, level: Level, reopened: Callable[[], Runner], *, margins: bool) -> Results:
    """Decode every case of a level with one backend; returns tokens by case.

    ``reopened`` opens it once more with another number of threads. ``margins``, for PyTorch, adds its top-2 logit margin at
    each token of the windows that it hears alone.
    """
    with np.load(work / WINDOWS) as stored:
        windows = {name: stored[name] for name in LEVELS[level]}
    alone = {name: _decode(runner, mel[None])[0] for name, mel in windows.items()}
    results: Results = {"alone": alone, "again": _decode(runner, windows[CLIP][None])[0]}
    names = list(windows)[:3]
    results["batch"] = dict(zip(names, _decode(runner, np.stack([windows[name] for name in names])), strict=True))
    prompts = _other_prompts(runner) if level == "full" else {}
    results["prompts"] = {name: _decode(runner, windows[CLIP][None], **prompt)[0] for name, prompt in prompts.items()}
    if margins:
        results["margins"] = {name: _margins(runner, windows[name][None], tokens) for name, tokens in alone.items()}
    if level == "full":
        other = reopened()
        results["threads"] = _decode(other, windows[CLIP][None])[0]
        other.close()
    return results


def _decode(runner: Runner, mels: Mel, language: str = "en", task: str = "transcribe") -> list[list[int]]:
    options = DecodeOptions(language, task, max_new_tokens=MOST_TOKENS)
    return [decoded.tokens for decoded in runner.generate(mels, options)]


def _other_prompts(runner: Runner) -> dict[str, dict[str, str]]:
    """Prompts that begin with another language or task, where the model has them."""
    languages = sorted(runner.tokens.languages.keys() - {"en"})
    found = {f"language {name}": {"language": name} for name in languages[:1]}
    if "translate" in runner.tokens.tasks:
        found["task translate"] = {"task": "translate"}
    return found


def _margins(runner: Runner, mel: Mel, tokens: list[int]) -> list[float]:
    """Between the two best tokens at every position of a decoded window, the end included."""
    prompt = runner.tokens.prompt()
    scored = runner.score(mel, [*prompt, *tokens])
    if scored is None:
        raise TypeError("the reference runner scores")
    logits = np.array(scored[len(prompt) - 1 :])
    logits[:, runner.tokens.suppress] = -np.inf
    logits[0, runner.tokens.begin_suppress] = -np.inf
    best = np.partition(logits, -2)[:, -2:]
    return [float(margin) for margin in best[:, 1] - best[:, 0]]


def judge(reference: Results, candidate: Results, near_tie: float | None) -> dict[str, str]:
    """What is wrong with a backend, by case; empty where nothing is.

    ``near_tie`` is the margin below which PyTorch is undecided itself; None for a quantised artifact, which may say something
    else than PyTorch and be moved by batches and threads, but neither remember a window nor run on where PyTorch ends.
    """
    alone = candidate["alone"]
    wrong = {}
    if candidate["again"] != alone[CLIP]:
        wrong["the same clip twice"] = _difference(alone[CLIP], candidate["again"])
    if near_tie is None:
        return wrong | _runaways(reference["alone"], alone)
    for name, expected in reference["alone"].items():
        if not _same(expected, alone[name], reference["margins"][name], near_tie):
            wrong[name] = _difference(expected, alone[name])
    for name, tokens in candidate["batch"].items():
        if not _same(alone[name], tokens, reference["margins"][name], near_tie):
            wrong[f"{name} in a batch"] = _difference(alone[name], tokens)
    if "threads" in candidate and not _same(alone[CLIP], candidate["threads"], reference["margins"][CLIP], near_tie):
        wrong["another number of threads"] = _difference(alone[CLIP], candidate["threads"])
    for name, expected in reference["prompts"].items():
        if candidate["prompts"][name] != expected:
            wrong[f"prompt with {name}"] = _difference(expected, candidate["prompts"][name])
    return wrong


def first_difference(a: list[int], b: list[int]) -> int:
    """Position of the first token in which two sequences differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _same(expected: list[int], got: list[int], margins: list[float], near_tie: float) -> bool:
    """Equal, or first different where PyTorch is undecided."""
    at = first_difference(expected, got)
    return expected == got or (at < len(margins) and margins[at] < near_tie)


def _difference(expected: list[int], got: list[int]) -> str:
    return f"{len(got)} tokens for {len(expected)}, different from token {first_difference(expected, got)} on"


def _runaways(reference: Mapping[str, list[int]], alone: Mapping[str, list[int]]) -> dict[str, str]:
    return {
        name: f"runs on to {MOST_TOKENS} tokens where PyTorch ends after {len(reference[name])}"
        for name, tokens in alone.items()
        if len(tokens) >= MOST_TOKENS > len(reference[name])
    }
