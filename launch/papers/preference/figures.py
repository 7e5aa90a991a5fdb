"""Plots over all evaluations, of quality, diversity and memory against likelihood, and over training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import fits, results, rule, sweep
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

_STYLE = {"dpo": (BLUE, "o"), "ipo": (ORANGE, "s"), "hinge": (GREEN, "^")}
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
_LLH = "better LLH (nats a token)"
_CELLS = 0.1  # nats, of the heat map
_FEWEST = 3  # evaluations of a cell that is drawn


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    courses = parts.get("language", [])
    return {
        "likelihood.png": (
            _likelihood(courses),
            "P_win against better LLH, all evaluations of all runs, with a line, a parabola and the means of bins of as many "
            "evaluations each; left above the clip, right with the tail",
        ),
        "gap.png": (
            _gap(courses),
            "P_win against the gap of better and worse LLH (large: the end of a run), and mean P_win over both "
            "likelihoods, above the clip",
        ),
        "spread.png": (
            _spread(courses),
            "Diversity across outputs, facts that are still known and the length of outputs against better LLH, all "
            "evaluations; the dashed line is the clip",
        ),
        "course.png": (
            _course(courses),
            "Entropy and mass of the ten likeliest tokens and P_win over training, DPO without an NLL term; thin lines "
            "are seeds",
        ),
        "nll.png": (
            _nll(courses),
            "P_win and better LLH at the end of DPO against the weight of the NLL term beside it, with intervals over seeds",
        ),
        "alarms.png": (
            _alarms(courses),
            "P_win over training, mean of three evaluations, a line for each seed; marks are the stopping rule's alarms: "
            "in time, early (before the best P_win), or false (the run never goes too far)",
        ),
        "online.png": (
            _online(parts.get("courses", [])),
            "Left: P_win over training of the arm of each direct method with the best end, and of online "
            "methods; thin lines are seeds. Right: P_win against the mean log-ratio of outputs, log π(y) - log π_ref(y), all evaluations",
        ),
    }


def _scatter(axes: Any, courses: Sequence[Course], x: str, y: str, *, above: bool = False) -> None:
    """Draws all evaluations, a colour for each method."""
    for method, (label, _) in METHODS.items():
        colour, marker = _STYLE[method]
        mine = results.of_method(courses, method)
        at, values, likelihood = results.points(mine, x, y, "llh_chosen")
        if above:
            at, values = at[likelihood > fits.CLIP], values[likelihood > fits.CLIP]
        axes.plot(at, values, ls="", marker=marker, ms=3.5, mew=0, color=colour, alpha=0.35)
        axes.plot([], [], ls="", marker=marker, ms=6, color=colour, label=label)


def _likelihood(courses: Sequence[Course]) -> Any:
    points = results.points(courses, "llh_chosen", "p_win")
    x_E, y_E = fits.above(*points)
    if fits.fit(x_E, y_E) is None or len(x_E) < fits.BINS:
        return None
    figure, (near, whole) = panels(2, (12, 5))
    _scatter(near, courses, "llh_chosen", "p_win", above=True)
    _scatter(whole, courses, "llh_chosen", "p_win")
    for axes, where, some in (
        (near, f"above {fits.CLIP:g}", fits.above(*points)),
        (whole, "all", points),
    ):
        _fits(axes, where, *some)
        axes.set(xlabel=_LLH, ylabel="P_win")
    legend_below(figure, near, 6)
    return figure


def _fits(axes: Any, where: str, x_E: np.ndarray, y_E: np.ndarray) -> None:
    """Draws a line, a parabola and the means of bins."""
    fit = fits.fit(x_E, y_E)
    assert fit is not None
    grid = np.linspace(x_E.min(), x_E.max(), 100)
    axes.plot(grid, np.polyval(fit.line, grid), color="black", ls="--", lw=1.5, label="line")
    axes.plot(grid, np.polyval(fit.parabola, grid), color="black", lw=2, label="parabola")
    bins = {"marker": "D", "ms": 8, "mfc": "white", "mec": "black", "mew": 1.5}
    axes.plot(*fits.binned(x_E, y_E), ls="", **bins, label="means of bins")
    axes.set_ylim(y_E.min() - 0.02, y_E.max() + 0.02)  # a fit may leave it
    axes.set_title(f"{where}: RMSE of the parabola {fit.reduction:.0f} % lower")


def _gap(courses: Sequence[Course]) -> Any:
    chosen, rejected, p_win = results.points(courses, "llh_chosen", "llh_rejected", "p_win")
    if len(chosen) < fits.BINS:
        return None
    figure, (left, right) = panels(2, (12, 5))
    _scatter(left, courses, "llh_gap", "p_win")
    for one in courses:
        colour, marker = _STYLE[one.arm.method]
        ends = (one["llh_gap"][-1], one["p_win"][-1])
        left.plot(*ends, marker=marker, ms=8, color=colour, mec="black", mew=0.8)
    left.set(xlabel="better LLH - worse LLH (nats a token)", ylabel="P_win")
    near = (chosen > fits.CLIP) & (rejected > fits.CLIP - 1)
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
    axes.annotate("gap 0", (high, high), (-34, -4), textcoords="offset points", fontsize=8)
    axes.grid(False)
    axes.set(xlabel=_LLH, ylabel="worse LLH (nats a token)")
    figure.colorbar(mesh, ax=axes, label=f"mean P_win ({_FEWEST} evaluations or more)")


def _spread(courses: Sequence[Course]) -> Any:
    shown = {"ead": "EAD", "facts": "share of facts known"}
    shown["length"] = "mean length (symbols and end)"
    if not results.points(courses, "llh_chosen", *shown)[0].size:
        return None
    figure, every_axes = panels(3, (14, 4.6))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        _scatter(axes, courses, "llh_chosen", name)
        axes.axvline(fits.CLIP, color="black", ls="--", lw=0.8)
        axes.set(xlabel=_LLH, ylabel=label)
    legend_below(figure, every_axes[0], 3)
    return figure


def _course(courses: Sequence[Course]) -> Any:
    shown = {"entropy": "entropy (bits)", "mass": "mass", "p_win": "P_win"}
    arms = [Arm("dpo", strength) for strength in sweep.DPO]
    if not any(results.find(courses, arm) for arm in arms):
        return None
    figure, every_axes = panels(3, (14, 4.6))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        for arm, colour in zip(arms, _COLOURS, strict=True):
            mine = results.find(courses, arm)
            if mine:
                curves = np.stack([one[name] for one in mine])
                axes.plot(mine[0]["step"], curves.mean(0), color=colour, lw=2, label=arm.setting)
                axes.plot(mine[0]["step"], curves.T, color=colour, lw=0.6, alpha=0.5)
                axes.axhline(mine[0].start(name), color=GREY, ls=":", lw=0.8)
        axes.set(xlabel="updates", ylabel=label)
    legend_below(figure, every_axes[0], len(arms))
    return figure


def _nll(courses: Sequence[Course]) -> Any:
    shown = {"p_win": "P_win at the end", "llh_chosen": "better LLH at the end (nats a token)"}
    weights = sorted({weight for some in sweep.DPO.values() for weight in some})
    places = {weight: at for at, weight in enumerate(weights)}  # 0 has no logarithm
    drawn = 0
    figure, every_axes = panels(2, (11, 4.6))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        for (strength, some), colour in zip(sweep.DPO.items(), _COLOURS, strict=True):
            ends = [
                {one.seed: one.end(name) for one in results.find(courses, Arm("dpo", strength, w))}
                for w in some
            ]
            seeds = sorted(set.intersection(*map(set, ends)))
            if seeds:
                curves = [np.array([by_seed[seed] for seed in seeds]) for by_seed in ends]
                line(axes, [places[w] for w in some], curves, colour, f"β = {strength:g}")
                drawn += 1
        axes.set_xticks(list(places.values()), [f"{weight:g}" for weight in weights])
        axes.set(xlabel="weight λ of the NLL term", ylabel=label)
    legend_below(figure, every_axes[0], len(_COLOURS))
    return figure if drawn else None


def _alarms(courses: Sequence[Course]) -> Any:
    if not courses:
        return None
    groups = {
        "DPO": [arm for arm in arms_of("dpo") if not arm.nll],
        "DPO with an NLL term": [arm for arm in arms_of("dpo") if arm.nll],
        **{METHODS[method][0]: arms_of(method) for method in ("ipo", "hinge")},
    }
    there = {
        title: arms
        for title, arms in groups.items()
        if any(results.find(courses, arm) for arm in arms)
    }
    rows = -(-len(there) // 2)
    figure, every_axes = panels(2, (13, 0.5 + 4.5 * rows), rows=rows, share_y=True)
    for axes in every_axes[len(there) :]:
        axes.set_visible(False)
    for axes, (title, arms) in zip(every_axes, there.items(), strict=False):
        _runs(axes, courses, arms)
        axes.set(title=title, xlabel="updates")
        axes.legend(**BESIDE)
    for axes in every_axes[::2]:
        axes.set_ylabel("P_win")
    for kind, (marker, face) in _ALARMS.items():
        every_axes[0].plot([], [], ls="", marker=marker, mfc=face, mec="black", ms=9, label=kind)
    last = (some[-len(_ALARMS) :] for some in every_axes[0].get_legend_handles_labels())
    below = {"frameon": False, "ncols": len(_ALARMS), "loc": "outside lower center"}
    figure.legend(*last, title="alarm", **below)
    return figure


def _runs(axes: Any, courses: Sequence[Course], arms: Sequence[Arm]) -> None:
    """The runs of some arms, one colour for a strength and one kind of line for a weight of the NLL term."""
    colours = dict(zip(dict.fromkeys(arm.strength for arm in arms), _COLOURS, strict=False))
    styles = dict(zip(sorted({arm.nll for arm in arms}), ("-", "--"), strict=False))
    for arm in arms:
        colour = colours[arm.strength]
        for i, one in enumerate(rule.outcomes(results.find(courses, arm))):
            steps, wins = one.course["step"], one.course.moving("p_win")
            label = "" if i else arm.setting
            axes.plot(steps, wins, color=colour, ls=styles[arm.nll], lw=1.3, label=label or None)
            if one.alarm is not None:
                marker, face = _ALARMS[one.kind]
                at = steps.tolist().index(one.alarm.step)
                style = {"mfc": face, "mec": colour, "mew": 1.5, "ms": 9, "zorder": 3}
                axes.plot(steps[at], wins[at], marker=marker, **style)


def _online(courses: Sequence[Course]) -> Any:
    if not courses:
        return None
    from matplotlib import ticker

    styles = _STYLE | _ONLINE_STYLE
    figure, (left, right) = panels(2, (13, 5.2))
    for arm in _shown(courses):
        mine, (colour, _) = results.find(courses, arm), styles[arm.method]
        curves, steps = np.stack([one["p_win"] for one in mine]), mine[0]["step"]
        look = {"color": colour, "ls": "-" if arm.direct else "--"}
        left.plot(steps, curves.mean(0), lw=2.2, label=arm.label, **look)
        left.plot(steps, curves.T, lw=0.6, alpha=0.5, **look)
    for method, (colour, marker) in styles.items():
        mine = results.of_method(courses, method)
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


def _shown(courses: Sequence[Course]) -> list[Arm]:
    """Returns the arm of each direct method with the best P_win at its end, and all online methods."""
    ends = {
        arm: float(np.mean([one.end("p_win") for one in results.find(courses, arm)]))
        for arm in ARMS.values()
        if results.find(courses, arm)
    }
    groups = [[arm for arm in ends if arm.method == method] for method in METHODS]
    best = [max(arms, key=ends.__getitem__) for arms in groups if arms]
    return [*best, *(arm for arm in ends if not arm.direct)]
