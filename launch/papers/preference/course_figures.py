"""Plots over training: indicators of DPO, an NLL term beside it, alarms of the stopping rule, and online methods."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import results, rule, sweep
from launch.papers.preference.results import ARMS, METHODS, ONLINE, Arm, Course, arms_of
from launch.plots.panels import (
    BESIDE,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    legend_below,
    line,
    panels,
)

STYLE = {"dpo": (BLUE, "o"), "ipo": (ORANGE, "s"), "hinge": (GREEN, "^")}
_ONLINE_STYLE = {
    "online_dpo": (PURPLE, "v"),
    "rloo": (RED, "D"),
    "grpo": ("black", "P"),
    "ppo": (GREY, "X"),
}
_TICKS = (-3, -1, 0, 1, 3, 10, 30, 100)
# From the strength that moves furthest.
_COLOURS = (RED, ORANGE, GREEN, BLUE)
_ALARMS = {  # of a kind: what is drawn at it
    "in time": ("o", "black"),
    "early": ("v", "white"),
    "false": ("X", "white"),
}


def figures(courses: Sequence[Course]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption), of the runs that learn from pairs and of all."""
    every = results.direct(courses)
    return {
        "course.png": (
            _course(every),
            "Entropy and mass of the ten likeliest tokens and P_win over training, DPO without an NLL term; thin lines "
            "are seeds",
        ),
        "nll.png": (
            _nll(every),
            "P_win and better LLH at the end of DPO against the weight of the NLL term beside it, with intervals over seeds",
        ),
        "alarms.png": (
            _alarms(every),
            "P_win over training, mean of three evaluations, a line for each seed; marks are the stopping rule's alarms: "
            "in time, early (before the best P_win), or false (the run never goes too far)",
        ),
        "online.png": (
            _online(courses),
            "Left: P_win over training of the arm of each direct method with the best end, and of online "
            "methods; thin lines are seeds. Right: P_win against the mean log-ratio of outputs, log π(y) - log π_ref(y), all evaluations",
        ),
    }


def _course(every: Sequence[Course]) -> Any:
    shown = {"entropy": "entropy (bits)", "mass": "mass", "p_win": "P_win"}
    arms = [Arm("dpo", strength) for strength in sweep.DPO]
    if not any(results.find(every, arm) for arm in arms):
        return None
    figure, every_axes = panels(3, (14, 4.6))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        for arm, colour in zip(arms, _COLOURS, strict=True):
            mine = results.find(every, arm)
            if mine:
                curves = np.stack([one[name] for one in mine])
                axes.plot(mine[0]["step"], curves.mean(0), color=colour, lw=2, label=arm.setting)
                axes.plot(mine[0]["step"], curves.T, color=colour, lw=0.6, alpha=0.5)
                axes.axhline(mine[0].start(name), color=GREY, ls=":", lw=0.8)
        axes.set_xlabel("updates")
        axes.set_ylabel(label)
    legend_below(figure, every_axes[0], len(arms))
    return figure


def _nll(every: Sequence[Course]) -> Any:
    shown = {"p_win": "P_win at the end", "llh_chosen": "better LLH at the end (nats a token)"}
    weights = sorted({weight for some in sweep.DPO.values() for weight in some})
    places = {weight: at for at, weight in enumerate(weights)}  # 0 has no logarithm
    drawn = 0
    figure, every_axes = panels(2, (11, 4.6))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        for (strength, some), colour in zip(sweep.DPO.items(), _COLOURS, strict=True):
            ends = [
                {one.seed: one.end(name) for one in results.find(every, Arm("dpo", strength, w))}
                for w in some
            ]
            seeds = sorted(set.intersection(*map(set, ends)))
            if seeds:
                curves = [np.array([by_seed[seed] for seed in seeds]) for by_seed in ends]
                line(axes, [places[w] for w in some], curves, colour, f"β = {strength:g}")
                drawn += 1
        axes.set_xticks(list(places.values()), [f"{weight:g}" for weight in weights])
        axes.set_xlabel("weight λ of the NLL term")
        axes.set_ylabel(label)
    legend_below(figure, every_axes[0], len(_COLOURS))
    return figure if drawn else None


def _alarms(every: Sequence[Course]) -> Any:
    if not every:
        return None
    groups = {
        "DPO": [arm for arm in arms_of("dpo") if not arm.nll],
        "DPO with an NLL term": [arm for arm in arms_of("dpo") if arm.nll],
        **{METHODS[method][0]: arms_of(method) for method in ("ipo", "hinge")},
    }
    there = {
        title: arms
        for title, arms in groups.items()
        if any(results.find(every, arm) for arm in arms)
    }
    rows = -(-len(there) // 2)
    figure, every_axes = panels(2, (13, 0.5 + 4.5 * rows), rows=rows, share_y=True)
    for axes in every_axes[len(there) :]:
        axes.set_visible(False)
    for axes, (title, arms) in zip(every_axes, there.items(), strict=False):
        _runs(axes, every, arms)
        axes.set_title(title)
        axes.set_xlabel("updates")
        axes.legend(**BESIDE)
    for axes in every_axes[::2]:
        axes.set_ylabel("P_win")
    for kind, (marker, face) in _ALARMS.items():
        every_axes[0].plot([], [], ls="", marker=marker, mfc=face, mec="black", ms=9, label=kind)
    handles, labels = every_axes[0].get_legend_handles_labels()
    figure.legend(
        handles[-len(_ALARMS) :],
        labels[-len(_ALARMS) :],
        frameon=False,
        ncols=len(_ALARMS),
        loc="outside lower center",
        title="alarm",
    )
    return figure


def _runs(axes: Any, every: Sequence[Course], arms: Sequence[Arm]) -> None:
    """The runs of some arms, one colour for a strength and one kind of line for a weight of the NLL term."""
    strengths: Mapping[float, str] = dict(
        zip(dict.fromkeys(arm.strength for arm in arms), _COLOURS, strict=False)
    )
    styles = dict(zip(sorted({arm.nll for arm in arms}), ("-", "--"), strict=False))
    for arm in arms:
        colour = strengths[arm.strength]
        for i, one in enumerate(rule.outcomes(results.find(every, arm))):
            steps, wins = one.course["step"], one.course.moving("p_win")
            label = "" if i else arm.setting
            axes.plot(steps, wins, color=colour, ls=styles[arm.nll], lw=1.3, label=label or None)
            if one.alarm is not None:
                marker, face = _ALARMS[one.kind]
                at = steps.tolist().index(one.alarm.step)
                style = {"mfc": face, "mec": colour, "mew": 1.5, "ms": 9, "zorder": 3}
                axes.plot(steps[at], wins[at], marker=marker, **style)


def _online(every: Sequence[Course]) -> Any:
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
        mine = results.of_method(every, method)
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
        axes.legend(**BESIDE)
    return figure


def _shown(every: Sequence[Course]) -> list[Arm]:
    """Returns the arm of each direct method with the best P_win at its end, and all online methods."""
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
