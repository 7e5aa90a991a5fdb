"""Plots over all evaluations, of quality, diversity and memory against likelihood, and over training, with the stopping rules' alarms."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.preference import experiment, numbers, rule
from espalier.launch.papers.preference.numbers import ARMS, METHODS, ONLINE, Arm, Course
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots.panels import (
    BESIDE,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    legend_below,
    panels,
)

_PROSE = Prose.of(__name__)

_STYLE = {"dpo": (BLUE, "o"), "ipo": (ORANGE, "s"), "hinge": (GREEN, "^")}
_ONLINE_STYLE = {
    "online_dpo": (PURPLE, "v"),
    "rloo": (RED, "D"),
    "grpo": ("black", "P"),
    "ppo": (GREY, "X"),
}
_TICKS = (-3, -1, 0, 1, 3, 10, 30, 100)
# From the strength that moves furthest.
_COLOURS = (RED, ORANGE, GREEN, BLUE, PURPLE)
_FALL = "better LLH below its start (nats a token)"
_FALLS = (0, 0.1, 0.3, 1, 3, 10)
_WIDTH = 0.5  # nats, of the bins
_CELLS = 0.1  # nats, of the heat map
_FEWEST = 3  # evaluations of a bin or a cell that is drawn


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    courses = parts.get("language", [])
    return {
        "likelihood.png": (
            _likelihood(courses),
            _PROSE("likelihood_figure"),
        ),
        "online.png": (
            _online(parts.get("courses", [])),
            _PROSE("online_figure"),
        ),
        "gap.png": (
            _gap(courses),
            _PROSE("gap_figure"),
        ),
        "spread.png": (
            _spread(courses),
            _PROSE("spread_figure"),
        ),
        "course.png": (
            _course(courses),
            _PROSE("course_figure"),
        ),
        "nll.png": (
            _nll(courses),
            _PROSE("nll_figure"),
        ),
        "alarms.png": (alarms(courses), _PROSE("alarms_figure")),
    }


def _scatter(axes: Any, courses: Sequence[Course], x: str, y: str, *, near: bool = False) -> None:
    """Draws all evaluations, a colour for each method."""
    for method, (label, _) in METHODS.items():
        colour, marker = _STYLE[method]
        at, values, fall = numbers.points(numbers.of_method(courses, method), x, y, "fall")
        if near:
            at, values = at[fall < numbers.CLIP], values[fall < numbers.CLIP]
        axes.plot(at, values, ls="", marker=marker, ms=3, mew=0, color=colour, alpha=0.3)
        axes.plot([], [], ls="", marker=marker, ms=6, color=colour, label=label)


def _likelihood(courses: Sequence[Course]) -> Any:
    points = numbers.points(courses, "fall", "p_win")
    x_E, y_E = numbers.near(*points)
    fit = numbers.fitted(x_E, y_E)
    if fit is None:
        return None
    figure, (left, right) = panels(2, (12, 5))
    _scatter(left, courses, "fall", "p_win", near=True)
    _scatter(right, courses, "fall", "p_win")
    grid = np.linspace(x_E.min(), x_E.max(), 100)
    left.plot(grid, np.polyval(fit.line, grid), color="black", ls="--", lw=1.5, label="line")
    left.plot(grid, np.polyval(fit.parabola, grid), color="black", lw=2, label="parabola")
    left.set_title(f"RMSE of the parabola {fit.reduction:.0%} lower", fontsize=10)
    edges = np.arange(-_WIDTH / 2, points[0].max() + _WIDTH, _WIDTH)
    means = [numbers.between(*points, low, low + _WIDTH) for low in edges]
    drawn = [
        (low + _WIDTH / 2, mean) for low, mean in zip(edges, means, strict=True) if mean is not None
    ]
    diamond = {"marker": "D", "ms": 7, "mfc": "white", "mec": "black", "mew": 1.3}
    right.plot(*zip(*drawn, strict=True), color="black", lw=1, **diamond)
    left.plot([], [], color="black", lw=1, label="means of bins", **diamond)
    for axes in (left, right):
        axes.axvspan(*numbers.MIDDLE, color=GREEN, alpha=0.1, lw=0)
        axes.axhline(0.5, color=GREY, ls=":", lw=0.8)
        axes.invert_xaxis()  # a higher likelihood to the right
        axes.set(xlabel=_FALL, ylabel="P_win")
    legend_below(figure, left, 6)
    return figure


def _gap(courses: Sequence[Course]) -> Any:
    names = ("llh_chosen", "llh_rejected", "p_win", "fall")
    chosen, rejected, p_win, fall = numbers.points(courses, *names)
    near = fall < numbers.CLIP
    if near.sum() < _FEWEST:
        return None
    figure, (left, right) = panels(2, (12, 5))
    _scatter(left, courses, "llh_gap", "p_win")
    for one in courses:
        colour, marker = _STYLE[one.arm.method]
        ends = (one["llh_gap"][-1], one["p_win"][-1])
        left.plot(*ends, marker=marker, ms=7, color=colour, mec="black", mew=0.8)
    left.set(xlabel="better LLH - worse LLH (nats a token)", ylabel="P_win")
    _heat_map(figure, right, chosen[near], rejected[near], p_win[near])
    legend_below(figure, left, 3)
    return figure


def _heat_map(figure: Any, axes: Any, x_E: np.ndarray, y_E: np.ndarray, z_E: np.ndarray) -> None:
    """Draws the mean of z over squares of x and y with enough evaluations."""
    edges = [
        # Whole cells, whatever was measured.
        np.arange(np.floor(v.min() / _CELLS) * _CELLS, v.max() + _CELLS, _CELLS)
        for v in (x_E, y_E)
    ]
    counts = np.histogram2d(x_E, y_E, edges)[0]
    sums = np.histogram2d(x_E, y_E, edges, weights=z_E)[0]
    means = np.ma.masked_array(sums / np.maximum(counts, 1), counts < _FEWEST)
    mesh = axes.pcolormesh(*edges, means.T, cmap="viridis", edgecolors="white", linewidth=0.6)
    low, high = max(edges[0][0], edges[1][0]), min(edges[0][-1], edges[1][-1])
    axes.plot([low, high], [low, high], color="black", ls=":", lw=1)
    middle = (low + high) / 2
    axes.annotate("gap 0", (middle, middle), (-38, 2), textcoords="offset points", fontsize=8)
    axes.grid(False)
    axes.set(xlabel="better LLH (nats a token)", ylabel="worse LLH (nats a token)")
    figure.colorbar(mesh, ax=axes, label=f"mean P_win ({_FEWEST} evaluations or more)")


def _spread(courses: Sequence[Course]) -> Any:
    from matplotlib import ticker

    shown = {"ead": "EAD, n = 1 to 3", "facts": "share of facts known"}
    shown["length"] = "mean length (symbols and end)"
    plain = [one for one in courses if not one.arm.nll]
    if not numbers.points(plain, "fall", *shown)[0].size:
        return None
    figure, every_axes = panels(3, (14, 4.6))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        _scatter(axes, plain, "fall", name)
        axes.set_xscale("symlog", linthresh=0.1, linscale=0.6)
        axes.xaxis.set_major_locator(ticker.FixedLocator(_FALLS))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.invert_xaxis()
        axes.set(xlabel=_FALL, ylabel=label)
    legend_below(figure, every_axes[0], 3)
    return figure


def _course(courses: Sequence[Course]) -> Any:
    arms = [Arm("dpo", strength) for strength in experiment.DPO]
    if not any(numbers.find(courses, arm) for arm in arms):
        return None
    figure, (first, *others) = panels(4, (17, 4.4))
    shown = {"entropy": "entropy (bits)", "mass": "mass", "p_win": "P_win"}
    for arm, colour in zip(arms, _COLOURS, strict=True):
        mine = numbers.find(courses, arm)
        if not mine:
            continue
        if arm.strength in experiment.EARLY["dpo"]:
            steps = mine[0].early("step", 0, 60)
            _curves(first, steps, [one.early("entropy", 0, 60) for one in mine], colour)
        for axes, name in zip(others, shown, strict=True):
            _curves(axes, mine[0]["step"], [one[name] for one in mine], colour, arm.setting)
    start = float(np.mean([one.start("entropy") for one in courses]))
    first.axhline(start, color=GREY, ls=":", lw=0.8)
    first.set(xlabel="updates", ylabel="entropy (bits)", title="the first updates")
    for axes, (name, label) in zip(others, shown.items(), strict=True):
        at = float(np.mean([one.start(name) for one in courses]))
        axes.axhline(at, color=GREY, ls=":", lw=0.8)
        axes.set(xlabel="updates", ylabel=label)
    legend_below(figure, others[0], len(arms))
    return figure


def _curves(
    axes: Any,
    x: np.ndarray,
    curves: Sequence[np.ndarray],
    colour: Any,
    label: str = "",
    **look: Any,
) -> None:
    """Draws the mean of curves of equal length, and each of them thin."""
    stacked = np.stack(curves)
    axes.plot(x, stacked.mean(0), color=colour, lw=2, label=label or None, **look)
    if len(stacked) > 1:
        axes.plot(x, stacked.T, color=colour, lw=0.6, alpha=0.45, **look)


def _nll(courses: Sequence[Course]) -> Any:
    shown = {"p_win": "P_win at the end", "llh_chosen": "better LLH at the end (nats a token)"}
    studied = {strength: some for strength, some in experiment.DPO.items() if len(some) > 1}
    weights = sorted({weight for some in studied.values() for weight in some})
    places = {weight: at for at, weight in enumerate(weights)}  # 0 has no logarithm
    drawn = 0
    figure, every_axes = panels(2, (10, 4.4))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        for (strength, some), colour in zip(studied.items(), (ORANGE, PURPLE), strict=True):
            means = {}
            for weight in some:
                ends = [
                    one.end(name) for one in numbers.find(courses, Arm("dpo", strength, weight))
                ]
                if ends:
                    means[places[weight]] = float(np.mean(ends))
                    at = [places[weight]] * len(ends)
                    axes.plot(at, ends, ls="", marker="o", ms=4, color=colour, alpha=0.5, mew=0)
            axes.plot(list(means), list(means.values()), color=colour, marker="_", ms=16, mew=2,
                      lw=1, label=f"β = {strength:g}")  # fmt: skip
            drawn += len(means)
        axes.set_xticks(list(places.values()), [f"{weight:g}" for weight in weights])
        axes.set(xlabel="weight λ of the NLL term", ylabel=label)
    legend_below(figure, every_axes[0], len(studied))
    return figure if drawn else None


def _online(courses: Sequence[Course]) -> Any:
    if not courses:
        return None
    from matplotlib import ticker

    styles = _STYLE | _ONLINE_STYLE
    figure, (left, right) = panels(2, (13, 5.2))
    for arm in _shown(courses):
        mine, (colour, _) = numbers.find(courses, arm), styles[arm.method]
        line = "-" if arm.direct else "--"
        _curves(left, mine[0]["step"], [one["p_win"] for one in mine], colour, arm.label, ls=line)
    for method, (colour, marker) in styles.items():
        mine = numbers.of_method(courses, method)
        if mine:
            ratios, wins = numbers.points(mine, "kl", "p_win")
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
        axes.axhline(0.5, color=GREY, ls=":", lw=0.8)
        axes.set_ylabel("P_win")
        axes.legend(**BESIDE)
    return figure


def _shown(courses: Sequence[Course]) -> list[Arm]:
    """Returns the arm of each direct method with the best P_win at its end, and all online methods."""
    ends = {
        arm: float(np.mean([one.end("p_win") for one in numbers.find(courses, arm)]))
        for arm in ARMS.values()
        if numbers.find(courses, arm)
    }
    groups = [[arm for arm in ends if arm.method == method] for method in METHODS]
    best = [max(arms, key=ends.__getitem__) for arms in groups if arms]
    return [*best, *(arm for arm in ends if arm.method in ONLINE)]


_SEEDS = (BLUE, ORANGE, GREEN, PURPLE, RED)
_COLUMNS = 4
_RULES = (
    (rule.PLAIN, {"marker": "o", "mfc": "white", "ms": 6}, "the plain rule"),
    (
        rule.CHOSEN,
        {"marker": "v", "mfc": "black", "ms": 7},
        f"the rule that waits for {rule.CHOSEN.llh_drop:g} nats",
    ),
)


def alarms(courses: Sequence[Course]) -> Any:
    """Returns the figure; None without runs."""
    shown = [(arm, mine) for arm in ARMS.values() if (mine := numbers.find(courses, arm))]
    if not shown:
        return None
    rows = -(-len(shown) // _COLUMNS)
    figure, every_axes = panels(_COLUMNS, (13, 0.6 + 2.4 * rows), rows=rows, share_y=True)
    seeds = sorted({one.seed for one in courses})
    colours = {seed: _SEEDS[at % len(_SEEDS)] for at, seed in enumerate(seeds)}
    for axes, (arm, mine) in zip(every_axes, shown, strict=False):
        axes.set_title(arm.label, fontsize=9)
        axes.axhline(0.5, color=GREY, ls=":", lw=0.8)
        axes.tick_params(labelsize=8)
        for one in mine:
            _alarms_of(axes, one, colours[one.seed])
    for axes in every_axes[len(shown) :]:
        axes.set_visible(False)
    for axes in every_axes[::_COLUMNS]:
        axes.set_ylabel("P_win", fontsize=8)
    for axes in every_axes[max(0, len(shown) - _COLUMNS) : len(shown)]:
        axes.set_xlabel("updates", fontsize=8)
    handles = [every_axes[0].plot([], [], color=colours[s], label=f"seed {s}")[0] for s in seeds]
    for _, look, label in _RULES:
        handles += every_axes[0].plot([], [], ls="", mec="black", label=f"alarm of {label}", **look)
    figure.legend(
        handles=handles, frameon=False, fontsize=8, ncols=len(handles), loc="outside lower center"
    )
    return figure


def _alarms_of(axes: Any, course: Course, colour: str) -> None:
    steps, wins = course["step"], course.moving("p_win")
    over = rule.outcome(course, rule.PLAIN).kind in rule.OVER
    axes.plot(steps, wins, color=colour, lw=2.2 if over else 0.9)
    for one, look, _ in _RULES:
        alarm = rule.outcome(course, one).alarm
        if alarm is not None:
            at = steps.tolist().index(alarm.step)
            axes.plot(steps[at], wins[at], ls="", mec=colour, mew=1.3, zorder=3, **look)
