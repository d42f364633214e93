"""Shares of time by hand."""

import pytest

from parity.profile import OUTSIDE, Share, shares


def event(kind: str, seconds: float, own: float | None = None) -> dict:
    return {"kind": kind, "name": kind, "start": 0.0, "seconds": seconds, "own": seconds if own is None else own}


def test_shares_are_of_the_calls_time_and_nothing_counts_twice():
    calls = [
        {"part": "step", "start": 0.0, "seconds": 4.0, "events": [event("outer", 3.0, 1.0), event("inner", 2.0)]},
        {"part": "step", "start": 4.0, "seconds": 6.0, "events": [event("inner", 3.0), event("inner", 1.0)]},
    ]
    inner, rest, outer = shares(calls)
    assert inner == Share("step", "inner", 1.5, 3.0, pytest.approx(0.6))
    assert rest == Share("step", OUTSIDE, 1.0, 1.5, pytest.approx(0.3))
    assert outer == Share("step", "outer", 0.5, 0.5, pytest.approx(0.1))
