"""What counts as worse than a machine's own past, on histories whose truth is known."""

import statistics

import numpy as np
import pytest

from parity import regression
from parity.history import History
from tests.support import report


@pytest.fixture
def past(tmp_path):
    """Append runs one by one; returns the judgement of the last."""
    opened = History(tmp_path / "h.sqlite")
    nights = iter(range(1000))

    def append(*documents):
        for document in documents:
            hour = next(nights)
            created = f"2026-01-{1 + hour // 24:02}T{hour % 24:02}:00:00+00:00"
            number = opened.append(document | {"created": created})
        return regression.judge(opened, opened.run(number))

    yield append
    opened.close()


def nights(count, seed=0, **changes):
    """Ordinary nights: speeds that vary by 3 %, memory by half a percent, the rest to the bit the same."""
    draw = np.random.default_rng(seed)
    return [report(speedup=draw.normal(2, 0.06), peak_rss_mb=draw.normal(200, 1), **changes) for _ in range(count)]


def figures(judgement):
    return [found.figure for found in judgement.regressions]


def test_four_runs_are_not_enough(past):
    judged = past(*nights(4), report(speedup=0.1))
    assert judged.regressions == []
    assert judged.not_enough == {"onnx-fp32": 4}
    assert judged.judged == 0


def test_five_runs_are_enough(past):
    judged = past(*nights(5), report(speedup=0.1))
    assert figures(judged) == ["speedup"]
    assert judged.not_enough == {}


@pytest.mark.parametrize(
    ("figure", "worse", "better"),
    [
        ("speedup", 1.4, 3.0),
        ("size_mb", 7.7, 3.0),
        ("peak_rss_mb", 230, 100),
        ("encoder_max_abs", 5e-5, 1e-7),
        ("logits_max_abs", 1e-4, 1e-7),
        ("top1_agreement", 0.97, 1.0),
        ("token_match", 0.97, 1.0),
        ("wer", 0.035, 0.01),
        ("delta_wer", 0.01, -0.01),
        ("cer", 0.03, 0.0),
    ],
)
def test_each_figure_knows_its_bad_side(past, figure, worse, better):
    assert past(*nights(12), report(**{figure: better})).regressions == []
    assert figures(past(report(**{figure: worse}))) == [figure]


def test_a_slow_night_is_no_regression(past):
    """Everything takes four times as long, PyTorch included: the ratio stays."""
    slow = report(speedup=2.0, rtfx=25.0, latency_p50_s=0.2, latency_p95_s=0.4, ttft_s=0.2, tokens_per_s=500.0, load_s=4.0)
    assert past(*nights(10), slow).regressions == []


def with_pytorch(document, rtfx):
    pytorch = document["rows"][0] | {"target": "pytorch", "rtfx": rtfx, "speedup": 1.0}
    return document | {"rows": [pytorch, *document["rows"]]}


def test_a_busy_machine_judges_no_speeds(past):
    """As measured: under load PyTorch ran at 28 % of its speed, and the speed-up fell by 21 %; sizes are judged all the same."""
    calm = [with_pytorch(document, rtfx) for document, rtfx in zip(nights(8), [46.9, 43.2, 48.4, 45.0, 46.8] * 2, strict=False)]
    judged = past(*calm, with_pytorch(report(speedup=1.5, size_mb=9.0), 12.9))
    assert figures(judged) == ["size_mb"] * 2
    assert (judged.busy.target, judged.busy.figure, judged.busy.today) == ("pytorch", "rtfx", 12.9)
    judged = past(with_pytorch(report(speedup=1.5), 44.0))
    assert figures(judged) == ["speedup"]
    assert judged.busy is None


def test_median_and_spread_are_the_textbook_ones(past):
    documents = [report(speedup=value) for value in (1.0, 1.5, 2.0, 2.5, 4.0)]
    (found,) = past(*documents, report(speedup=-10)).regressions
    assert found.median == 2.0
    assert found.spread == pytest.approx(0.5 / statistics.NormalDist().inv_cdf(0.75), rel=1e-4)
    assert (found.runs, found.today) == (5, -10)
    assert str(found) == "onnx-fp32 speedup: -10 today, 2 ± 0.74 over 5 runs before"


def test_one_wild_night_does_not_widen_the_spread(past):
    assert figures(past(*nights(8), report(speedup=50.0), *nights(4, seed=1), report(speedup=1.4))) == ["speedup"]


@pytest.mark.parametrize(
    "other", [{"threads": 2}, {"cores": 64}, {"fingerprint": "e" * 64}, {"data": "c" * 64}, {"precision": "int8"}]
)
def test_only_the_same_series_is_a_past(past, other):
    judged = past(*nights(10, **other), report(speedup=0.1))
    assert judged.regressions == []
    assert list(judged.not_enough.values()) == [0]


def test_failed_nights_are_no_yardstick(past):
    assert past(*nights(10, status="fail"), report(speedup=0.1)).not_enough == {"onnx-fp32": 0}


def test_what_was_not_measured_is_not_judged(past):
    assert past(*nights(10), report(speedup=None, status="pass")).regressions == []
    assert past(report(speedup=None, wer="NaN")).regressions == []


def test_a_resumed_speed_is_neither_judged_nor_a_yardstick(past):
    assert past(*nights(10), report(speedup=0.1, resumed=True)).regressions == []
    assert figures(past(report(size_mb=9.0, resumed=True))) == ["size_mb"]
    resumed = [document | {"resumed": True} for document in nights(40, seed=3)]
    assert figures(past(*resumed, report(speedup=0.1))) == []


def test_ordinary_nights_raise_no_alarm(past):
    """Two hundred nights of one artifact, each judged by those before it."""
    alarms = [figure for document in nights(200, seed=5) for figure in figures(past(document))]
    assert alarms == []
