"""The tables and the picture of ``asr_export.bench_peers``: ratios to transformers' generate in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BASE = "transformers fp32"
OURS = "ours"
CLOCKS = {"cpu_s": "processor", "wall_s": "wall"}
INCHES_A_ROW = 0.24


def ratios(panel: Mapping[str, Any], clock: str) -> dict[str, list[float]]:
    """How many times less time than transformers' generate everyone took, round by round, sorted; none without it."""
    base = panel["samples"].get(BASE, [])
    return {
        name: sorted(one[clock] / own[clock] for one, own in zip(base, rows, strict=True))
        for name, rows in panel["samples"].items()
        if base
    }


def markdown(content: Mapping[str, Any]) -> str:
    """One table a model, fastest first, and who is not in it."""
    return "\n".join(_table(name, panel, content["tokens"]) for name, panel in content["panels"].items())


def _table(model: str, panel: Mapping[str, Any], tokens: int) -> str:
    judged = panel["wer"]
    task = "its clips, to their end" if judged else f"one window, {tokens} tokens"
    heads = ["", *(f"{clock}, × transformers" for clock in CLOCKS.values()), "processor s", *(["WER %"] if judged else [])]
    lines = [f"**{model}**: {task}", "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    by_clock = {clock: ratios(panel, clock) for clock in CLOCKS}
    medians = {name: statistics.median(row["cpu_s"] for row in rows) for name, rows in panel["samples"].items()}
    for name in sorted(medians, key=lambda name: medians[name]):
        cells = [_spread(found.get(name, [])) for found in by_clock.values()]
        cells += [f"{medians[name]:.3f}", *([f"{100 * judged[name]:.2f}"] if judged else [])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    missing = [f"{name}: {why}" for name, why in panel["absent"].items()]
    return "\n".join([*lines, "", *(f"Not measured: {line}." for line in missing), ""])


def _spread(found: list[float]) -> str:
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})" if found else "–"


def draw(file: Path, content: Mapping[str, Any]) -> None:
    """Write a PNG, SVG or PDF, by the file's name: processor time, one panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = {name: ratios(panel, "cpu_s") for name, panel in content["panels"].items()}
    rows = max(len(found) for found in panels.values())
    size = (5.2 * len(panels), 1.4 + INCHES_A_ROW * rows)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (model, found) in zip(all_axes[0], panels.items(), strict=True):
        order = sorted(found, key=lambda name: statistics.median(found[name]))
        middles = [statistics.median(found[name]) for name in order]
        around = [[m - found[n][0] for n, m in zip(order, middles, strict=True)],
                  [found[n][-1] - m for n, m in zip(order, middles, strict=True)]]  # fmt: skip
        colours = ["tab:blue" if name.startswith(OURS) else "0.65" for name in order]
        axes.barh(order, middles, xerr=around, color=colours, error_kw={"lw": 0.8, "ecolor": "0.2"})
        axes.axvline(1, color="0.3", lw=0.8)
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("times as fast as transformers (processor time)", fontsize=8)
        axes.tick_params(labelsize=7)
    with mpl.rc_context({"svg.fonttype": "none"}):  # words stay words
        figure.savefig(file, dpi=150)
    plt.close(figure)
