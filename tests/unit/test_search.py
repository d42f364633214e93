"""The search without its laboratory: budgets, the space, and what is confirmed, rejected, resumed and shown."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from asr_core.checkpoint import Checkpoint
from asr_export.compress import main
from compressors import base, budget, search
from compressors.budget import Figures
from compressors.search import Point, Search
from compressors.space import Candidate, Space
from parity.compare import Row

NAN = float("nan")


@pytest.fixture(scope="module")
def space(shape_folder) -> Space:
    return Space(Checkpoint.open(str(shape_folder("mini"))).dims, ["fp32", "int4"])


def cuts(candidate: Candidate) -> bool:
    """Whether more than roundings is done."""
    return any("quantise" not in step for step in candidate.steps)


class Paper:
    """A laboratory of formulas: bits and cuts make small, and cost words; ``lies`` are points too few clips flatter."""

    def __init__(self, *, slow: float = 0.0, lies: float = 0.0, flaky: bool = False) -> None:
        self.slow, self.lies, self.flaky = slow, lies, flaky
        self.roughs: list[str] = []
        self.fulls: list[str] = []
        self.pairs: list[str] = []
        self.dropped: list[str] = []

    def figures(self, candidate: Candidate) -> Figures:
        size, words, seconds = 8.0, 0.0, 0.1
        for step in candidate.steps:
            for name, given in step.items():
                few = name == "quantise" and given["bits"] == 4
                size *= {"quantise": 0.9 if few else 1.0, "layers": 0.8, "ffn": 0.9, "lowrank": 0.8}[name]
                words += {"quantise": 0.1 if few else 0.0, "layers": 2.0, "ffn": 0.5, "lowrank": 0.3}[name]
                seconds *= 1 + self.slow * (name != "quantise")
        size *= 0.3 if candidate.precision == "int4" else 1
        return Figures(size, words, words, seconds, 2 * seconds, 100.0)

    def ratio(self, candidate: Candidate, plain: Candidate) -> float:
        self.pairs.append(candidate.key)
        return self.figures(candidate).latency_p50 / self.figures(plain).latency_p50

    def rough(self, candidate: Candidate, limit_mb: float | None) -> Figures | None:
        self.roughs.append(candidate.key)
        made = self.figures(candidate)
        if limit_mb is not None and made.size > limit_mb:
            return budget.too_large(made.size)
        return made

    def full(self, candidate: Candidate) -> Figures | None:
        self.fulls.append(candidate.key)
        made = self.figures(candidate)
        made = replace(made, delta_wer=made.delta_wer + self.lies * cuts(candidate))
        second = self.fulls.count(candidate.key) > 1
        return replace(made, status="fail", reason="ΔWER") if self.flaky and second and cuts(candidate) else made

    def drop(self, candidate: Candidate) -> None:
        self.dropped.append(candidate.key)


def searched(space: Space, lab: Paper, folder: Path, text: str, **settings) -> search.Found:
    return Search(space, budget.parse(text), lab, folder, **{"trials": 12} | settings).run()


# --- budgets


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("size<=3MB, delta_wer<=0.5, latency_p95<=50ms", {"size": 3, "delta_wer": 0.5, "latency_p95": 0.05}),
        ("size ≤ 1.5 GB", {"size": 1500}),
        ("delta_wer<=-0.1points,memory<=200", {"delta_wer": -0.1, "memory": 200}),
        ("latency_p50<=2e-2s", {"latency_p50": 0.02}),
    ],
)
def test_a_budget_is_read(text, bounds):
    assert {bound.figure: pytest.approx(bound.limit) for bound in budget.parse(text).bounds} == bounds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the budget is empty"),
        ("speed<=3", "unknown figure 'speed'; the known ones: size, delta_wer,"),
        ("size<3MB", "'size<3MB' is not FIGURE<=NUMBER"),
        ("size<=3s", "size is not measured in 's', but in MB,"),
        ("size<=0MB", "nothing can have 'size<=0MB'"),
        ("size<=1e1e1", "no number"),
        ("size<=1, size<=2", "bounds size twice"),
    ],
)
def test_a_budget_that_is_none(text, message, tmp_path):
    done = CliRunner().invoke(main, ["search", "--budget", text, "--target", "onnx", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_excess_is_a_share_of_the_limit():
    figures = Figures(3.0, 1.0, 0.2, 0.1, 0.2, 100)
    assert budget.parse("size<=2, delta_wer<=0, latency_p95<=1").excess(figures) == pytest.approx(0.5 + 1.0)
    assert budget.parse("size<=3").excess(figures) == 0


# --- the space


def test_every_choice_is_a_recipe(space):
    plain = space.candidate(space.plain("fp32"))
    assert plain == Candidate("fp32", [])
    chosen = space.plain("int4") | {"decoder_layers": 1, "ffn": 0.5, "rank": 0.25, "encoder_bits_1": 4}
    made = replace(space, repair=7).candidate(chosen)
    assert made.steps == [
        {"layers": {"decoder": [0]}},
        {"ffn": {"share": 0.5}},
        {"lowrank": {"share": 0.25}},
        {"finetune": {"steps": 7}},
        {
            "quantise": {
                "bits": 8,
                "body": True,
                "embedding": True,
                "only": ["model.encoder.layers.0.*", "model.decoder.layers.0.*"],
            }
        },
        {"quantise": {"bits": 4, "body": True, "embedding": False, "only": ["model.encoder.layers.1.*"], "group": 32}},
    ]
    for step in made.steps:
        for name, given in step.items():
            base.parameters(name, given)  # no complaint
    assert made.key != plain.key
    assert str(made).endswith("then quantise to 4 bits encoder 1")
    assert "quantise to 8 bits encoder 0, decoder 0, embedding" in str(made)


def test_bits_follow_the_layers_that_stay(space):
    chosen = space.plain("int4") | {"decoder_layers": 1, "decoder_bits_0": 4}
    assert space.candidate(chosen).steps[-1]["quantise"]["only"] == ["model.decoder.layers.0.*"]


def test_bits_are_chosen_only_where_they_make_something_smaller(space):
    assert not [name for name in space.choices("fp32") if "bits" in name]
    assert len(space.starts("fp32")) == 1
    most, fewest = map(space.candidate, space.starts("int4"))
    assert [step["quantise"]["bits"] for step in most.steps + fewest.steps] == [8, 4]
    assert len([name for name in space.choices("int4") if "bits" in name]) == 5  # two layers of each side, and the embedding


# --- the search


@pytest.mark.parametrize("text", ["size<=2.4, delta_wer<=0.2", "size<=4", "delta_wer<=1, latency_p95<=210ms"])
def test_a_budget_that_can_be_met_is_met(space, tmp_path, text):
    lab = Paper()
    found = searched(space, lab, tmp_path, text)
    assert found.winner is not None
    assert budget.parse(text).excess(found.winner.figures) == 0
    assert lab.fulls[-2:] == [found.winner.candidate.key] * 2  # measured twice, on everything
    feasible = [p.figures.size for p in found.points if p.figures.measured and budget.parse(text).excess(p.figures) == 0]
    assert found.winner.figures.size == min(feasible)


def test_what_fails_on_all_clips_is_never_reported(space, tmp_path):
    found = searched(space, Paper(lies=3.0), tmp_path, "delta_wer<=0.5", trials=24)
    assert not cuts(found.winner.candidate)
    assert found.rejected
    assert all("delta_wer<=0.5 points not met" in reason for reason in found.rejected)


def test_what_fails_a_second_time_is_never_reported(space, tmp_path):
    found = searched(space, Paper(flaky=True), tmp_path, "delta_wer<=0.5", trials=24)
    assert not cuts(found.winner.candidate)
    assert found.rejected
    assert all("fail: ΔWER" in reason for reason in found.rejected)


def test_size_that_costs_speed_is_rejected_unless_asked_for(space, tmp_path):
    lab = Paper(slow=0.2)
    found = searched(space, lab, tmp_path / "a", "size<=6")
    assert not cuts(found.winner.candidate)
    assert any("times as slow as the source" in reason for reason in found.rejected)
    assert max(lab.pairs.count(key) for key in lab.pairs) == search.TURNS  # slow every time, or it is not held against it
    assert cuts(searched(space, Paper(slow=0.2), tmp_path / "b", "size<=6", allow_slower=True).winner.candidate)


def test_one_slow_moment_costs_nobody_the_win(space, tmp_path):
    class Busy(Paper):
        """A machine on which every first measurement of a pair's candidate meets another job."""

        def ratio(self, candidate: Candidate, plain: Candidate) -> float:
            return super().ratio(candidate, plain) * (3 if candidate.key not in self.pairs else 1)

    found = searched(space, Busy(), tmp_path, "size<=2.4")
    assert found.winner.figures.size == min(point.figures.size for point in found.points)


def test_nobody_meets_it_and_the_nearest_is_shown(space, tmp_path):
    lab = Paper()
    found = searched(space, lab, tmp_path, "size<=0.01", trials=12)
    assert found.winner is None
    assert not lab.fulls
    assert found.nearest.figures.size == min(point.figures.size for point in found.points)
    # What is too large is not even run: of all points only the source itself was measured.
    assert [point.figures.measured for point in found.points].count(True) == 1
    assert len(set(lab.dropped)) == len(found.points) - 1


def test_a_killed_search_goes_on(space, tmp_path):
    class Killed(Paper):
        def rough(self, candidate: Candidate, limit_mb: float | None) -> Figures | None:
            if len(self.roughs) == 6:
                raise KeyboardInterrupt
            return super().rough(candidate, limit_mb)

    first = Killed()
    with pytest.raises(KeyboardInterrupt):
        searched(space, first, tmp_path, "delta_wer<=0.2")
    second = Paper()
    found = searched(space, second, tmp_path, "delta_wer<=0.2")
    assert found.winner is not None
    assert not set(first.roughs) & set(second.roughs)  # nothing is measured twice
    assert len(found.points) >= 6
    third = Paper()
    other = searched(space, third, tmp_path, "delta_wer<=0.3", trials=2)  # another budget begins with what is known
    assert not set(third.roughs) & {*first.roughs, *second.roughs}
    assert {point.candidate.key for point in other.points} >= {point.candidate.key for point in found.points}


def test_the_front_is_what_nothing_beats():
    def point(size: float, words: float, seconds: float) -> Point:
        return Point(Candidate(f"{size}", []), Figures(size, words, words, seconds, seconds, 1))

    points = [point(1, 3, 1), point(2, 2, 1), point(3, 2, 1), point(3, 2, 0.5), point(4, 0, 2), point(NAN, NAN, NAN)]
    assert [p.figures.size for p in search.front(points)] == [1, 2, 3, 4]
    assert math.isclose(search.front(points)[2].figures.latency_p50, 0.5)


def test_the_picture(space, tmp_path):
    found = searched(space, Paper(), tmp_path, "size<=4", trials=4)
    search.plot(found.points, found.winner, budget.parse("size<=4"), tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


# --- the laboratory


def test_figures_of_a_row():
    from compressors.lab import figures_of

    row = Row("onnx", "int8", "undecided", "few", delta_wer=0.01, delta_wer_interval=[-0.005, 0.02], latency_p50_s=0.1,
              latency_p95_s=0.2, peak_rss_mb=300.0)  # fmt: skip
    assert figures_of(row, 3.5) == Figures(3.5, 1.0, -0.5, 0.1, 0.2, 300.0, "undecided", "few")
    assert figures_of(Row("onnx", "int8", "crashed"), 3.5) is None


def test_figures_survive_the_disk(space, tmp_path):
    searched(space, Paper(), tmp_path, "size<=4", trials=3)
    kept = [json.loads(file.read_text()) for file in (tmp_path / search.FIGURES).iterdir()]
    assert all(Figures(**one) for one in kept)
