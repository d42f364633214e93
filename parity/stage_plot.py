"""The localiser's picture: error by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity.localise import Localised, Stage

SMALLEST = 1e-9  # a logarithmic axis has no place for equality
LARGEST = 1e3  # … nor for what is not a number
INCHES_A_STAGE, HEIGHT = 0.34, 5.2


def write(file: Path, localised: Localised) -> None:
    """Write a PNG, SVG or PDF, by the file's name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    stages = [stage for stage in localised.stages if stage.own is not None and stage.error is not None]
    places = range(len(stages))
    figure, axes = plt.subplots(figsize=(max(6, 2 + INCHES_A_STAGE * len(stages)), HEIGHT), layout="constrained")
    axes.plot(places, [_clip(s.error) for s in stages], "o-", color="0.6", label="error of what leaves the stage")
    axes.plot(places, [_clip(s.own) for s in stages], "s", color="tab:blue", label="error of the stage alone")
    axes.step(places, [_clip(s.bound) for s in stages], "--", where="mid", color="tab:orange", label="bound of the stage alone")
    guilty = [(place, _clip(s.own)) for place, s in zip(places, stages, strict=True) if s.out]
    if guilty:
        axes.plot(*zip(*guilty, strict=True), "s", color="tab:red", ms=10, label="out of bounds")
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    axes.set_xticks(places, [s.title for s in stages], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(f"{localised.artifact}, {localised.clip}: {verdict(localised.culprit)}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    with mpl.rc_context({"svg.fonttype": "none"}):  # words stay words
        figure.savefig(file, dpi=150)
    plt.close(figure)


def verdict(culprit: Stage | None) -> str:
    """The verdict in a few words."""
    return "every stage in bounds" if culprit is None else f"first out of bounds: {culprit.title}"


def _clip(value: float | None) -> float:
    return min(max(value or 0.0, SMALLEST), LARGEST)
