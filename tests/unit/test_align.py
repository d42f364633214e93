"""Every rule of word timestamps, beside openai-whisper's ``timing.py``."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from whisper import timing

from asr_core import align
from asr_core.align import Alignment, AlignRequest
from asr_core.tokens import TokenIds, load_tokenizer
from tests import openai_oracle

TEXTS = {
    "en": ' "Hello," she said (twice): isn\'t it 3.5 % — or naïve?! …¿ok? ',
    "es": " ¿Qué tal? «Muy bien», dijo Ñandú: ¡vámonos!",
    "zh": "你好，世界。「今天」天气很好！",
    "ja": "こんにちは、👩‍🚀さん。",
    "th": "สวัสดีครับ 123",
}


@pytest.mark.parametrize("decimals", [8, 1, 0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 200), (60, 90)])
def test_path_is_openais(shape, decimals):
    """Rounded costs make ties, of which the same one must be taken."""
    for seed in range(5):
        cost = np.random.default_rng(seed).normal(size=shape).round(decimals)
        np.testing.assert_array_equal(np.array(align.warp(cost)), timing.dtw_cpu(cost.copy()))


@pytest.mark.parametrize("width", [1, 3, 4, 5, 50])
def test_median_filter_is_openais(width):
    rows = np.random.default_rng(0).normal(size=(6, width)).round(1).astype(np.float32)
    np.testing.assert_array_equal(align.median_filter(rows), timing.median_filter(torch.from_numpy(rows)[None], 7)[0].numpy())


def test_a_position_without_information_does_not_spoil_the_path():
    """Where all tokens give a position no weight at all, openai-whisper divides 0 by 0."""
    scores = np.full((1, 12, 100), -200, np.float32)
    for token in range(12):
        scores[0, token, 8 * token : 8 * token + 8] = 0
    matrix = align.attention_matrix(scores, 200)
    assert np.isfinite(matrix).all()
    text, time = align.warp(-matrix)
    assert [time[text == token].min() for token in range(1, 12)] == pytest.approx([8 * token for token in range(1, 12)], abs=4)


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("source", ["reference", "mini"])
def test_words_are_openais(language, source, shape_folder, trained):
    folder = trained.path if source == "reference" else shape_folder(source)
    tokenizer, theirs = load_tokenizer(folder), openai_oracle.tokenizer(folder, language)
    tokens = [*tokenizer.encode(TEXTS[language], add_special_tokens=False).ids, theirs.eot]
    words, word_tokens = theirs.split_to_word_tokens(tokens)
    assert align.split_words(tokenizer, tokens, theirs.eot, language) == list(zip(words, word_tokens, strict=True))
    broken = tokens[1:4] + tokens[-3:]  # pieces of characters stay pieces
    assert align.split_words(tokenizer, broken, theirs.eot, language) == list(
        zip(*theirs.split_to_word_tokens(broken), strict=True)
    )


@dataclass(frozen=True)
class Segment:
    start: float
    end: float
    tokens: list[int] = field(default_factory=list)


class Scripted:
    """A runner whose alignments are given."""

    def __init__(self, ids: TokenIds, found: Alignment) -> None:
        self.tokens = ids
        self.found = found

    def align(self, mel, requests):
        return [self.found]


@pytest.mark.parametrize("seed", range(40))
def test_segments_get_the_words_and_ends_of_openai(seed, monkeypatch, trained):
    """Random words, pauses, punctuation and segment ends, so that every rule about long words is met."""
    generator = np.random.default_rng(seed)
    ids = TokenIds.read(trained.path, trained.generation, trained.dims.n_text_ctx)
    tokenizer, theirs = load_tokenizer(trained.path), openai_oracle.tokenizer(trained.path)
    pieces = [" bread", " seven", ".", " (", "?", " thirty", "!", " mirror", ",", ' "']
    texts = [" a" + "".join(generator.choice(pieces, generator.integers(0, 9))) for _ in range(3)]
    tokens = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    tokens[generator.integers(3)] *= int(generator.integers(2))  # now and then one that says nothing
    flat = tuple(token for part in tokens for token in part)
    steps = generator.choice([0, 5, 10, 20, 40, 200], len(flat))
    times = np.concatenate([[generator.integers(0, 300)], steps]).cumsum()
    found = Alignment(np.arange(len(flat) + 1), times, generator.uniform(size=len(flat)))
    request = AlignRequest(0, flat, 3000)

    def scripted(*_, **__):
        return [
            timing.WordTiming(w.word, list(w.tokens), w.start, w.end, w.probability)
            for w in align.time_words(tokenizer, ids, request, found)
        ]

    monkeypatch.setattr(timing, "find_alignment", scripted)
    bounds = np.sort(generator.uniform(0, times[-1] / 50 + 1, 6))
    segments = [Segment(5 + bounds[2 * i], 5 + bounds[2 * i + 1], [ids.timestamp_begin, *tokens[i]]) for i in range(3)]
    expected = [{"start": s.start, "end": s.end, "tokens": s.tokens, "seek": 500} for s in segments]
    timing.add_word_timestamps(
        segments=expected, model=None, tokenizer=theirs, mel=None, num_frames=3000, last_speech_timestamp=1.0
    )
    window = {"frames": 3000, "offset": 5.0, "language": "en", "task": "transcribe", "last_speech": 1.0}
    spans = align.add_word_timestamps(segments, Scripted(ids, found), tokenizer, None, **window)
    for span, other in zip(spans, expected, strict=True):
        assert (span.start, span.end) == (other["start"], other["end"])
        assert [vars(word) for word in span.words] == other["words"]


def test_no_segments_no_words():
    aligner = SimpleNamespace(tokens=None)
    window = {"frames": 100, "offset": 0, "language": "en", "task": "transcribe", "last_speech": 0}
    assert align.add_word_timestamps([], aligner, None, None, **window) == []
