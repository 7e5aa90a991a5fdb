"""Methods that learn from the reward of their own samples, beside those that learn from pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.papers.preference import results
from launch.papers.preference.arms import ARMS, METHODS, ONLINE, Arm
from launch.papers.preference.results import Course
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, panels

STYLE = {"dpo": (BLUE, "o"), "ipo": (ORANGE, "s"), "hinge": (GREEN, "^")}
CAPTION = (
    "Left: P_win over training of the arm of each direct method with the best end, and of online "
    "methods; thin lines are seeds. Right: P_win against the mean log-ratio of outputs, log π(y) - log π_ref(y), all evaluations"
)
_ONLINE_STYLE = {
    "online_dpo": (PURPLE, "v"),
    "rloo": (RED, "D"),
    "grpo": ("black", "P"),
    "ppo": (GREY, "X"),
}

_TICKS = (-3, -1, 0, 1, 3, 10, 30, 100)


def draw(every: Sequence[Course]) -> Any:
    """The figure; None where there are no runs."""
    if not every:
        return None
    from matplotlib import ticker

    styles = STYLE | _ONLINE_STYLE
    figure, (left, right) = panels(2, (13, 5.2))
    for arm in _shown(every):
        mine, (colour, _) = results.find(every, arm), styles[arm.method]
        curves, steps = np.stack([one["p_win"] for one in mine]), mine[0]["step"]
        look = {"color": colour, "ls": "-" if arm.direct else "--"}
        left.plot(steps, curves.mean(0), lw=2.2, label=arm.label, **look)
        left.plot(steps, curves.T, lw=0.6, alpha=0.5, **look)
    for method, (colour, marker) in styles.items():
        mine = [one for one in every if one.arm.method == method]
        if mine:
            ratios, wins = results.points(mine, "kl", "p_win")
            right.plot(ratios, wins, ls="", marker=marker, ms=4, mew=0, color=colour, alpha=0.4)
            name = METHODS[method][0] if method in METHODS else ONLINE[method]
            right.plot([], [], ls="", marker=marker, ms=6, color=colour, label=name)
    right.set_xscale("symlog", linthresh=1)
    right.xaxis.set_major_locator(ticker.FixedLocator(_TICKS))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_locator(ticker.NullLocator())
    right.set_xlabel("mean log-ratio of outputs to the reference (nats)")
    left.set_xlabel("updates")
    for axes in (left, right):
        axes.set_ylabel("P_win")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _shown(every: Sequence[Course]) -> list[Arm]:
    """Of each direct method the arm of the best P_win at its end, and all online methods."""
    ends = {
        arm: float(np.mean([one.end("p_win") for one in results.find(every, arm)]))
        for arm in ARMS.values()
        if results.find(every, arm)
    }
    best = [
        max((arm for arm in ends if arm.method == method), key=ends.__getitem__, default=None)
        for method in METHODS
    ]
    return [*(arm for arm in best if arm is not None), *(arm for arm in ends if not arm.direct)]
