"""Plots over all evaluations, of quality, diversity and memory against likelihood, and over training, with the stopping rules' alarms."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.preference import experiment, numbers, rule
from espalier.launch.papers.preference.numbers import (
    ARMS,
    DIRECT,
    METHODS,
    ONLINE,
    Arm,
    Course,
    Runs,
)
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots.panels import (
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
_FALLS = (0, 0.1, 1, 10)
_WIDTH = 0.5  # nats, of the bins
_CELLS = 0.1  # nats, of the heat map
_FEWEST = 3  # evaluations of a bin or a cell that is drawn


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    none = Runs([])
    runs, large = parts.get("language", none), parts.get("large", none)
    courses = runs.shared(*DIRECT).courses(DIRECT.values())
    drawn = {
        "likelihood": _likelihood(courses, large.shared(*DIRECT).courses(DIRECT.values())),
        "spread": _spread(courses),
        "course": _course(courses),
        "gap": _gap(courses),
        "nll": _nll(courses),
        "alarms": _alarms(courses),
        "online": _online(runs.shared(*ARMS).courses()),
    }
    return {f"{name}.png": (figure, _PROSE(f"{name}_figure")) for name, figure in drawn.items()}


def _scatter(axes: Any, courses: Sequence[Course], x: str, y: str, *, near: bool = False) -> None:
    """Draws all evaluations, a colour for each method."""
    for method, (label, _) in METHODS.items():
        colour, marker = _STYLE[method]
        at, values, fall = numbers.points(numbers.of_method(courses, method), x, y, "fall")
        if near:
            at, values = at[fall < numbers.CLIP], values[fall < numbers.CLIP]
        axes.plot(at, values, ls="", marker=marker, ms=3, mew=0, color=colour, alpha=0.3)
        axes.plot([], [], ls="", marker=marker, ms=6, color=colour, label=label)


def _likelihood(courses: Sequence[Course], large: Sequence[Course]) -> Any:
    x_E, y_E = numbers.near(*numbers.points(courses, "fall", "p_win"))
    fit = numbers.fitted(x_E, y_E)
    if fit is None:
        return None
    figure, (left, right) = panels(2, (8, 4.4))
    _scatter(left, courses, "fall", "p_win", near=True)
    _scatter(right, courses, "fall", "p_win")
    grid = np.linspace(x_E.min(), x_E.max(), 100)
    left.plot(grid, np.polyval(fit.line, grid), color="black", ls="--", lw=1.5, label="line")
    left.plot(grid, np.polyval(fit.parabola, grid), color="black", lw=2, label="parabola")
    for mine in numbers.by_seed(courses).values():
        if (one := numbers.fit_near(mine)) is not None:
            left.plot(grid, np.polyval(one.parabola, grid), color="black", lw=0.5, alpha=0.5)
    diamond = {"ms": 6, "mfc": "white", "mew": 1.3}
    looks = (
        (courses, {"marker": "D", "color": "black"}, "means of bins"),
        (large, {"marker": "s", "color": RED, "ls": "--"}, "twice the width"),
    )
    for some, look, label in looks:
        if some:
            right.plot(*_binned(some), lw=1, **look, **diamond)
            left.plot([], [], lw=1, label=label, **look, **diamond)
    for axes in (left, right):
        axes.axvspan(*numbers.MIDDLE, color=GREEN, alpha=0.1, lw=0)
        axes.axhline(0.5, color=GREY, ls=":", lw=0.8)
        axes.invert_xaxis()  # a higher likelihood to the right
        axes.set(xlabel=_FALL, ylabel="P_win")
    legend_below(figure, left, 4)
    return figure


def _binned(courses: Sequence[Course], width: float = _WIDTH) -> tuple[list[float], list[float]]:
    """Returns the middles of bins of falls with enough evaluations, and the mean P_win of each."""
    points = numbers.points(courses, "fall", "p_win")
    edges = np.arange(-width / 2, points[0].max() + width, width)
    means = [(low + width / 2, numbers.between(*points, low, low + width)) for low in edges]
    drawn = [(at, mean) for at, mean in means if mean is not None]
    return [at for at, _ in drawn], [mean for _, mean in drawn]


def _gap(courses: Sequence[Course]) -> Any:
    names = ("llh_chosen", "llh_rejected", "p_win", "fall")
    chosen, rejected, p_win, fall = numbers.points(courses, *names)
    near = fall < numbers.CLIP
    if near.sum() < _FEWEST:
        return None
    figure, (left, right) = panels(2, (8, 4.2))
    _scatter(left, courses, "llh_gap", "p_win")
    for one in courses:
        colour, marker = _STYLE[one.arm.method]
        ends = (one["llh_gap"][-1], one["p_win"][-1])
        left.plot(*ends, marker=marker, ms=7, color=colour, mec="black", mew=0.8)
    end = {"ls": "", "marker": "o", "ms": 7, "color": "white", "mec": "black", "mew": 0.8}
    left.plot([], [], label="the end of a run", **end)
    left.axhline(0.5, color=GREY, ls=":", lw=0.8)
    left.set(xlabel="better LLH - worse LLH (nats a token)", ylabel="P_win")
    _heat_map(figure, right, chosen[near], rejected[near], p_win[near])
    legend_below(figure, left, 4)
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
    axes.annotate("gap 0", (middle, middle), (-38, 2), textcoords="offset points", fontsize=9)
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
    figure, every_axes = panels(3, (8, 3.6))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        _scatter(axes, plain, "fall", name)
        axes.set_xscale("symlog", linthresh=0.1, linscale=0.6)
        axes.xaxis.set_major_locator(ticker.FixedLocator(_FALLS))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.invert_xaxis()
        start = float(np.mean([one.start(name) for one in plain]))
        axes.axhline(start, color=GREY, ls=":", lw=0.8)
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
    every_axes[1].set_xlabel(_FALL)
    legend_below(figure, every_axes[0], 3)
    return figure


def _course(courses: Sequence[Course]) -> Any:
    arms = [Arm("dpo", strength) for strength in experiment.DPO]
    if not any(numbers.find(courses, arm) for arm in arms):
        return None
    shown = {"entropy": "entropy (bits)", "mass": "mass", "ead": "EAD, n = 1 to 3"}
    shown["p_win"] = "P_win"
    figure, every_axes = panels(2, (8, 6.2), rows=2)
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        for arm, colour in zip(arms, _COLOURS, strict=False):
            if mine := numbers.find(courses, arm):
                curves = [one[name] for one in mine]
                _curves(axes, mine[0]["step"], curves, colour, arm.setting)
        at = float(np.mean([one.start(name) for one in courses]))
        axes.axhline(at, color=GREY, ls=":", lw=0.8)
        axes.set(xlabel="updates", ylabel=label)
    legend_below(figure, every_axes[0], len(arms))
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
    beta, weights = next((s, some) for s, some in experiment.DPO.items() if len(some) > 1)
    runs = {weight: numbers.find(courses, Arm("dpo", beta, weight)) for weight in weights}
    if not all(runs.values()):
        return None
    figure, (left, right) = panels(2, (8, 4))
    for seed in sorted({one.seed for one in courses}):
        ends = [[one.end("p_win") for one in some if one.seed == seed] for some in runs.values()]
        points = [(at, mine[0]) for at, mine in enumerate(ends) if mine]
        left.plot(*zip(*points, strict=True), marker="o", ms=4, color=PURPLE, lw=0.6, alpha=0.5)
    means = [np.mean([one.end("p_win") for one in some]) for some in runs.values()]
    left.plot(means, color=PURPLE, marker="_", ms=18, mew=2.5, lw=0)
    left.set_xticks(
        range(len(weights)), [f"{weight:g}" for weight in weights]
    )  # 0 has no logarithm
    left.set_xlabel(f"weight λ of the NLL term, β = {beta:g}")
    left.set_ylabel("P_win at the end")
    of_dpo = numbers.of_method(courses, "dpo")
    for with_term, colour, label in ((True, ORANGE, "with a term"), (False, GREY, "without")):
        some = [one for one in of_dpo if bool(one.arm.nll) == with_term]
        for mine in numbers.by_seed(some).values():
            right.plot(*_near(mine), color=colour, lw=0.6, alpha=0.6)
        right.plot(*_near(some), color=colour, lw=2.2, marker="o", ms=4, label=label)
    right.invert_xaxis()
    right.axhline(0.5, color=GREY, ls=":", lw=0.8)
    right.set(xlabel=_FALL, ylabel="mean P_win")
    legend_below(figure, right, 2)
    return figure


def _near(courses: Sequence[Course]) -> tuple[list[float], list[float]]:
    """Returns the bins of `_binned` within the clip, narrower ones."""
    at, means = _binned(courses, 2 * _CELLS)
    count = sum(x < numbers.CLIP for x in at)
    return at[:count], means[:count]


def _online(courses: Sequence[Course]) -> Any:
    if not courses:
        return None
    from matplotlib import ticker

    styles = _STYLE | _ONLINE_STYLE
    figure, (left, right) = panels(2, (8, 4.8))
    for arm in _shown(courses):
        mine, (colour, marker) = numbers.find(courses, arm), styles[arm.method]
        line = "-" if arm.direct else "--"
        curves = [one["p_win"] for one in mine]
        _curves(left, mine[0]["step"], curves, colour, ls=line)
        left.plot([], [], color=colour, ls=line, marker=marker, ms=6, label=arm.label)
    for method, (colour, marker) in styles.items():
        mine = numbers.of_method(courses, method)
        if mine:
            ratios, wins = numbers.points(mine, "kl", "p_win")
            right.plot(ratios, wins, ls="", marker=marker, ms=4, mew=0, color=colour, alpha=0.4)
    right.set_xscale("symlog", linthresh=1)
    right.xaxis.set_major_locator(ticker.FixedLocator(_TICKS))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_locator(ticker.NullLocator())
    right.set_xlabel("mean log-ratio of outputs to\nthe reference (nats)")
    left.set_xlabel("updates")
    for axes in (left, right):
        axes.axhline(0.5, color=GREY, ls=":", lw=0.8)
        axes.set_ylabel("P_win")
    legend_below(figure, left, 4)
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


_COLUMNS = 4
_RULES = (
    (rule.PLAIN, {"marker": "o", "mfc": "white", "ms": 5}, "the plain rule"),
    (
        rule.CHOSEN,
        {"marker": "v", "mfc": "black", "ms": 6},
        f"the rule that waits for {rule.CHOSEN.llh_drop:g} nats",
    ),
)
_OVER, _CALM = {"color": RED, "lw": 1.8}, {"color": BLUE, "lw": 0.9}


def _alarms(courses: Sequence[Course]) -> Any:
    shown = [(arm, mine) for arm in DIRECT.values() if (mine := numbers.find(courses, arm))]
    if not shown:
        return None
    rows = -(-len(shown) // _COLUMNS)
    figure, every_axes = panels(_COLUMNS, (8, 0.9 + 1.9 * rows), rows=rows, share_y=True)
    for axes, (arm, mine) in zip(every_axes, shown, strict=False):
        axes.set_title(arm.label, fontsize=8)
        axes.axhline(0.5, color=GREY, ls=":", lw=0.8)
        axes.tick_params(labelsize=8)
        for one in mine:
            _alarms_of(axes, one)
    for axes in every_axes[len(shown) :]:
        axes.set_visible(False)
    for axes in every_axes[::_COLUMNS]:
        axes.set_ylabel("P_win", fontsize=8)
    for axes in every_axes[max(0, len(shown) - _COLUMNS) : len(shown)]:
        axes.set_xlabel("updates", fontsize=8)
    handles = [
        every_axes[0].plot([], [], label=label, **look)[0]
        for look, label in ((_OVER, "over-optimised"), (_CALM, "not"))
    ]
    for _, look, label in _RULES:
        handles += every_axes[0].plot([], [], ls="", mec="black", label=f"alarm of {label}", **look)
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return figure


def _alarms_of(axes: Any, course: Course) -> None:
    steps, wins = course["step"], course.moving("p_win")
    over = rule.outcome(course, rule.PLAIN).kind in rule.OVER
    look = _OVER if over else _CALM
    axes.plot(steps, wins, **look)
    for one, mark, _ in _RULES:
        alarm = rule.outcome(course, one).alarm
        if alarm is not None:
            at = steps.tolist().index(alarm.step)
            axes.plot(steps[at], wins[at], ls="", mec=look["color"], mew=1.3, zorder=3, **mark)
