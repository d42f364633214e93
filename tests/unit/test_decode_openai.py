"""Every way of decoding against openai-whisper on the same weights: tokens, probabilities, and the branches of the fallback."""

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper.decoding
from whisper.decoding import DecodingOptions
from whisper.tokenizer import TO_LANGUAGE_CODE

from asr_core import audio, decode, languages
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.search import Sampling
from asr_core.tokens import load_tokenizer, non_speech_tokens, suppressed
from runners import pytorch
from tests import openai_oracle
from tests.unit.test_decode import mels

TIE = 1e-4  # between summed log-probabilities: both sides sum float32 rounding errors over at most some hundred tokens
WORDS = tuple(range(300, 320))

# Ours, and openai-whisper's name for what differs from its defaults with timestamps.
MODES = {
    "greedy": ({}, {"without_timestamps": True}),
    "beam": ({"beam_size": 5}, {"beam_size": 5, "without_timestamps": True}),
    "beam, patient": (
        {"beam_size": 3, "patience": 2.0, "length_penalty": 0.6},
        {"beam_size": 3, "patience": 2.0, "length_penalty": 0.6, "without_timestamps": True},
    ),
    "beam, hasty": ({"beam_size": 4, "patience": 0.5}, {"beam_size": 4, "patience": 0.5, "without_timestamps": True}),
    "timestamps": ({"timestamps": True}, {}),
    "timestamps, late": (
        {"timestamps": True, "max_initial_timestamp": None, "suppress_blank": False},
        {"max_initial_timestamp": None, "suppress_blank": False},
    ),
    "timestamps, beam": ({"timestamps": True, "beam_size": 5}, {"beam_size": 5}),
    "long prompt": ({"prompt": WORDS * 20}, {"prompt": list(WORDS * 20), "without_timestamps": True}),
    "prompt, prefix": (
        {"prompt": WORDS, "prefix": WORDS[:3], "timestamps": True, "beam_size": 2},
        {"prompt": list(WORDS), "prefix": list(WORDS[:3]), "beam_size": 2},
    ),
    "language": ({"language": None}, {"language": None, "without_timestamps": True}),
    "translate": (
        {"language": "Spanish", "task": "translate"},
        {"language": "es", "task": "translate", "without_timestamps": True},
    ),
}


class Encoded:
    """A runner that has encoded some windows and hands them out again and again."""

    def __init__(self, runner: Any, mel: np.ndarray) -> None:
        self.runner = runner
        self.state = runner.encode(mel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def encode(self, mel: np.ndarray) -> Any:
        return self.runner.restart(self.state, np.arange(len(mel)))


class Pair:
    """One checkpoint on both sides, with windows that each has encoded."""

    def __init__(self, checkpoint: Checkpoint, mel: np.ndarray, suppress: tuple[int, ...]) -> None:
        self.checkpoint, self.mel, self.suppress = checkpoint, mel, suppress
        self.runner = Encoded(pytorch.open(checkpoint.path, 1), mel)
        self.model = openai_oracle.model(checkpoint, [(1, 0)])
        with torch.no_grad():
            self.features = self.model.embed_audio(torch.from_numpy(mel))

    def ours(self, **options: Any) -> list[decode.Decoded]:
        return decode.generate(self.runner, self.mel, DecodeOptions(suppress=self.suppress, **options))

    def theirs(self, **options: Any) -> list[whisper.decoding.DecodingResult]:
        return openai_oracle.decode(self.checkpoint, self.model, self.features, suppress_tokens=list(self.suppress), **options)


def windows(paths: list[Path]) -> np.ndarray:
    return np.stack([audio.log_mel(audio.load_audio(path)[: audio.WINDOW_SAMPLES], audio.mel_filters(80)) for path in paths])


@pytest.fixture(scope="module")
def carried(trained, clips) -> Pair:
    """The carried checkpoint on carried clips of every kind; tokens suppressed as openai-whisper suppresses."""
    kinds = {clip.stem.split("-")[0]: clip for clip in clips}
    return Pair(trained, windows([*kinds.values(), clips[3]]), suppressed(load_tokenizer(trained.path)))


@pytest.fixture(scope="module")
def random(talkative) -> Pair:
    """Random weights that may say a dozen words and every timestamp, and end now and then."""
    checkpoint = Checkpoint.open(talkative)
    first = pytorch.open(talkative, 1).tokens.timestamp_begin
    return Pair(checkpoint, mels(3), tuple(token for token in checkpoint.generation["suppress_tokens"] if token < first))


def assert_same(pair: Pair, ours: dict[str, Any], theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens with the same probabilities, except where openai's own beam search was undecided."""
    gaps = openai_oracle.Gaps(monkeypatch)
    expected = pair.theirs(**theirs)
    found = pair.ours(**ours)
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        if "beam_size" in ours and one.tokens != other.tokens:
            assert gaps.smallest[row] < TIE, f"window {row}: {one.tokens} instead of {other.tokens}"
        else:
            assert one.tokens == other.tokens
        assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-4)
        assert one.no_speech_prob == pytest.approx(other.no_speech_prob, rel=1e-3, abs=1e-9)
        assert one.language == other.language


@pytest.mark.parametrize("mode", MODES)
def test_carried_clips(carried, mode, monkeypatch):
    assert_same(carried, *MODES[mode], monkeypatch)


@pytest.mark.parametrize("mode", ["beam", "timestamps", "timestamps, late", "timestamps, beam", "long prompt"])
def test_random_weights(random, mode, monkeypatch):
    ours, theirs = MODES[mode]
    assert_same(random, ours | {"max_new_tokens": 16}, theirs | {"sample_len": 16}, monkeypatch)


def test_an_english_model(shape_folder, monkeypatch):
    checkpoint = Checkpoint.open(shape_folder("mini.en"))
    pair = Pair(checkpoint, mels(2), tuple(checkpoint.generation["suppress_tokens"]))
    assert_same(
        pair, {"timestamps": True, "language": None, "max_new_tokens": 8}, {"language": "en", "sample_len": 8}, monkeypatch
    )


def test_real_recordings(trained, recordings, monkeypatch):
    paths = [next((recordings / name).rglob("*.[wf][al][va]*")) for name in ("cards", "fsdd", "jfk", "librivox")]
    pair = Pair(trained, windows(paths), tuple(trained.generation["suppress_tokens"]))
    for mode in ("greedy", "timestamps, beam", "language"):
        with monkeypatch.context() as patch:
            assert_same(pair, *MODES[mode], patch)


def test_language_probabilities(carried):
    with torch.no_grad(), openai_oracle.policy_of(carried.checkpoint):
        tokenizer = openai_oracle.tokenizer(carried.checkpoint.path)
        _, expected = whisper.decoding.detect_language(carried.model, carried.features, tokenizer)
    found = carried.runner.runner.detect_language(carried.mel)
    for one, other in zip(found, expected, strict=True):
        assert sum(one.values()) == pytest.approx(1)
        assert {code: other[code] for code in one} == pytest.approx(one, abs=1e-5)


def test_lists_and_names_are_openais(carried):
    theirs = openai_oracle.tokenizer(carried.checkpoint.path)
    ours = load_tokenizer(carried.checkpoint.path)
    with openai_oracle.policy_of(carried.checkpoint):
        for chosen in ([-1], [5, 6], [-1, 300]):
            task = whisper.decoding.DecodingTask(carried.model, DecodingOptions(language="en", suppress_tokens=chosen))
            assert suppressed(ours, chosen) == task._get_suppress_tokens()
    assert non_speech_tokens(ours) == theirs.non_speech_tokens
    assert languages.NAMES == whisper.tokenizer.LANGUAGES
    assert {name: languages.code_of(name.title()) for name in TO_LANGUAGE_CODE} == TO_LANGUAGE_CODE


def drawn_at(monkeypatch: pytest.MonkeyPatch, quantile: float) -> None:
    """Both sides draw the token at one quantile of the distribution: their generators cannot be compared, the rest can."""

    class Quantile:
        def __init__(self, logits: torch.Tensor) -> None:
            self.reached = logits.double().softmax(-1).cumsum(-1)

        def sample(self) -> torch.Tensor:
            return (self.reached < quantile).sum(-1)

    class Generator:
        def random(self) -> float:
            return quantile

    monkeypatch.setattr(whisper.decoding, "Categorical", Quantile)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Generator())


class Kept(Exception):  # noqa: N818 - no error: it ends a transcription after its first window
    pass


def kept_by_transcribe(pair: Pair, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[whisper.decoding.DecodingResult]:
    """The answer that openai-whisper's own ``transcribe`` keeps for each window, taken where it begins the next one."""
    transcribe = import_module("whisper.transcribe").transcribe
    answers = []
    for window in pair.features:
        attempts: list[whisper.decoding.DecodingResult] = []

        def decode_window(
            _: Any, options: Any, window: Any = window, attempts: Any = attempts
        ) -> whisper.decoding.DecodingResult:
            if attempts and options.temperature <= attempts[-1].temperature:
                raise Kept
            attempts.append(whisper.decoding.decode(pair.model, window, options))
            return attempts[-1]

        with monkeypatch.context() as patch, openai_oracle.policy_of(pair.checkpoint), suppress(Kept):
            patch.setattr(pair.model, "decode", decode_window)
            transcribe(pair.model, np.zeros(audio.WINDOW_SAMPLES, np.float32), language="en", fp16=False, **options)
        answers.append(attempts[-1])
    return answers


def middle(values: list[float]) -> float:
    """Between the middle two of an even number of values."""
    ordered = sorted(values)
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


def parting(pair: Pair, **options: Any) -> tuple[float, float, float]:
    """Thresholds that half of the windows miss at temperature 0: mean log-probability, compression ratio, no speech."""
    first = pair.ours(**options)
    ratios = [decode.compression_ratio(pair.runner.text(one.tokens)) for one in first]
    return middle([one.avg_logprob for one in first]), middle(ratios), middle([one.no_speech_prob for one in first])


@pytest.mark.parametrize("rule", ["logprob", "ratio", "silence", "defaults"])
def test_the_fallback_takes_the_same_branch(carried, monkeypatch, rule):
    search = {"ratio": {"best_of": 2}, "silence": {"beam_size": 2, "best_of": 2}}.get(rule, {})
    ours = {"timestamps": True, "max_new_tokens": 24} | search
    logprob, ratio, silence = parting(carried, **ours)
    thresholds = {
        "logprob": (logprob, None, None),
        "ratio": (None, ratio, silence),
        "silence": (logprob, 100.0, silence),
        "defaults": (-1.0, 2.4, 0.6),
    }[rule]
    names = ("logprob_threshold", "compression_ratio_threshold", "no_speech_threshold")
    rules = dict(zip(names, thresholds, strict=True))
    drawn_at(monkeypatch, 0.8)
    ladder = (0.0, 0.4, 1.0)
    expected = kept_by_transcribe(carried, monkeypatch, temperature=ladder, sample_len=24, **rules, **search)
    found = carried.ours(temperatures=ladder, **rules, **ours)
    assert [one.temperature for one in found] == [other.temperature for other in expected]
    assert [one.tokens for one in found] == [other.tokens for other in expected]
    assert [one.avg_logprob for one in found] == pytest.approx([other.avg_logprob for other in expected], abs=1e-4)
    if rule in {"logprob", "ratio"}:
        assert len({one.temperature for one in found}) > 1, "the thresholds should part the windows"


def test_draws_follow_the_distribution():
    logits = np.array([[1.0, 0.0, -np.inf, 2.0, -1.0]], np.float32)
    draws, temperature = 4000, 0.7
    search = Sampling(1, draws, temperature, end=99, seed=(0,))
    picked, rows = search.advance(logits)
    expected = np.exp(logits[0] / temperature) / np.exp(logits[0] / temperature).sum()
    counts = np.bincount(picked, minlength=5)
    assert not rows.any()
    # Chi-square with three degrees of freedom: a right sampler exceeds 16.3 once in a thousand seeds; this seed is fixed.
    seen = expected > 0
    assert ((counts - draws * expected)[seen] ** 2 / (draws * expected)[seen]).sum() < 16.3
    assert counts[2] == 0
    logprobs = logits[0] - np.log(np.exp(logits[0]).sum())
    sums = [found.sum_logprob for found in search.candidates()[0]]
    assert sums == pytest.approx(logprobs[picked], abs=1e-5)  # at temperature 1, as openai-whisper counts


def test_sampling_is_the_seeds_alone(carried):
    """Neither the batch around a window nor an earlier call moves its draws."""
    options = {"temperatures": (0.9,), "best_of": 3, "timestamps": True}
    together = carried.ours(**options)
    alone = decode.generate(
        Encoded(carried.runner.runner, carried.mel[1:2]), carried.mel[1:2], DecodeOptions(suppress=carried.suppress, **options)
    )
    assert carried.ours(**options)[1].tokens == together[1].tokens == alone[0].tokens
    assert [one.tokens for one in carried.ours(**options, seed=1)] != [one.tokens for one in together]
