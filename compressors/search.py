"""The search for the smallest artifact within a budget: Optuna proposes, few clips sort out, all clips and the gate confirm.

Everything that was found lies in one folder, so that a search goes on where it was killed, and one with another budget begins
with what is known.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from asr_core.errors import GateError
from compressors.budget import Budget, Figures
from compressors.space import Candidate, Space

STUDY = "study.db"
FIGURES = "figures"
ADOPTED = "adopted"  # points that a study began with because other budgets' studies had measured them
# One latency differs from the next by some per cent even on an idle machine; a loss of speed is what is beyond that, whenever
# the two are measured one after the other.
SLOWER = 1.1
TURNS = 3
CONFIRMATIONS = 2  # independent measurements of a winner, which both have to meet the budget and pass the gate
STARTUP = 10  # trials at random before the optimiser has an opinion
UNMEASURED = 1e3  # the score of what gave no figures
Tell = Callable[[str], None]


class Lab(Protocol):
    """Makes artifacts of candidates and measures them."""

    def rough(self, candidate: Candidate, limit_mb: float | None) -> Figures | None:
        """On few clips; nothing is run where the artifact is above ``limit_mb``. None where there is nothing to measure."""
        ...

    def full(self, candidate: Candidate) -> Figures | None:
        """On all clips, anew at every call, with the gate's verdict."""
        ...

    def ratio(self, candidate: Candidate, plain: Candidate) -> float:
        """The candidate's median latency over the plain one's, measured one after the other, anew at every call."""
        ...

    def drop(self, candidate: Candidate) -> None:
        """Forget what was made of a loser."""
        ...


@dataclass(frozen=True)
class Point:
    """A candidate and what it measured; ``slower`` is the ratio of latencies for which it was refused."""

    candidate: Candidate
    figures: Figures
    slower: float | None = None


@dataclass(frozen=True)
class Found:
    """What a search came to: the confirmed winner (None: nobody met the budget), every point, and the nearest to the budget."""

    winner: Point | None
    points: list[Point]
    nearest: Point | None
    rejected: list[str] = field(default_factory=list)


@dataclass
class Search:
    """One search; ``plain`` is the source's own artifact, whose speed a smaller one must keep unless ``allow_slower``."""

    space: Space
    budget: Budget
    lab: Lab
    folder: Path
    trials: int
    seed: int = 0
    allow_slower: bool = False
    tell: Tell = lambda stage: None
    _ratios: dict[str, float] = field(default_factory=dict, init=False)  # of what looked slow, by candidate

    def run(self) -> Found:
        """Propose and sort out until ``trials`` are through, then confirm from the best down."""
        plain = self.space.candidate(self.space.plain(self.space.precisions[0]))
        self.tell(f"the source as it is, {plain.precision}")
        figures = self._known(plain, None)
        if figures is None:
            raise GateError(f"the source's own {plain.precision} artifact gives no figures; nothing can be compared with it.")
        self._plain = Point(plain, figures)
        study = self._study()
        wanted = self.trials + study.user_attrs[ADOPTED]
        done = sum(trial.state == TrialState.COMPLETE for trial in study.trials)
        if done < wanted:
            study.optimize(self._objective, n_trials=wanted - done)
        return self._confirmed(self._points(study))

    def _study(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        choices = {precision: self.space.choices(precision) for precision in self.space.precisions}
        settings = [self.allow_slower, choices, self.space.repair]
        name = f"{self.budget} #{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
        storage = f"sqlite:///{(self.folder / STUDY).absolute()}"
        known = optuna.get_all_study_names(storage) if (self.folder / STUDY).exists() else []
        study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
        # Another seed after a resumption, or the same proposals would come again.
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=self.seed + len(study.trials))
        if ADOPTED not in study.user_attrs:
            adopted = [trial.params for other in known if other != name for trial in _measured(other, storage)]
            for chosen in [*(start for precision in self.space.precisions for start in self.space.starts(precision)), *adopted]:
                study.enqueue_trial(chosen, skip_if_exists=True)
            study.set_user_attr(ADOPTED, len(adopted))
        for trial in study.trials:
            if "slower" in trial.user_attrs:
                self._ratios[Candidate(**trial.user_attrs["candidate"]).key] = trial.user_attrs["slower"]
            if trial.state == TrialState.RUNNING:  # killed in the middle
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params, skip_if_exists=False)
        return study

    def _objective(self, trial: Trial) -> float:
        candidate = self.space.suggest(trial)
        trial.set_user_attr("candidate", asdict(candidate))
        self.tell(f"trial {trial.number + 1}: {candidate}")
        figures = self._known(candidate, self.budget.limit("size"))
        score = UNMEASURED
        if figures is not None:
            trial.set_user_attr("figures", asdict(figures))
            score = self.score(figures)
            if score < 0 and (ratio := self._slowness(candidate, figures)) > SLOWER:
                score = ratio - SLOWER
                trial.set_user_attr("slower", ratio)
        if score > 0 and candidate != self._plain.candidate:
            self.lab.drop(candidate)
        return score

    def score(self, figures: Figures) -> float:
        """What is minimised: below -1 the share of the size that is saved (-2 is all), above 0 the sum of what is wrong."""
        # Few clips hold few words: a loser is one whose whole interval is beyond the limit, not its estimate.
        wrong = self.budget.excess(replace(figures, delta_wer=figures.delta_wer_low))
        return min(UNMEASURED, wrong) if wrong > 0 else figures.size / self._plain.figures.size - 2

    def _slowness(self, candidate: Candidate, figures: Figures) -> float:
        """How many times as slow as the plain one a candidate is at least; 1 where that does not matter."""
        if self.allow_slower or figures.latency_p50 <= SLOWER * self._plain.figures.latency_p50:
            return 1.0
        if candidate.key not in self._ratios:
            self._ratios[candidate.key] = self._slowest(candidate)
        return self._ratios[candidate.key]

    def _slowest(self, candidate: Candidate) -> float:
        """The smallest of several ratios of speed: what is slower is so every time."""
        ratio = math.inf
        for _ in range(TURNS):
            ratio = min(ratio, self.lab.ratio(candidate, self._plain.candidate))
            if ratio <= SLOWER:
                break
        return ratio

    def _known(self, candidate: Candidate, limit_mb: float | None) -> Figures | None:
        """A candidate's figures on few clips: those on disk, or new ones."""
        file = self.folder / FIGURES / f"{candidate.key}.json"
        if file.exists():
            known = Figures(**json.loads(file.read_text(encoding="utf-8")))
            if known.measured or (limit_mb is not None and known.size > limit_mb):
                return known
        figures = self.lab.rough(candidate, limit_mb)
        if figures is not None:
            write(file, json.dumps(asdict(figures)))
        return figures

    def _points(self, study: optuna.Study) -> list[Point]:
        """What the study's trials measured, each candidate once."""
        found = {self._plain.candidate.key: self._plain}
        for trial in study.get_trials(deepcopy=False):
            if (point := _point(trial)) is not None:
                found.setdefault(point.candidate.key, point)
        return list(found.values())

    def _confirmed(self, points: list[Point]) -> Found:
        """Measure the promising ones on everything, from the smallest up, until one holds."""
        promising = [point for point in points if point.slower is None and self.score(point.figures) < 0]
        promising.sort(key=lambda point: (point.figures.size, point.figures.latency_p50))
        rejected = [f"{point.candidate}: {slower(point.slower)}" for point in points if point.slower is not None]
        for point in promising:
            self.tell(f"confirm {point.candidate}")
            measured, reason = self._held(point.candidate)
            if measured is not None and not reason:
                return Found(Point(point.candidate, measured), points, point, rejected)
            rejected.append(f"{point.candidate}: {reason}")
        nearest = min((p for p in points if p not in promising), key=lambda p: self.score(p.figures), default=None)
        return Found(None, points, promising[0] if promising else nearest, rejected)

    def _held(self, candidate: Candidate) -> tuple[Figures | None, str]:
        """The worst of a candidate's confirming measurements, and why they don't confirm it."""
        if not self.allow_slower and candidate != self._plain.candidate and (ratio := self._slowest(candidate)) > SLOWER:
            return None, slower(ratio)
        worst: Figures | None = None
        for _ in range(CONFIRMATIONS):
            figures = self.lab.full(candidate)
            if figures is None:
                return None, "it gave no figures on all clips"
            worst = figures if worst is None else _worse(worst, figures)
            reasons = [] if figures.status == "pass" else [f"{figures.status}: {figures.reason}"]
            reasons += [f"{bound} not met: {getattr(figures, bound.figure):.4g}" for bound in self.budget.exceeded(figures)]
            if reasons:
                return worst, "; ".join(reasons)
        return worst, ""


def _measured(name: str, storage: str) -> list[FrozenTrial]:
    """The trials of another budget's study that have figures."""
    return [trial for trial in optuna.load_study(study_name=name, storage=storage).trials if FIGURES in trial.user_attrs]


def slower(ratio: float) -> str:
    """Why a point that is small enough did not win."""
    return f"{ratio:.2f} times as slow as the source as it is"


def _worse(one: Figures, other: Figures) -> Figures:
    """The larger of every figure."""
    larger = {name: max(value, getattr(other, name)) for name, value in asdict(one).items() if isinstance(value, float)}
    return replace(one, **larger)


def _point(trial: FrozenTrial) -> Point | None:
    if "figures" not in trial.user_attrs:
        return None
    found = trial.user_attrs
    return Point(Candidate(**found["candidate"]), Figures(**found["figures"]), found.get("slower"))


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one is at least as good as in size, ΔWER and latency; by size."""

    def axes(point: Point) -> tuple[float, float, float]:
        return point.figures.size, point.figures.delta_wer, point.figures.latency_p50

    measured = [point for point in points if point.figures.measured]
    best = [
        point
        for point in measured
        if not any(axes(o) != axes(point) and all(a <= b for a, b in zip(axes(o), axes(point), strict=True)) for o in measured)
    ]
    return sorted(best, key=axes)


def plot(points: Sequence[Point], winner: Point | None, budget: Budget, file: Path) -> None:
    """Draw size against ΔWER: what was measured, coloured by latency, the front, the budget's limits, and the winner.

    What was too large to be measured is a tick on the size axis.
    """
    from matplotlib.figure import Figure

    measured = [point.figures for point in points if point.figures.measured]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    latencies = [1e3 * f.latency_p50 for f in measured]
    drawn = axes.scatter([f.size for f in measured], [f.delta_wer for f in measured], c=latencies, cmap="viridis", zorder=2)
    best = [point.figures for point in front(points)]
    axes.step(
        [f.size for f in best], [f.delta_wer for f in best], where="post", color="grey", linewidth=0.8, label="Pareto front"
    )
    for figure_name, line in (("size", axes.axvline), ("delta_wer", axes.axhline)):
        if (limit := budget.limit(figure_name)) is not None:
            line(limit, color="tab:red", linestyle="--", linewidth=0.8)
    if unmeasured := [point.figures.size for point in points if not point.figures.measured]:
        bottom = axes.get_xaxis_transform()
        axes.plot(unmeasured, [0.02] * len(unmeasured), "|", color="grey", transform=bottom, label="too large, not run")
    if winner is not None:
        axes.plot(winner.figures.size, winner.figures.delta_wer, "r*", markersize=14, label="winner, on all clips", zorder=3)
    axes.legend(fontsize=8)
    axes.set(xlabel="size of the artifact, MB", ylabel="ΔWER on few clips, points", title=f"Search within {budget}")
    figure.colorbar(drawn, label="median latency, ms")
    figure.savefig(file, dpi=150)


def write(file: Path, text: str) -> None:
    """Write a file under its name only once it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
