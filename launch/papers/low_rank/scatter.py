"""A score against the effective step and against the effective rank, side by side, by decay."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.papers.low_rank.arms import Results
from launch.plots.panels import BLUE, GREY, ORANGE, legend_below, panels

DECAY_STYLE = {"none": (GREY, "o"), "l2": (ORANGE, "s"), "frobenius": (BLUE, "^")}
DECAY_NAMES = {"none": "no decay", "l2": "L2 on the factors", "frobenius": "Frobenius"}
_CAUSES = {
    "effective_step": "effective step at the end: rate over mean |W|²",
    "effective_rank": "effective rank at the end",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm, its decay, its learning rate, 'full' (filled) or 'half' (open), and the text beside it."""

    arm: str
    kind: str
    rate: str
    text: str


def scatter(results: Results, points: Sequence[Point], score: str, label: str) -> Any:
    """Returns the figure; None where an arm or one of its scores is missing."""
    if not all(results.values(p.arm, name).size for p in points for name in (score, *_CAUSES)):
        return None
    figure, axes = panels(2, (12, 5), share_y=True)
    for one, (cause, words) in zip(axes, _CAUSES.items(), strict=True):
        for kind, (colour, marker) in DECAY_STYLE.items():
            for rate in ("full", "half"):
                mine = [p for p in points if (p.kind, p.rate) == (kind, rate)]
                pairs = [results.paired(name, p.arm) for p in mine for name in (cause, score)]
                at, scores = pairs[::2], pairs[1::2]
                for (x,), (y,), point in zip(at, scores, mine, strict=True):
                    one.plot(x, y, ls="", marker=".", ms=4, color=colour, alpha=0.6)
                    _write(one, point, float(np.mean(x)), float(np.mean(y)))
                one.plot(
                    [np.mean(x) for (x,) in at],
                    [np.mean(y) for (y,) in scores],
                    color=colour,
                    marker=marker,
                    ms=8,
                    mfc=colour if rate == "full" else "white",
                    ls="-" if rate == "full" else "--",
                    lw=1,
                    label=f"{DECAY_NAMES[kind]}, {rate} rate",
                )
        one.set_xlabel(words)
    low, high = axes[0].get_xlim()
    if low <= 0 or high > 10 * low:  # within a decade a logarithmic axis lacks readable ticks
        axes[0].set_xscale("log")
    axes[0].set_ylabel(label)
    legend_below(figure, axes[0], 3)
    return figure


def _write(axes: Any, point: Point, x: float, y: float) -> None:
    """Writes a point's text left of half rates and below Frobenius decay, where its neighbours have none."""
    half, below = point.rate == "half", point.kind == "frobenius"
    axes.annotate(
        point.text,
        (x, y),
        (-7 if half else 7, -4 if below else 4),
        textcoords="offset points",
        fontsize=7.5,
        ha="right" if half else "left",
        va="top" if below else "bottom",
    )
