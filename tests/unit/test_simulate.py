import json

import pytest
from click.testing import CliRunner

from parity import simulate
from parity.simulate import Costs, drawn, most_workers, overhead

NOTHING = Costs(scheduler=0.0)


def test_workers_share_the_work():
    one = simulate.simulate([4.0, 2.0, 2.0], 2, NOTHING)
    assert (one.wall_s, one.busy, one.limit) == (4.0, 1.0, "workers")  # the second worker does both short ones


def test_the_longest_unit_bounds_the_run():
    one = simulate.simulate([1.0, 1.0, 6.0], 4, NOTHING)
    assert (one.wall_s, one.limit) == (6.0, "longest unit")
    assert one.busy == pytest.approx(8 / 24)


def test_a_scheduler_hands_out_one_unit_at_a_time():
    """Units begin at 1, 2, 3 and, the first worker being free since 3, at 4: the last one ends at 6."""
    one = simulate.simulate([2.0] * 4, 4, Costs(scheduler=1.0))
    assert (one.wall_s, one.limit) == (6.0, "scheduler")


def test_a_share_takes_one_result_at_a_time():
    """All four end at 1; their results are written at 3, 5, 7 and 9."""
    one = simulate.simulate([1.0] * 4, 4, Costs(scheduler=0.0, write=2.0))
    assert (one.wall_s, one.limit) == (9.0, "share")


def test_overhead_is_the_workers():
    one = simulate.simulate([3.0, 3.0], 2, Costs(scheduler=0.0, overhead=1.0))
    assert (one.wall_s, one.limit) == (4.0, "workers")


def test_the_client_compares_one_result_at_a_time_and_no_worker_waits_for_it():
    """One worker is done at 1, 2 and 3; the client at 6, 11 and 16."""
    one = simulate.simulate([1.0] * 3, 1, Costs(scheduler=0.0, client=5.0))
    assert (one.wall_s, one.limit) == (16.0, "client")


def test_where_each_bound_lies():
    bounds = most_workers([9.0, 27.0], Costs(scheduler=0.1, write=0.5, overhead=2.0))
    assert bounds == {
        "scheduler": pytest.approx(200), "share": pytest.approx(40), "client": float("inf"),
        "longest unit": pytest.approx(4 / 3)
    }  # fmt: skip


def test_units_are_drawn_until_the_work_is_done():
    units = drawn([1.0, 2.0], 100.0)
    assert 100 <= sum(units) < 102
    assert units == drawn([1.0, 2.0], 100.0)


UNITS = [
    {"name": "a-0", "worker": "x", "began_s": 1.0, "ended_s": 11.0, "own_s": 9.0, "utterances": 4},
    {"name": "a-1", "worker": "x", "began_s": 11.5, "ended_s": 22.0, "own_s": 10.0, "utterances": 4},
    {"name": "a-2", "worker": "y", "began_s": 0.0, "ended_s": 10.5, "own_s": 10.0, "utterances": 4},
]


def test_waiting_for_the_reference_is_no_overhead_of_a_unit():
    first = {"name": "pytorch-0", "worker": "y", "began_s": -60.0, "ended_s": -50.0, "own_s": 9.0, "utterances": 4}
    assert overhead([first, *UNITS]) == pytest.approx((1.0 + 2.0 + 0.5) / 4)


def test_overhead_is_what_the_workers_did_not_work():
    assert overhead(UNITS) == pytest.approx((2.0 + 0.5) / 3)  # 21 s of which 19 at work, 10.5 of which 10


def test_the_command_says_where_it_ends(tmp_path):
    document = {"units": UNITS, "data": {"audio_s": 120.0, "utterances": 12}, "harness": {"client_cpu_s": 1.2}}
    (tmp_path / "report.json").write_text(json.dumps(document))
    done = CliRunner().invoke(
        simulate.main, [str(tmp_path / "report.json"), "--hours", "10", "--workers", "1", "--workers", "64"]
    )
    assert done.exit_code == 0, done.output
    assert "measured: 3 units of 9.7 s, 0.83 s a unit beside the work (8.6 %; 2.8 % of 30 s)" in done.output
    assert "'client': 1.24" in done.output  # .1 s an utterance, 12 in 29 s of work: of 30 s
    assert "64 workers" in done.output
    assert "longest unit keeps" in done.output
