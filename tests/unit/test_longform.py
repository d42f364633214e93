"""Files of any length against openai-whisper's ``transcribe()`` on the same weights."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from asr_core import audio
from asr_core.checkpoint import Checkpoint
from asr_core.decode import Decoded, DecodeOptions, Timings
from asr_core.errors import UsageError
from asr_core.segments import Segment
from asr_core.tokens import TokenIds, load_tokenizer
from asr_core.transcribe import MARGIN, Bundle, TranscribeOptions, batches, transcribe
from runners import pytorch
from tests import openai_oracle
from tests.support import listen_louder

LEVELS = (0.1, 0.01, 0.3, 0.001, 0.2, 0.05, 0.1, 0.3)


@pytest.fixture(scope="module")
def chatty(shape_folder, tmp_path_factory) -> Checkpoint:
    """Random weights that say a dozen words between timestamps of their own choice.

    Louder positions, convolutions and cross-attention make what is said depend on the place and the sound; a few loud words
    outbid all others.
    """
    folder = shutil.copytree(shape_folder("mini"), tmp_path_factory.mktemp("chatty") / "mini")
    weights = load_file(folder / "model.safetensors")
    generation = json.loads((folder / "generation_config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(300, 50000, (12,), generator=generator).tolist()
    end = generation["eos_token_id"]
    listen_louder(weights)
    embedding = weights["model.decoder.embed_tokens.weight"]
    loud = embedding[words] * 4
    embedding[:end] = 0
    embedding[words] = loud
    embedding[end] = torch.randn(embedding.shape[1], generator=generator) * 0.12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation["suppress_tokens"] = list(range(end + 1, generation["no_timestamps_token_id"] + 1))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def oracle(chatty):
    return openai_oracle.model(chatty, chatty.alignment_heads)


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> Path:
    """70 s whose level changes every 10 s, and the last window of which is short."""
    random = np.random.default_rng(0)
    sound = np.concatenate([random.normal(size=160_000) * level for level in LEVELS])[: 70 * 16000]
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(path, np.clip(sound, -1, 1), 16000)
    return path


def bundle(checkpoint: Checkpoint) -> Bundle:
    return Bundle(load_tokenizer(checkpoint.path), audio.mel_filters(checkpoint.dims.n_mels))


LENGTH = 40  # tokens a window
POLICY = DecodeOptions(None, timestamps=True, max_new_tokens=LENGTH)
PROMPT = "hello there, world"
FIRST = {"clip_timestamps": "0,20"}  # seconds; words take a pass of their own
CASES = {
    "previous text": ({}, {}),
    "no previous text, initial prompt": (
        {"condition_on_previous_text": False, "initial_prompt": PROMPT},
        {"condition_on_previous_text": False, "initial_prompt": PROMPT},
    ),
    "a prompt too long, carried": (
        {"carry_initial_prompt": True, "initial_prompt": PROMPT * 20},
        {"carry_initial_prompt": True, "initial_prompt": PROMPT * 20},
    ),
    "words": ({"word_timestamps": True, **FIRST}, {"word_timestamps": True, "clips": ((0, 20),)}),
    "words without hallucinations": (
        {"word_timestamps": True, "hallucination_silence_threshold": 0.5, **FIRST},
        {"word_timestamps": True, "hallucination_silence_threshold": 0.5, "clips": ((0, 20),)},
    ),
    # Its loop never ends where a clip outlasts the file.
    "clips": ({"clip_timestamps": "3,20,20,20,41.5,70"}, {"clips": ((3, 20), (20, 20), (41.5, 99))}),
}


@pytest.mark.parametrize("case", CASES)
def test_segments_are_openai_whispers(chatty, oracle, talk, case):
    theirs, ours = CASES[case]
    sound = soundfile.read(talk, dtype="float32")[0]
    suppressed = chatty.generation["suppress_tokens"]
    expected = openai_oracle.transcribe(
        chatty, oracle, sound, temperature=0.0, suppress_tokens=suppressed, sample_len=LENGTH, **theirs
    )
    found = transcribe(pytorch.open(chatty.path, 1), bundle(chatty), talk, TranscribeOptions(POLICY, **ours))
    assert (found.text, found.language) == (expected["text"], expected["language"])
    assert_equal(found.segments, expected["segments"])
    assert len({segment.seek for segment in found.segments}) > 1


def assert_equal(segments: list[Segment], expected: list[dict[str, Any]]) -> None:
    for segment, theirs in zip(map(asdict, segments), expected, strict=True):
        for name in ("avg_logprob", "compression_ratio", "no_speech_prob"):
            assert segment.pop(name) == pytest.approx(theirs[name], abs=1e-4)
        words = segment.pop("words")
        if words is not None:  # two paths of one cost may differ by a position, 20 ms
            assert (segment.pop("start"), segment.pop("end")) == pytest.approx((theirs["start"], theirs["end"]), abs=0.021)
        assert segment == {name: theirs[name] for name in segment}
        assert (words is None) == ("words" not in theirs)
        for word, other in zip(words or [], theirs.get("words", []), strict=True):
            assert word["word"] == other["word"]
            assert (word["start"], word["end"]) == pytest.approx((other["start"], other["end"]), abs=0.021)


class Scripted:
    """A runner that says, window by window, what a test wants; it keeps what it was asked."""

    def __init__(self, tokens: TokenIds, *answers: Decoded) -> None:
        self.tokens, self.answers = tokens, list(answers)
        self.short_windows = True
        self.asked: list[tuple[np.ndarray, DecodeOptions]] = []

    def generate(self, mel: np.ndarray, options: DecodeOptions) -> list[Decoded]:
        self.asked.append((mel, options))
        return [self.answers.pop(0) if self.answers else said([]) for _ in mel]

    def detect_language(self, mel: np.ndarray) -> list[dict[str, float]]:
        return [{"en": 0.2, "de": 0.7, "es": 0.1}] * len(mel)


def said(tokens: list[int], *, no_speech: float | None = 0.1, logprob: float = -0.2, temperature: float = 0.0) -> Decoded:
    return Decoded(tokens, logprob * (len(tokens) + 1), no_speech, Timings(0, 0, 0), None, temperature)


@pytest.fixture(scope="module")
def ids(chatty) -> TokenIds:
    return pytorch.open(chatty.path, 1).tokens


def test_hours_of_silence_are_decoded_once(chatty, ids, tmp_path):
    """The same window with the same prompt gives the same answer, which is not asked for again."""
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000 * 180, np.int16), 8000)
    model = Scripted(ids, said([300, 301], no_speech=0.9, logprob=-2.0))
    found = transcribe(model, bundle(chatty), tmp_path / "silence.wav")
    assert (found.segments, found.text, found.duration_s, found.language) == ([], "", 180, "de")
    assert len(model.asked) == 1
    found = transcribe(model, bundle(chatty), tmp_path / "silence.wav", TranscribeOptions(vad=True))
    assert (found.segments, len(model.asked)) == ([], 1)


def test_a_high_temperature_and_silence_leave_no_prompt(chatty, ids, talk):
    begin = ids.timestamp_begin
    kept = [begin, 300, begin + 100, begin + 100]
    model = Scripted(ids, said(kept), said([begin, 301, begin + 50, begin + 50], temperature=0.8), said([302]))
    found = transcribe(model, bundle(chatty), talk, TranscribeOptions(DecodeOptions("en", timestamps=True)))
    prompts = [options.prompt for _, options in model.asked]
    assert prompts[:3] == [(), tuple(kept[:3]), ()]
    assert [segment.seek for segment in found.segments][:3] == [0, 200, 300]


@pytest.mark.parametrize(("no_speech", "logprob", "skipped"), [(0.7, -1.5, True), (0.7, -0.5, False), (0.5, -1.5, False)])
def test_no_speech_rule(chatty, ids, talk, no_speech, logprob, skipped):
    model = Scripted(ids, said([300], no_speech=no_speech, logprob=logprob))
    found = transcribe(model, bundle(chatty), talk, TranscribeOptions(DecodeOptions("en", timestamps=True)))
    assert ([segment for segment in found.segments if segment.seek == 0] == []) == skipped


def test_a_runtime_that_stays_where_it_is_is_moved_on(chatty, ids, talk):
    stuck = [ids.timestamp_begin, ids.timestamp_begin, 300]
    model = Scripted(ids, *[said(stuck)] * 10)
    transcribe(model, bundle(chatty), talk, TranscribeOptions(DecodeOptions("en", timestamps=True)))
    assert len(model.asked) == 3


def test_zero_length_segments_are_cleared(chatty, ids, talk):
    begin = ids.timestamp_begin
    model = Scripted(ids, said([begin, 300, begin + 10, begin + 10, 301, begin + 10]))
    found = transcribe(model, bundle(chatty), talk, TranscribeOptions(DecodeOptions("en", timestamps=True)))
    assert [(s.start, s.end, bool(s.text), s.tokens) for s in found.segments[:2]] == [
        (0.0, 0.2, True, [begin, 300, begin + 10]),
        (0.2, 0.2, False, []),
    ]


def test_side_by_side_is_one_after_the_other(chatty, talk):
    """Stretches decoded together say what each says alone, in the order of the file."""
    clips = ((0.0, 12.0), (12.0, 12.0), (14.0, 50.0), (52.5, 70.0))
    runner = pytorch.open(chatty.path, 1)
    alone = TranscribeOptions(POLICY, condition_on_previous_text=False, clips=clips)
    together = replace(alone, batch_size=2, condition_on_previous_text=True)
    expected, found = (transcribe(runner, bundle(chatty), talk, options) for options in (alone, together))
    assert [(s.id, s.seek, s.start, s.end, s.tokens) for s in found.segments] == [
        (s.id, s.seek, s.start, s.end, s.tokens) for s in expected.segments
    ]
    assert found.text == expected.text != ""


class Copy:
    """A copy that keeps the sizes of its batches."""

    def __init__(self, checkpoint: Checkpoint, barrier: Barrier) -> None:
        self.runner, self.barrier, self.batches = pytorch.open(checkpoint.path, 1), barrier, []
        self.tokens, self.detect_language = self.runner.tokens, self.runner.detect_language

    def generate(self, mel: np.ndarray, options: DecodeOptions) -> list[Decoded]:
        if not self.batches:
            self.barrier.wait()
        self.batches.append(len(mel))
        return self.runner.generate(mel, options)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_copies_say_what_one_says(chatty, talk, count):
    """All decode at the same time; neither the words nor their order tell how many there were."""
    clips = tuple((float(start), start + 6.5) for start in range(0, 63, 7))
    options = TranscribeOptions(POLICY, condition_on_previous_text=False, clips=clips, batch_size=2)
    expected = transcribe(pytorch.open(chatty.path, 1), bundle(chatty), talk, replace(options, batch_size=1))
    barrier = Barrier(count, timeout=60)
    copies = [Copy(chatty, barrier) for _ in range(count)]
    steps: list[tuple[float, float]] = []
    found = transcribe(copies, bundle(chatty), talk, options, lambda done, total: steps.append((done, total)))
    assert [(s.id, s.seek, s.start, s.end, s.tokens) for s in found.segments] == [
        (s.id, s.seek, s.start, s.end, s.tokens) for s in expected.segments
    ]
    assert found.text == expected.text != ""
    assert max(size for copy in copies for size in copy.batches) <= 2
    assert steps[-1] == pytest.approx((58.5, 58.5))


def test_copies_do_not_share_a_file_that_goes_one_after_the_other(chatty, ids, talk):
    first, second = Scripted(ids), Scripted(ids)
    transcribe([first, second], bundle(chatty), talk, TranscribeOptions(DecodeOptions("en", timestamps=True)))
    assert (len(first.asked), len(second.asked)) == (3, 0)


def test_what_goes_wrong_in_a_copy_is_raised(chatty, ids, talk):
    class Broken(Scripted):
        def generate(self, mel: np.ndarray, options: DecodeOptions) -> list[Decoded]:
            raise UsageError("this one cannot.")

    options = TranscribeOptions(DecodeOptions("en"), clips=((0, 10), (10, 20), (20, 30)), batch_size=2)
    with pytest.raises(UsageError, match="this one cannot"):
        transcribe([Scripted(ids), Broken(ids)], bundle(chatty), talk, options)


@pytest.mark.parametrize(
    ("items", "size", "copies", "sizes"),
    [(16, 8, 1, [8, 8]), (17, 8, 1, [5, 6, 6]), (5, 8, 2, [2, 3]), (1, 8, 2, [1]), (17, 8, 2, [4, 4, 4, 5]), (3, 1, 1, [1] * 3)],
)
def test_batches_are_even_and_give_every_copy_work(items, size, copies, sizes):
    found = batches(range(items), size, copies)
    assert [len(batch) for batch in found] == sizes
    assert [item for batch in found for item in batch] == list(range(items))


def test_progress_counts_the_seconds_of_the_clips(chatty, ids, talk):
    steps: list[tuple[float, float]] = []
    options = TranscribeOptions(DecodeOptions("en", timestamps=True), clips=((10, 50), (60, 99)))
    transcribe(Scripted(ids), bundle(chatty), talk, options, lambda done, total: steps.append((done, total)))
    assert steps == [(30, 50), (40, 50), (50, 50)]


def test_trimmed_windows_end_after_their_audio(chatty, ids, tmp_path):
    """30 s, then 4 s and the margin; the language is heard in such a window too."""
    soundfile.write(tmp_path / "talk.wav", np.random.default_rng(0).normal(size=34 * 16000) * 0.1, 16000)
    model = Scripted(ids)
    transcribe(model, bundle(chatty), tmp_path / "talk.wav", TranscribeOptions(replace(POLICY, language="en"), trim_silence=True))
    assert [mel.shape[2] for mel, _ in model.asked] == [3000, 400 + MARGIN]
    silence = model.asked[1][0][..., 400:]
    assert (silence == silence.min()).all()
    assert silence.min() <= model.asked[1][0].min()


def test_trimming_needs_an_encoder_that_takes_it(chatty, ids, talk):
    model = Scripted(ids)
    model.short_windows = False
    with pytest.raises(UsageError, match="whole windows of 30 s"):
        transcribe(model, bundle(chatty), talk, TranscribeOptions(POLICY, trim_silence=True))
