"""Plots over all evaluations: quality, diversity and memory against likelihood. Those over training: course_figures.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import course_figures, fits, results
from launch.papers.preference.course_figures import STYLE
from launch.papers.preference.results import METHODS, Course
from launch.plots.panels import legend_below, panels

_LLH = "better LLH (nats a token)"
_CELLS = 0.1  # nats, of the heat map
_FEWEST = 3  # evaluations of a cell that is drawn


def figures(measured: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    courses = results.courses(measured)
    every = results.direct(courses)
    return {
        "likelihood.png": (
            _likelihood(every),
            "P_win against better LLH, all evaluations of all runs, with a line, a parabola and the means of bins of as many "
            "evaluations each; left above the clip, right with the tail",
        ),
        "gap.png": (
            _gap(every),
            "P_win against the gap of better and worse LLH (large: the end of a run), and mean P_win over both "
            "likelihoods, above the clip",
        ),
        "spread.png": (
            _spread(every),
            "Diversity across outputs, facts that are still known and the length of outputs against better LLH, all "
            "evaluations; the dashed line is the clip",
        ),
        **course_figures.figures(courses),
    }


def _scatter(axes: Any, every: Sequence[Course], x: str, y: str, *, above: bool = False) -> None:
    """Draws all evaluations, a colour for each method."""
    for method, (label, _) in METHODS.items():
        colour, marker = STYLE[method]
        mine = results.of_method(every, method)
        at, values, likelihood = results.points(mine, x, y, "llh_chosen")
        if above:
            at, values = at[likelihood > fits.CLIP], values[likelihood > fits.CLIP]
        axes.plot(at, values, ls="", marker=marker, ms=3.5, mew=0, color=colour, alpha=0.35)
        axes.plot([], [], ls="", marker=marker, ms=6, color=colour, label=label)


def _likelihood(every: Sequence[Course]) -> Any:
    points = results.points(every, "llh_chosen", "p_win")
    x_E, y_E = fits.above(*points)
    if fits.fit(x_E, y_E) is None or len(x_E) < fits.BINS:
        return None
    figure, (near, whole) = panels(2, (12, 5))
    _scatter(near, every, "llh_chosen", "p_win", above=True)
    _scatter(whole, every, "llh_chosen", "p_win")
    for axes, where, some in (
        (near, f"above {fits.CLIP:g}", fits.above(*points)),
        (whole, "all", points),
    ):
        _fits(axes, where, *some)
        axes.set_xlabel(_LLH)
        axes.set_ylabel("P_win")
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


def _gap(every: Sequence[Course]) -> Any:
    chosen, rejected, p_win = results.points(every, "llh_chosen", "llh_rejected", "p_win")
    if len(chosen) < fits.BINS:
        return None
    figure, (left, right) = panels(2, (12, 5))
    _scatter(left, every, "llh_gap", "p_win")
    for one in every:
        colour, marker = STYLE[one.arm.method]
        ends = (one["llh_gap"][-1], one["p_win"][-1])
        left.plot(*ends, marker=marker, ms=8, color=colour, mec="black", mew=0.8)
    left.set_xlabel("better LLH - worse LLH (nats a token)")
    left.set_ylabel("P_win")
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
    axes.set_xlabel(_LLH)
    axes.set_ylabel("worse LLH (nats a token)")
    figure.colorbar(mesh, ax=axes, label=f"mean P_win ({_FEWEST} evaluations or more)")


def _spread(every: Sequence[Course]) -> Any:
    shown = {
        "ead": "EAD",
        "facts": "share of facts known",
        "length": "mean length (symbols and end)",
    }
    if not results.points(every, "llh_chosen", *shown)[0].size:
        return None
    figure, every_axes = panels(3, (14, 4.6))
    for axes, (name, label) in zip(every_axes, shown.items(), strict=True):
        _scatter(axes, every, "llh_chosen", name)
        axes.axvline(fits.CLIP, color="black", ls="--", lw=0.8)
        axes.set_xlabel(_LLH)
        axes.set_ylabel(label)
    legend_below(figure, every_axes[0], 3)
    return figure
