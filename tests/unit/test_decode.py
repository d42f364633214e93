import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from transformers import WhisperForConditionalGeneration

from asr_core import decode
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import UsageError
from asr_core.filters import SuppressAtBegin, SuppressTokens
from asr_core.search import log_total
from runners import pytorch

STEPS = 30


def test_log_softmax_is_scipys():
    logits = (np.random.default_rng(0).normal(size=(3, 50)) * 30).astype(np.float32)
    logits[1, ::2] = -np.inf
    np.testing.assert_allclose(decode.log_softmax(logits), log_softmax(logits.astype(np.float64), axis=-1), atol=1e-12)


def test_log_total_is_scipys_logsumexp():
    logits = (np.random.default_rng(0).normal(size=(3, 50)) * 30).astype(np.float32)
    logits[1, ::2] = -np.inf
    np.testing.assert_allclose(log_total(logits), logsumexp(logits.astype(np.float64), axis=-1), rtol=1e-6)


def test_suppress_tokens_always():
    for produced in ([], [2, 2]):
        logits = np.zeros((2, 5), np.float32)
        SuppressTokens([1, 4]).apply(logits, [produced] * 2)
        assert np.isneginf(logits).tolist() == [[False, True, False, False, True]] * 2


def test_suppress_at_begin_only_there():
    for produced, suppressed in (([], True), ([2], False)):
        logits = np.zeros((2, 5), np.float32)
        SuppressAtBegin([3]).apply(logits, [produced] * 2)
        assert np.isneginf(logits[:, 3]).all() == suppressed
        assert np.isfinite(logits[:, [0, 1, 2, 4]]).all()


def mels(batch: int, n_mels: int = 80) -> np.ndarray:
    """Windows of different level and contrast."""
    noise = np.random.default_rng(0).uniform(-1, 1, size=(batch, n_mels, 3000))
    contrast, level = np.linspace(0.1, 1, batch), np.linspace(-0.5, 0.5, batch)
    return (noise * contrast[:, None, None] + level[:, None, None]).astype(np.float32)


def transformers_tokens(folder: Path, mel: np.ndarray, *, multilingual: bool, new_tokens: int) -> list[list[int]]:
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    policy = {"language": "en", "task": "transcribe"} if multilingual else {}
    generated = model.generate(
        torch.from_numpy(mel), max_new_tokens=new_tokens, do_sample=False, num_beams=1, return_timestamps=False, **policy
    ).tolist()
    end, start = model.generation_config.eos_token_id, model.generation_config.decoder_start_token_id
    rows = [row[4 if multilingual else 2 :] if row[0] == start else row for row in generated]
    return [row[: row.index(end)] if end in row else row for row in rows]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["mini", "mini.en", "mini-large-v3"])
def test_greedy_is_transformers(shape_folder, name, batch):
    folder = shape_folder(name)
    runner = pytorch.open(folder, 1)
    mel = mels(batch, runner.dims.n_mels)
    expected = transformers_tokens(folder, mel, multilingual=name != "mini.en", new_tokens=STEPS)
    assert [row.tokens for row in decode.generate(runner, mel, DecodeOptions(max_new_tokens=STEPS))] == expected
    assert all(len(tokens) == STEPS for tokens in expected)


@pytest.fixture(scope="module")
def runner(talkative):
    return pytorch.open(talkative, 1)


def test_greedy_ends_where_transformers_ends(talkative, runner):
    mel = mels(3)
    expected = transformers_tokens(talkative, mel, multilingual=True, new_tokens=STEPS)
    assert len({len(tokens) for tokens in expected}) == 3, "the oracle's rows should end at different lengths"
    assert [row.tokens for row in decode.generate(runner, mel, DecodeOptions(max_new_tokens=STEPS))] == expected


def test_rows_of_a_batch_do_not_know_each_other(runner):
    mel = mels(3)
    together = decode.generate(runner, mel, DecodeOptions(max_new_tokens=STEPS))
    alone = [decode.generate(runner, mel[i : i + 1], DecodeOptions(max_new_tokens=STEPS))[0] for i in range(3)]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.sum_logprob == pytest.approx(other.sum_logprob, abs=1e-4)


@pytest.mark.parametrize("limit", [1, 2, STEPS])
def test_sum_logprob_and_no_speech_are_those_of_one_full_pass(talkative, runner, limit):
    """The oracle feeds prompt and answer at once and sums the filtered log-probabilities, the end's included."""
    ids = runner.tokens
    model = WhisperForConditionalGeneration.from_pretrained(talkative).eval()
    for row, mel in zip(decode.generate(runner, mels(3), DecodeOptions(max_new_tokens=limit)), mels(3), strict=True):
        answer = row.tokens + ([ids.end] if len(row.tokens) < limit else [])
        prompt = ids.prompt()
        with torch.no_grad():
            fed = torch.tensor([prompt + answer[:-1]])
            logits = model(torch.from_numpy(mel[None]), decoder_input_ids=fed).logits[0].double()
        no_speech = logits[0].softmax(-1)[ids.no_speech]
        choices = logits[len(prompt) - 1 :]
        choices[:, ids.suppress] = -torch.inf
        choices[0, ids.begin_suppress] = -torch.inf
        chosen = choices.log_softmax(-1)[range(len(answer)), answer]
        assert row.sum_logprob == pytest.approx(chosen.sum().item(), abs=1e-4)
        assert row.no_speech_prob == pytest.approx(no_speech.item(), rel=1e-4)


def test_timings_add_up(runner):
    timings = decode.generate(runner, mels(1), DecodeOptions(max_new_tokens=5))[0].timings
    assert timings.encode_s > 0
    assert 0 < timings.prompt_s <= timings.decode_s


def test_the_bound_is_half_of_the_text_context(shape_folder):
    row = decode.generate(pytorch.open(shape_folder("mini"), 1), mels(1), DecodeOptions())[0]
    assert len(row.tokens) == 224


def test_unknown_language(runner):
    with pytest.raises(UsageError, match="unknown language 'xx'; this model knows: af, am, ar,"):
        decode.generate(runner, mels(1), DecodeOptions(language="xx"))


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"temperatures": ()}, "at least one"),
        ({"temperatures": (0.0, -0.2)}, "none below 0"),
        ({"beam_size": 0, "patience": 1.0}, "at least 1"),
        ({"patience": 2.0}, "needs a beam size"),
        ({"beam_size": 2, "patience": 0.1}, "product is at least 1"),
        ({"length_penalty": 1.5}, "between 0 and 1"),
    ],
)
def test_options_that_mean_nothing(options, wrong):
    with pytest.raises(UsageError, match=wrong):
        DecodeOptions(**options)


def test_options_travel_as_json():
    options = DecodeOptions(language=None, temperatures=(0.0, 0.5), prompt=(1, 2), suppress=(), beam_size=3)
    loaded = json.loads(json.dumps(asdict(options)))
    assert (
        DecodeOptions(**{name: tuple(value) if isinstance(value, list) else value for name, value in loaded.items()}) == options
    )


def test_english_only_models_neither_translate_nor_detect(shape_folder):
    runner = pytorch.open(shape_folder("mini.en"), 1)
    assert runner.detect_language(mels(2)) == [{"en": 1.0}] * 2
    for options in ({"task": "translate"}, {"language": "es"}):
        with pytest.raises(UsageError, match="only transcribes English"):
            runner.generate(mels(1), DecodeOptions(**options))


def test_what_the_decoder_is_given(runner):
    """faster-whisper puts hotwords before the prompt, and leaves them out where there is a prefix."""
    ids, hotwords, prompt = runner.tokens, tuple(range(1000, 1300)), tuple(range(2000, 2300))

    def given(**options: object) -> list[int]:
        return decode.initial_tokens(ids, DecodeOptions(**options), "en", 448)

    assert given(prompt=prompt[:2], hotwords=hotwords[:3]) == [ids.previous, 1000, 1001, 1002, 2000, 2001, *ids.prompt()]
    assert given(prompt=prompt) == [ids.previous, *prompt[-223:], *ids.prompt()]
    assert given(hotwords=hotwords, prompt=prompt) == [ids.previous, *hotwords[:223], *ids.prompt()]
    assert given(hotwords=hotwords[:23], prompt=prompt) == [ids.previous, *hotwords[:23], *prompt[-200:], *ids.prompt()]
    assert given(prefix=(7, 8), hotwords=hotwords, timestamps=True) == [*ids.prompt()[:3], 7, 8]
    assert given(prefix=prompt, max_new_tokens=200) == [*ids.prompt(), *prompt[-24:]]
    with pytest.raises(UsageError, match="454 tokens long; the model has 448"):
        given(prompt=prompt, prefix=(prompt)[:226])


def test_the_end_of_the_context_ends_an_answer(shape_folder):
    runner = pytorch.open(shape_folder("mini"), 1)
    options = DecodeOptions(prompt=tuple(range(300, 520)), prefix=tuple(range(300, 510)), suppress=(runner.tokens.end,))
    given = len(decode.initial_tokens(runner.tokens, options, "en", 448))
    assert len(runner.generate(mels(1), options)[0].tokens) == 449 - given  # the last token is chosen, but never read


@pytest.mark.parametrize("name", ["mini", "mini.en"])
def test_teacher_forcing_is_one_full_pass(shape_folder, name):
    folder = shape_folder(name)
    runner = pytorch.open(folder, 1)
    tokens = [*runner.tokens.prompt(), 300, 4000, 51, 299, 300, runner.tokens.end]
    stepped = decode.teacher_forced(runner, runner.encode(mels(1)), tokens)
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(mels(1)), decoder_input_ids=torch.tensor([tokens])).logits[0].numpy()
    # 1e-5: the same float32 sums in another order; logits here are below 1.
    np.testing.assert_allclose(stepped, expected, rtol=0, atol=1e-5)


def test_reorder_repeats_and_drops_rows(runner):
    """Rows of a reordered state continue as the rows they came from."""
    order = np.array([2, 0, 0])
    prompt = np.tile(np.array(runner.tokens.prompt(), np.int64), (3, 1))
    state = runner.encode(mels(3))
    runner.step(prompt, state)
    words = np.array([[300], [400], [500]], np.int64)
    moved = runner.step(words, runner.reorder(state, order)).copy()
    state = runner.encode(mels(3)[order])
    runner.step(prompt, state)
    np.testing.assert_allclose(moved, runner.step(words, state), rtol=0, atol=1e-5)


def test_checkpoint_and_runner_agree_on_sizes(talkative, runner):
    assert runner.dims == Checkpoint.open(talkative).dims
