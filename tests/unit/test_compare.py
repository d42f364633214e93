"""Rows and verdicts from planted measurements: near-ties and breaks, axes apart, sets too small to tell."""

import json
from dataclasses import fields

import numpy as np
import pytest

from parity import compare, weights
from parity.calibration import Calibration, Noise
from parity.data import Utterance

VOCAB = 12
WORDS = "zero one two three four five six seven eight nine".split()


def write(folder, transcripts: list[list[int]], margin: float | None = None):
    """A measurement whose tokens spell digits; ``margin`` at every step makes it a reference's."""
    folder.mkdir(exist_ok=True)
    timings = {"encode_s": 0.1, "decode_s": 0.2, "prompt_s": 0.05}
    lines = []
    for tokens in transcripts:
        row = {"tokens": tokens, "text": " ".join(WORDS[token] for token in tokens), "timings": timings}
        lines.append(json.dumps(row | ({} if margin is None else {"margins": [margin] * (len(tokens) + 1)})))
    (folder / "decoded.jsonl").write_text("\n".join(lines))
    return folder


def plant(folder, index: int, offset: float = 0.0):
    """A probe's arrays, all of its logits but the best ``offset`` off."""
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 4] = 5
    logits[:, 5:] += offset
    np.savez(weights.weights_file(folder, index), encoder=np.ones((4, 2), np.float32), logits=logits)


def row(reference, candidate, spoken: list[list[int]], precision: str, bounds=None, target="onnx"):
    utterances = [Utterance(f"u{i}", reference, " ".join(WORDS[t] for t in tokens), 1.0) for i, tokens in enumerate(spoken)]
    return compare.compare(
        target=target,
        precision=precision,
        reference=reference,
        candidate=candidate,
        measured={"decoder": "step", "timed": True, "load_s": 1.0, "peak_rss_mb": 1.0, "size_mb": 1.0},
        utterances=utterances,
        normalise=lambda text, language: text.lower(),
        probes=weights.compare_probes(reference, candidate),
        bounds=bounds or compare.thresholds("parity", precision),
    )


@pytest.fixture
def spoken() -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 10, (110, 6)).tolist()


def changed(spoken: list[list[int]], count: int) -> list[list[int]]:
    """The first word of the first ``count`` utterances is another."""
    return [[(tokens[0] + 1) % 10, *tokens[1:]] if i < count else tokens for i, tokens in enumerate(spoken)]


def test_every_figure_belongs_to_one_axis():
    named = [name for axis in compare.AXES.values() for name in axis]
    assert len(named) == len(set(named))
    about = {"target", "precision", "status", "reason", "decoder"}
    assert set(named) | about == {field.name for field in fields(compare.Row)}


def test_equal_measurements_pass(tmp_path, spoken):
    reference, candidate = write(tmp_path / "a", spoken, margin=3.0), write(tmp_path / "b", spoken)
    found = row(reference, candidate, spoken, "fp32")
    assert (found.status, found.reason, found.flips, found.breaks, found.near_ties) == ("pass", "", [], 0, 0)
    assert (found.delta_wer, found.delta_wer_interval, found.no_worse_share) == (0, [0, 0], 1)


@pytest.mark.parametrize(("margin", "kind", "status"), [(1e-6, "near-tie", "pass"), (1e-3, "break", "fail")])
def test_a_flip_inside_the_references_noise_is_a_near_tie(tmp_path, spoken, margin, kind, status):
    reference, candidate = write(tmp_path / "a", spoken, margin), write(tmp_path / "b", changed(spoken, 1))
    bounds = {**compare.thresholds("parity", "fp32"), "near_tie": {"max": 1e-4}}
    found = row(reference, candidate, spoken, "fp32", bounds)
    assert found.status == status
    assert found.flips == [{"utterance": "u0", "position": 0, "margin": margin, "kind": kind}]
    assert (found.near_ties, found.breaks) == ((1, 0) if kind == "near-tie" else (0, 1))
    assert found.token_match == pytest.approx(109 / 110)
    assert ("breaks 1 > 0" in found.reason) == (status == "fail")


def test_without_a_noise_every_flip_breaks(tmp_path, spoken):
    reference, candidate = write(tmp_path / "a", spoken, 0.0), write(tmp_path / "b", changed(spoken, 1))
    assert row(reference, candidate, spoken, "fp32").breaks == 1


def test_a_candidate_that_goes_on_beyond_the_reference_breaks(tmp_path, spoken):
    reference = write(tmp_path / "a", spoken, 0.0)
    rows = [json.loads(line) for line in (reference / "decoded.jsonl").read_text().splitlines()]
    rows[0]["margins"].pop()  # it reached its bound on new tokens: there was no step for the end
    (reference / "decoded.jsonl").write_text("\n".join(map(json.dumps, rows)))
    candidate = write(tmp_path / "b", [[*spoken[0], 1], *spoken[1:]])
    bounds = {**compare.thresholds("parity", "fp32"), "near_tie": {"max": 1e-4}}
    assert row(reference, candidate, spoken, "fp32", bounds).flips[0] == {
        "utterance": "u0", "position": 6, "margin": None, "kind": "break",
    }  # fmt: skip


def test_three_words_in_six_hundred_pass_and_ten_utterances_are_undecided(tmp_path, spoken):
    reference, candidate = write(tmp_path / "a", spoken, 3.0), write(tmp_path / "b", changed(spoken, 3))
    large = row(reference, candidate, spoken, "int8")
    assert (large.status, large.breaks) == ("pass", 3)
    assert large.delta_wer == pytest.approx(3 / 660)
    few, heard = spoken[:10], changed(spoken[:10], 1)
    small = row(write(tmp_path / "c", few, 3.0), write(tmp_path / "d", heard), few, "int8")
    assert small.status == "undecided"
    assert small.utterances_needed > 50
    assert f"about {small.utterances_needed} utterances would tell" in small.reason


@pytest.mark.parametrize(("precision", "wrong"), [("int8", 10), ("palette4", 40)])
def test_a_real_loss_fails_on_a_large_set_and_an_utter_one_on_a_small(tmp_path, spoken, precision, wrong):
    reference, candidate = write(tmp_path / "a", spoken, 3.0), write(tmp_path / "b", changed(spoken, wrong))
    assert row(reference, candidate, spoken, precision).status == "fail"
    few = spoken[:10]
    found = row(write(tmp_path / "c", few, 3.0), write(tmp_path / "d", changed(few, 10)), few, precision)
    assert found.status == "fail"
    assert "ΔWER" in found.reason


def test_the_weights_axis_fails_by_itself_and_nan_is_named(tmp_path, spoken):
    reference, candidate = write(tmp_path / "a", spoken, 3.0), write(tmp_path / "b", spoken)
    plant(reference, 0)
    for offset, shown in ((0.5, 0.5), (np.nan, None)):
        plant(candidate, 0, offset)
        bounds = {**compare.thresholds("parity", "fp32"), **quiet().bounds("fp32")}
        found = row(reference, candidate, spoken, "fp32", bounds)
        assert found.status == "fail"
        assert "logits_error" in found.reason
        assert "PyTorch's own noise" in found.reason
        assert found.logits_max_abs == shown
        json.dumps(found.logits_kl_max, allow_nan=False)


def quiet() -> Calibration:
    noise = Noise("order", "", 0.1, "", 1e-6, 2e-6, 3e-5, 4e-6, 0.0, 1.0)
    half = Noise("fp16", "", 0.1, "", 1e-2, 2e-3, 3e-2, 3e-3, 0.0, 1.0)
    unable = Noise("fp16-weights", "", 0.1, "no kernel")
    return Calibration((noise, half, unable), (0, 1), 20.0)


def test_bounds_are_the_noise_times_the_factor():
    bounds = quiet().bounds("fp32")
    assert bounds["encoder_error"]["max"] == pytest.approx(20 * 2e-6)
    assert bounds["logits_error"]["max"] == pytest.approx(20 * 4e-6)
    assert bounds["near_tie"]["max"] == pytest.approx(6e-5)
    assert quiet().bounds("fp16-stateful") == quiet().bounds("fp16")
    assert quiet().bounds("fp16")["logits_error"]["max"] == pytest.approx(4 * 3e-3)
    assert set(quiet().bounds("int8")) == {"near_tie"}
    assert quiet().bounds("int5") == {}


def test_a_silent_noise_leaves_one_step_of_the_format():
    silent = Calibration((Noise("order", "", 0.1, "", 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),), (0,), 20.0)
    bounds = silent.bounds("fp32")
    assert bounds["encoder_error"]["max"] == pytest.approx(20 * 2**-23)
    assert bounds["near_tie"]["max"] == pytest.approx(2 * 20 * 2**-23)
    assert silent.bounds("fp16")["logits_error"]["max"] == pytest.approx(4 * 2**-10)


def test_the_calibration_says_how_each_bound_came_about():
    document = json.loads(json.dumps(quiet().document([0.5, 1e-5, float("inf"), 2.0]), allow_nan=False))
    bound = document["bounds"]["fp32"]["logits_error"]
    assert bound["max"] == bound["factor"] * max(bound["noise"], bound["floor"])
    assert document["margins"]["steps"] == 3
    assert document["margins"]["undecided_steps"]["fp32"] == 1
    assert [one["kind"] for one in document["noise"]] == ["order", "fp16", "fp16-weights"]
    assert document["noise"][2]["reason"] == "no kernel"


def test_counts_of_an_utterance_are_those_made_by_hand():
    counts = compare.word_errors(["one two three", "", "four"], ["one too three four", "five", ""])
    assert counts.errors.tolist() == [2, 1, 1]
    assert counts.insertions.tolist() == [1, 1, 0]
    assert counts.words.tolist() == [3, 0, 1]
    assert counts.rate == 1.0
    assert compare.character_errors(["ab"], ["abc"]).rate == 0.5
    assert compare.word_errors([""], ["one two"]).errors.tolist() == [2]
