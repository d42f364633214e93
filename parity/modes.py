"""What transcription asks of a backend beyond plain decoding: timestamps, a beam, a prompt, languages, words, long recordings.

Every backend does the same in the session that decoded the utterances, over a few of them and one recording made of them; PyTorch
too. What came out is judged as a pure function of both.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr_core import audio
from asr_core.align import AlignRequest, time_words
from asr_core.artifact import MANIFEST
from asr_core.decode import DecodeOptions
from asr_core.errors import UsageError
from asr_core.tokens import TIMESTAMP_STEP, TokenIds, load_tokenizer
from asr_core.transcribe import Bundle, TranscribeOptions, transcribe
from parity import data
from parity.data import Utterance
from parity.suite import Level, first_difference
from runners.base import Runner

Results = dict[str, Any]
RECORDING = "long.wav"
# Two windows and a bit: a seek by timestamps, a prompt from the window before, a short last window.
RECORDING_S = 66.0
PAUSE_S = 0.5  # between the utterances of the recording
WINDOWS: Mapping[Level, int] = {"quick": 2, "full": 12}
MOST_TOKENS = 96
SAME_WORD_S = 0.02  # one position of the encoder: paths that are equally good differ by that much
# How far PyTorch's best language must be ahead for another one to be wrong: of rounding, and of fewer bits.
NEAR_LANGUAGES = 1e-3
DECIDED = 0.1
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "timestamps": {"timestamps": True},
    "beam": {"beam_size": 5},
    "beam with timestamps": {"beam_size": 5, "timestamps": True},
}


@dataclass(frozen=True)
class Figures:
    """Distances from PyTorch in seconds; None where nothing could be compared.

    ``boundary_p95_s`` is of segment boundaries in windows that have as many of them as PyTorch's; ``boundary_error_s`` the mean
    distance of the artifact's own from the true ones. Words are those of PyTorch's tokens, so that each has its counterpart.
    ``language_match`` is the share of windows in which PyTorch's language is the likeliest, of those where PyTorch is decided.
    """

    boundary_p95_s: float | None = None
    boundary_error_s: float | None = None
    word_p95_s: float | None = None
    words_in_place: float | None = None
    language_match: float | None = None


@dataclass
class Judged:
    """What is wrong, by case, and the figures."""

    wrong: dict[str, str] = field(default_factory=dict)
    figures: Figures = field(default_factory=Figures)


def prepare(utterances: Sequence[Utterance], folder: Path) -> None:
    """Write the long recording, utterances one after another with pauses, as 16-bit ``long.wav``."""
    language = utterances[0].language
    spoken = [utterance for utterance in utterances if utterance.language == language and utterance.text]
    pieces: list[NDArray[np.float32]] = []
    while sum(map(len, pieces)) < RECORDING_S * audio.SAMPLE_RATE:
        pieces.append(audio.load_audio((spoken or utterances)[len(pieces) // 2 % len(spoken or utterances)].path))
        pieces.append(np.zeros(round(PAUSE_S * audio.SAMPLE_RATE), np.float32))
    samples = np.concatenate(pieces)[: round(RECORDING_S * audio.SAMPLE_RATE)]
    with wave.open(str(folder / RECORDING), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.SAMPLE_RATE)
        file.writeframes((np.clip(samples, -1, 1) * np.iinfo(np.int16).max).astype("<i2").tobytes())


def run(runner: Runner, source: Path, work: Path, forced: Sequence[list[int]], level: Level) -> Results:
    """Decode the first of the probes in ``work``, as many as a level wants, under every policy, and the recording; JSON-able.

    ``source`` is the artifact's folder, or the checkpoint's; ``forced`` are PyTorch's tokens of every probe, whose words are
    looked for.
    """
    probes = data.prepared(work)[: WINDOWS[level]]
    languages = [probe.language for probe in probes]
    windows = [mel[None] for mel in np.load(work / data.MELS)[: len(probes)]]
    prompt = {"prompt": tuple(forced[1 % len(forced)])}
    policies = dict(POLICIES) | ({"prompt": prompt} if runner.tokens.previous is not None else {})
    results: Results = {"decoded": {}, "languages": [runner.detect_language(mel)[0] for mel in windows]}
    for name, policy in policies.items():
        answers = [
            runner.generate(mel, DecodeOptions(language=language, max_new_tokens=MOST_TOKENS, **policy))[0]
            for mel, language in zip(windows, languages, strict=True)
        ]
        results["decoded"][name] = [{"tokens": one.tokens, "sum_logprob": one.sum_logprob} for one in answers]
    results["boundaries"] = [boundaries(one["tokens"], runner.tokens) for one in results["decoded"]["timestamps"]]
    lengths = [probe.duration for probe in probes]
    results["words"] = _words(runner, source, windows, languages, [list(tokens) for tokens in forced[: len(probes)]], lengths)
    results["long"] = _long(runner, source, work, languages[0], level)
    return results


def boundaries(tokens: Sequence[int], ids: TokenIds) -> list[float]:
    """The times that a transcript's timestamps name, in seconds from the beginning of its window."""
    return [round((token - ids.timestamp_begin) * TIMESTAMP_STEP, 2) for token in tokens if token >= ids.timestamp_begin]


def _words(
    runner: Runner, source: Path, windows: list[Any], languages: list[str], forced: list[list[int]], lengths: list[float]
) -> list[list[list[float]]] | None:
    """Start and end of every word of given tokens; None where the artifact carries no cross-attention."""
    tokenizer = load_tokenizer(source)
    found: list[list[list[float]]] = []
    for mel, language, tokens, seconds in zip(windows, languages, forced, lengths, strict=True):
        request = AlignRequest(
            0, tuple(tokens), min(audio.WINDOW_FRAMES, int(seconds * audio.SAMPLE_RATE) // audio.HOP), language
        )
        if not tokens:
            found.append([])
            continue
        try:
            alignment = runner.align(mel, [request])[0]
        except UsageError:
            return None
        found.append([[word.start, word.end] for word in time_words(tokenizer, runner.tokens, request, alignment)])
    return found


def _long(runner: Runner, source: Path, work: Path, language: str, level: Level) -> dict[str, list[dict[str, Any]]]:
    """The segments of the recording, one window after the other, and in the full suite also side by side."""
    filters = np.load(source / "mel_filters.npy") if (source / MANIFEST).exists() else audio.mel_filters(runner.dims.n_mels)
    bundle = Bundle(load_tokenizer(source), filters)
    decode = DecodeOptions(language, timestamps=True, max_new_tokens=MOST_TOKENS)
    ways = {"long form": TranscribeOptions(decode)}
    if level == "full":
        halves = ((0.0, RECORDING_S / 2), (RECORDING_S / 2, RECORDING_S))
        ways["long form in batches"] = TranscribeOptions(decode, clips=halves, batch_size=2)
    heard = {name: transcribe(runner, bundle, work / RECORDING, options).segments for name, options in ways.items()}
    kept = ("start", "end", "tokens")
    return {name: [{key: asdict(one)[key] for key in kept} for one in segments] for name, segments in heard.items()}


def judge(reference: Results, candidate: Results, truth: Sequence[Sequence[float]], near_tie: float | None) -> Judged:
    """Compare a backend's results with PyTorch's; ``truth`` are the true boundaries of every window, empty where unknown.

    ``near_tie`` is the logit margin below which PyTorch is undecided; None for a quantised artifact, whose tokens may differ:
    for that, only the figures are judged.
    """
    judged = Judged(figures=figures(reference, candidate, truth))
    if near_tie is None:
        return judged
    for name, expected in reference["decoded"].items():
        different = [
            (i, one, other)
            for i, (one, other) in enumerate(zip(expected, candidate["decoded"][name], strict=True))
            if not _same(one, other, near_tie)
        ]
        for i, one, other in different[:1]:
            at = first_difference(one["tokens"], other["tokens"])
            judged.wrong[name] = f"{len(different)} of {len(expected)} windows, first window {i} from token {at} on"
    for i, (one, other) in enumerate(zip(reference["languages"], candidate["languages"], strict=True)):
        if _likeliest(one) != _likeliest(other) and _lead(one) >= NEAR_LANGUAGES:
            judged.wrong["language"] = f"window {i} is {_likeliest(other)}, for PyTorch {_likeliest(one)}"
    for name, expected in reference["long"].items():
        if (what := _segments_differ(expected, candidate["long"][name])) is not None:
            judged.wrong[name] = what
    return judged


def figures(reference: Results, candidate: Results, truth: Sequence[Sequence[float]]) -> Figures:
    """The distances of a backend's results; PyTorch's own when both are the same."""
    apart = list(_apart(reference["boundaries"], candidate["boundaries"]))
    errors = list(_apart(truth, candidate["boundaries"]))
    words: list[float] = []
    if reference["words"] is not None and candidate["words"] is not None:
        flat = [[time for word in window for time in word] for window in reference["words"]]
        words = list(_apart(flat, [[time for word in window for time in word] for window in candidate["words"]]))
    pairs = zip(reference["languages"], candidate["languages"], strict=True)
    agreed = [_likeliest(one) == _likeliest(other) for one, other in pairs if _lead(one) >= DECIDED]
    return Figures(
        boundary_p95_s=_quantile(apart),
        boundary_error_s=float(np.mean(errors)) if errors else None,
        word_p95_s=_quantile(words),
        words_in_place=float(np.mean(np.array(words) <= SAME_WORD_S + 1e-9)) if words else None,
        language_match=float(np.mean(agreed)) if agreed else None,
    )


def _same(expected: Mapping[str, Any], got: Mapping[str, Any], near_tie: float) -> bool:
    """The same tokens, or others that the model finds as likely: then the search is at a tie, which rounding decides."""
    steps = max(len(expected["tokens"]), len(got["tokens"])) + 1
    apart = abs(float(expected["sum_logprob"]) - float(got["sum_logprob"]))
    return bool(expected["tokens"] == got["tokens"]) or apart <= near_tie * steps


def _segments_differ(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> str | None:
    if len(expected) != len(got):
        return f"{len(got)} segments for {len(expected)}"
    for i, (one, other) in enumerate(zip(expected, got, strict=True)):
        if one != other:
            ends = [f"{span['start']:.2f} to {span['end']:.2f} s" for span in (other, one)]
            return f"segment {i} of {len(got)}: {ends[0]} for {ends[1]}, or other words"
    return None


def _apart(expected: Sequence[Sequence[float]], got: Sequence[Sequence[float]]) -> Iterator[float]:
    """The distances of times in windows that have as many of them."""
    for one, other in zip(expected, got, strict=True):
        if len(one) == len(other):
            yield from (abs(a - b) for a, b in zip(one, other, strict=True))


def _quantile(values: list[float]) -> float | None:
    return float(np.percentile(values, 95)) if values else None


def _likeliest(probabilities: Mapping[str, float]) -> str:
    return max(probabilities, key=lambda code: probabilities[code])


def _lead(probabilities: Mapping[str, float]) -> float:
    """How far the likeliest language is ahead of the next."""
    best, second, *_ = sorted([*probabilities.values(), 0.0], reverse=True)
    return best - second
