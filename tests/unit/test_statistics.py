"""Intervals and verdicts against scipy, closed forms and counts made by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from parity import statistics
from parity.statistics import Edits, Interval


def edits(errors, words, insertions=None) -> Edits:
    errors = np.array(errors, np.int64)
    return Edits(errors, np.zeros_like(errors) if insertions is None else np.array(insertions), np.array(words, np.int64))


@pytest.fixture(scope="module")
def corpus() -> tuple[Edits, Edits]:
    """A reference at 8 % WER and a candidate with correlated errors, a point worse: 400 utterances of 3 to 25 words."""
    generator = np.random.default_rng(1)
    words = generator.integers(3, 26, 400)
    errors = generator.binomial(words, 0.08)
    return edits(errors, words), edits(np.maximum(errors + generator.choice([-1, 0, 0, 0, 0, 1, 1], 400), 0), words)


def test_the_interval_is_that_of_scipys_paired_bootstrap(corpus):
    reference, candidate = corpus
    ours = statistics.delta_interval(reference, candidate)
    theirs = stats.bootstrap(
        (candidate.errors, reference.errors, reference.words),
        lambda got, expected, words, axis: (got.sum(axis) - expected.sum(axis)) / words.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=10_000, random_state=np.random.default_rng(5),
    )  # fmt: skip
    interval = theirs.confidence_interval
    # Two samples of 10,000 resamples: the 2.5 % quantile of a normal law then has a standard error of 2.7 % of its spread,
    # and two of them differ by at most a fifth of it but for one time in a hundred thousand.
    tolerance = 0.2 * float(theirs.standard_error)
    assert ours.low == pytest.approx(interval.low, abs=tolerance)
    assert ours.high == pytest.approx(interval.high, abs=tolerance)
    assert ours.estimate == pytest.approx(candidate.rate - reference.rate)


def test_the_interval_is_that_of_normal_theory_on_a_large_set():
    """Utterances of equal length: the pooled difference is a mean, whose interval every textbook gives."""
    extra = np.random.default_rng(2).integers(-2, 4, 2000)
    reference, candidate = edits(np.full(2000, 5), np.full(2000, 10)), edits(5 + extra, np.full(2000, 10))
    ours = statistics.delta_interval(reference, candidate)
    half = stats.norm.ppf(0.975) * extra.std(ddof=1) / 10 / math.sqrt(2000)
    assert ours.low == pytest.approx(extra.mean() / 10 - half, abs=0.1 * half)  # resampling error of an end: 2 % of half
    assert ours.high == pytest.approx(extra.mean() / 10 + half, abs=0.1 * half)


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        words = generator.integers(2, 12, 150)
        extra = generator.choice([-1, 0, 1], 150, p=[0.04, 0.88, 0.08])
        reference = edits(np.ones(150), words)
        interval = statistics.delta_interval(reference, edits(1 + extra, words), resamples=2000)
        covered += interval.low <= 0.04 / words.mean() <= interval.high
    assert 300 * 0.90 <= covered <= 300 * 0.99  # three standard errors of 300 trials are 3.8 %; the percentile is a bit narrow


def test_the_same_set_gives_the_same_interval(corpus):
    assert statistics.delta_interval(*corpus) == statistics.delta_interval(*corpus)


def test_pairs_are_kept():
    """Utterances that differ a hundredfold in difficulty and not at all between the two: nothing is uncertain."""
    errors = np.random.default_rng(4).integers(0, 100, 50)
    same = edits(errors, np.full(50, 100))
    interval = statistics.delta_interval(same, edits(errors + 1, np.full(50, 100)))
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((0.01, 0.01, 0.01))


def test_silent_utterances_are_counted_and_a_silent_set_has_no_rate():
    reference, candidate = edits([0, 0, 0], [0, 0, 4]), edits([2, 0, 1], [0, 0, 4])
    interval = statistics.delta_interval(reference, candidate)
    assert interval.estimate == 0.75
    assert math.isfinite(interval.high)
    assert statistics.delta_interval(edits([0], [0]), edits([3], [0])) is None
    assert edits([3], [0]).rate is None


@pytest.mark.parametrize(
    ("estimate", "low", "high", "accepted", "status"),
    [
        (0.0, 0.0, 0.0, 0.005, "pass"),
        (0.004, -0.002, 0.015, 0.005, "pass"),
        (0.008, 0.002, 0.015, 0.005, "fail"),  # large enough to tell, and more than is accepted
        (0.018, 0.0, 0.055, 0.005, "undecided"),
        (0.0, -0.03, 0.03, 0.005, "undecided"),
        (0.3, 0.2, 0.4, 0.005, "fail"),  # ten utterances are enough to see that
        (0.015, 0.01, 0.025, None, "undecided"),
        (0.03, 0.021, 0.04, None, "fail"),
        (0.015, 0.01, 0.0199, None, "pass"),
        (0.0, -0.01, 0.02, 0.005, "undecided"),  # to end on the margin is not to end below it
        (math.nan, 0.0, 0.0, 0.005, "fail"),
        (0.0, math.nan, math.nan, 0.005, "fail"),
        (0.0, 0.0, math.inf, 0.005, "fail"),
    ],
)
def test_verdicts_of_non_inferiority(estimate, low, high, accepted, status):
    verdict = statistics.non_inferiority(Interval(estimate, low, high), 0.02, accepted)
    assert verdict.status == status
    assert bool(verdict.reason) == (status != "pass")


def test_the_advised_number_of_utterances_decides_four_times_in_five():
    """The sample size's own promise, by simulation: no loss in truth, margin of two points."""
    generator = np.random.default_rng(6)

    def draw(count: int) -> tuple[Edits, Edits]:
        words = generator.integers(3, 9, count)
        return edits(np.ones(count), words), edits(1 + generator.choice([-1, 0, 1], count, p=[0.06, 0.88, 0.06]), words)

    needed = statistics.utterances_needed(*draw(20_000), 0.02)
    passed = 0
    for _ in range(300):
        interval = statistics.delta_interval(*draw(needed), resamples=2000)
        passed += statistics.non_inferiority(interval, 0.02).status == "pass"
    assert 0.7 <= passed / 300 <= 0.9  # three standard errors of 300 trials at 0.8 are 7 %, the advice itself has 2 %


def test_the_advised_number_is_that_of_the_textbook_formula():
    """Equal lengths: Julious' formula for paired differences, z quantiles from scipy."""
    extra = np.array([1, -1, 0, 0, 1, 0, 0, -1, 0, 1] * 10)
    reference, candidate = edits(np.full(100, 2), np.full(100, 8)), edits(2 + extra, np.full(100, 8))
    difference = extra / 8
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    expected = math.ceil((z * difference.std(ddof=1) / (0.05 - difference.mean())) ** 2)
    assert statistics.utterances_needed(reference, candidate, 0.05) == expected
    assert statistics.utterances_needed(reference, reference, 0.05) is None
    assert statistics.utterances_needed(edits([1], [2]), edits([2], [2]), 0.05) is None


@pytest.mark.parametrize(
    ("hits", "count", "status"),
    [(110, 110, "pass"), (105, 110, "pass"), (19, 20, "pass"), (9, 10, "undecided"), (8, 10, "undecided"), (5, 10, "fail"),
     (100, 110, "undecided"), (90, 110, "fail")],
)  # fmt: skip
def test_shares_fail_only_where_chance_is_no_excuse(hits, count, status):
    verdict = statistics.at_least(hits, count, 0.95)
    assert verdict.status == status
    assert (stats.binom.cdf(hits, count, 0.95) < 0.025) == (status == "fail")
    assert (verdict.needed is not None) == (status == "undecided")
    assert statistics._binomial_tail(hits, count, 0.95) == pytest.approx(stats.binom.cdf(hits, count, 0.95), rel=1e-9)


def test_all_means_all():
    assert statistics.at_least(9, 10, 1.0).status == "fail"
    assert statistics.at_least(10, 10, 1.0).status == "pass"


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("", False),
        ("seven seven seven four", False),
        ("no no no no no", True),
        ("no no no no nobody", False),
        ("thank you for watching " * 5, True),
        ("and then " * 4 + "we left", False),
        ("a b c d e f g h i " * 6, True),  # a phrase of nine words: zlib finds it
        ("the cat sat on the mat and the dog sat on the cat", False),
    ],
)
def test_loops(text, looping):
    assert statistics.loops(text.strip()) == looping


def test_the_compression_ratio_is_whispers():
    from whisper.utils import compression_ratio

    for text in ("one two three", "ha " * 100, "übel " * 9):
        assert statistics.compression_ratio(text) == compression_ratio(text)


def test_quality_of_inference_by_hand():
    spoken = ["one two", "three", "", "four five six", "na na na na na na"]
    heard = ["one two", "", "noise", "four four four four four four five six", "na na na na na na"]
    reference = edits([0, 1, 0, 0, 0], [2, 1, 0, 3, 6])
    candidate = edits([0, 1, 1, 5, 0], [2, 1, 0, 3, 6], [0, 0, 1, 5, 0])
    assert statistics.quality(spoken, heard, reference, candidate) == {
        "no_worse_share": 3 / 5,
        "empty_rate": 1 / 4,
        "loop_rate": 1 / 5,
        "insertion_rate": 6 / 12,
    }


def test_one_failure_outweighs_every_doubt():
    def verdicts(*statuses):
        return [statistics.Verdict(status) for status in statuses]

    assert statistics.worst([]) == "pass"
    assert statistics.worst(verdicts("pass", "undecided")) == "undecided"
    assert statistics.worst(verdicts("undecided", "fail", "pass")) == "fail"
