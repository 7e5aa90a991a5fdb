"""Plots of both experiments; None where there is nothing to plot. Dots and thin lines are seeds."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.low_rank import experiment
from espalier.launch.papers.low_rank.experiment import Results, arm_name
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import aligned
from espalier.launch.plots import intervals
from espalier.launch.plots.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    dots,
    legend_below,
    paired,
    panels,
    plain_ticks,
)

_PROSE = Prose.of(__name__)

_DECAY_STYLE = {"none": (GREY, "o"), "l2": (ORANGE, "s"), "frobenius": (BLUE, "^")}
_DECAY_NAMES = {"none": "no decay", "l2": "L2 on the factors", "frobenius": "Frobenius"}
_WEIGHT = experiment.WEIGHTS[1]  # at which the claims compare both decays
_CAUSES = {
    "effective_step": "effective step at the end (log scale)",
    "effective_rank": "effective rank at the end (log scale)",
}
_INIT_STYLE = {
    "he": (ORANGE, "He"),
    "spectral": (BLUE, "spectral"),
    "spectral_ones": (GREEN, "spectral ones"),
}
_FROM = 100  # updates before which a curve is too steep to compare


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    results, images, ranks, grids = (
        parts.get(part, Results(())) for part in ("lm", "vision", "ranks", "decays")
    )
    return {
        "ranks.png": (_ranks(results), _PROSE("ranks_figure")),
        "spectra.png": (
            _spectra(results),
            _PROSE("spectra_figure"),
        ),
        "effective_rank.png": (
            _effective_rank(results),
            _PROSE("effective_rank_figure"),
        ),
        "explanations.png": (
            _explanations(results),
            _PROSE("explanations_figure"),
        ),
        "warm_start.png": (
            _warm_start(results),
            _PROSE("warm_start_figure"),
        ),
        "images.png": (
            _images(images),
            _PROSE("images_figure"),
        ),
        "image_ranks.png": (_image_ranks(ranks, images), _PROSE("image_ranks_figure")),
        "decays.png": (_decays(grids), _PROSE("decays_figure")),
    }


def _ranks(results: Results) -> Any:
    arms = ["dense", *(experiment.arm(i, r) for i in experiment.INITS for r in experiment.RANKS)]
    if not results.has(*arms):
        return None
    results = results.shared(*arms)
    figure, (axes,) = panels(1, (7.5, 4.2))
    for i, rank in enumerate(experiment.RANKS):
        for j, (init, (colour, label)) in enumerate(_INIT_STYLE.items()):
            values = results.values(experiment.arm(init, rank), "perplexity")
            dots(axes, i + 1 + (j - 1) * 0.25, values, colour, "" if i else label)
    dots(axes, 0, results.values("dense", "perplexity"), "black", "dense")
    names = ["dense", *(f"rank {rank} of the\nsmaller side" for rank in experiment.RANKS)]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("perplexity")
    legend_below(figure, axes, 4)
    return figure


def _profile(results: Results, arm: str, when: str) -> np.ndarray:
    """Returns singular values over the largest, mean over matrices and seeds."""
    return np.mean([row[when] for row in results.find(arm).values()], axis=0)


def _decayed(kind: str, weight: str) -> str:
    """Returns the arm of a decay at the full rate; `kind` may be 'none'."""
    return experiment.spectral("full") if kind == "none" else experiment.decayed(kind, weight)


def _grid() -> list[str]:
    """Returns the arms of all decays and that without."""
    pairs = itertools.product(experiment.DECAYS, experiment.WEIGHTS)
    return [experiment.spectral("full"), *itertools.starmap(experiment.decayed, pairs)]


def _spectra(results: Results) -> Any:
    arms = _grid()
    results = results.shared(*arms)
    runs = [row for arm in arms for row in results.find(arm).values()]
    if not results.has(*arms) or not all(row["last_profile"] for row in runs):
        return None
    figure, axes = panels(len(experiment.WEIGHTS), (8.4, 3.9), share_y=True)
    start = _profile(results, experiment.spectral("full"), "first_profile")
    index = np.arange(1, len(start) + 1)
    for weight, one in zip(experiment.WEIGHTS, axes, strict=True):
        one.plot(index, start, color="black", ls=":", lw=2, label="start")
        for kind, (colour, marker) in _DECAY_STYLE.items():
            values = _profile(results, _decayed(kind, weight), "last_profile")
            style = {"color": colour, "marker": marker, "ms": 4, "markevery": 4, "lw": 2}
            one.plot(index, values, label=f"end, {_DECAY_NAMES[kind]}", **style)
        one.set_title(f"lambda {weight}", fontsize=10)
        one.set(xlabel="singular value, by size", ylim=(0, 1.02))
    axes[0].set_ylabel("singular value over the largest")
    legend_below(figure, axes[0], 4)
    return figure


def _effective_rank(results: Results) -> Any:
    arms = _grid()
    results = results.shared(*arms)
    if not results.has(*arms) or not results.values(arms[0], "effective_rank").size:
        return None
    figure, axes = panels(len(experiment.WEIGHTS), (8.4, 3.9), share_y=True)
    for weight, one in zip(experiment.WEIGHTS, axes, strict=True):
        for kind, (colour, _) in _DECAY_STYLE.items():
            runs = results.find(_decayed(kind, weight)).values()
            curves = [{r["step"]: r["effective_rank"] for r in row["spectrum"]} for row in runs]
            _curves(one, curves, color=colour, label=_DECAY_NAMES[kind])
        one.set_title(f"lambda {weight}", fontsize=10)
        one.set(xlabel="updates", ylim=(0, None))
    axes[0].set_ylabel("effective rank, mean over matrices")
    legend_below(figure, axes[0], 3)
    return figure


def _curves(axes: Any, curves: Sequence[Mapping[int, float]], **style: Any) -> None:
    """Draws the mean of curves, {step: value}, at the steps that all have, and each as a thin line."""
    steps = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[step] for curve in curves] for step in steps])
    axes.plot(steps, values, color=style["color"], lw=0.7, alpha=0.4)
    axes.plot(steps, values.mean(axis=1), **{"lw": 2, "marker": "o", "ms": 3, **style})


def _explanations(results: Results) -> Any:
    results = results.shared(*_grid())
    lines = {
        kind: [_decayed("none", ""), *(_decayed(kind, weight) for weight in experiment.WEIGHTS)]
        for kind in experiment.DECAYS
    }
    names = ("perplexity", *_CAUSES)
    if not all(results.values(arm, name).size for arm in _grid() for name in names):
        return None
    figure, axes = panels(2, (8.4, 4.4), share_y=True)
    for one, (cause, words) in zip(axes, _CAUSES.items(), strict=True):
        means = {}
        for kind, arms in lines.items():
            colour, marker = _DECAY_STYLE[kind]
            points = [
                aligned(*(results.scores(arm, x) for x in (cause, "perplexity"))) for arm in arms
            ]
            for x, y in points:
                one.plot(x, y, ls="", marker=".", ms=4, color=colour, alpha=0.5)
            means[kind] = np.array([[x.mean(), y.mean()] for x, y in points]).T
            one.plot(
                *means[kind], color=colour, marker=marker, ms=7, lw=1.2, label=_DECAY_NAMES[kind]
            )
        _arrow(one, means["frobenius"][:, 1 + experiment.WEIGHTS.index(_WEIGHT)], means["l2"])
        one.set_xlabel(words)
        one.set_xscale("log")  # as lines are interpolated
        one.tick_params(axis="x", which="minor", labelbottom=False)
    plain_ticks(axes[1].xaxis)
    axes[0].set_yscale("log")
    plain_ticks(axes[0].yaxis)
    axes[0].set_ylabel("perplexity (log scale)")
    legend_below(figure, axes[0], 2)
    return figure


def _arrow(axes: Any, point: np.ndarray, line: np.ndarray) -> None:
    """Draws an arrow to a point from the line above or below it, as `report.gap_to_line` has it."""
    xs, ys = np.log(line[:, np.argsort(line[0])])
    at = np.exp(np.interp(np.log(point[0]), xs, ys))
    look = {"arrowstyle": "->", "color": RED, "lw": 2, "shrinkA": 0, "shrinkB": 4}
    axes.annotate("", tuple(point), (point[0], at), arrowprops=look)


def _warm_start(results: Results) -> Any:
    arms = {
        "dense": ("black", "-", "dense"),
        experiment.spectral("full"): (BLUE, "-", "factors from the start"),
        experiment.spectral("half"): (BLUE, "--", "factors from the start, half the rate"),
        experiment.warm("full"): (RED, "-", "dense, then factors"),
        experiment.warm("half"): (RED, "--", "dense, then factors, half the rate"),
        experiment.spectral("full", "_ratio"): (GREEN, "-", "factors of smaller ranks"),
        experiment.warm("full", "_ratio"): (PURPLE, "-", "dense, then factors of smaller ranks"),
    }
    if not results.has("dense_start", *arms):
        return None
    figure, (axes,) = panels(1, (8.0, 5.4))
    results = results.shared("dense_start", *arms)
    starts = results.find("dense_start")
    for arm, (colour, line, label) in arms.items():
        curves = [
            {
                step: value
                for step, value in (
                    *(starts[seed]["curve"] if row["parents"] else ()),
                    *row["curve"],
                )
                if step >= _FROM
            }
            for seed, row in results.find(arm).items()
            if seed in starts
        ]
        _curves(axes, curves, color=colour, ls=line, label=label)
    switch = next(iter(starts.values()))["step"]
    axes.axvline(switch, color=GREY, ls="--", lw=1.2)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate("factorised", (switch, 0.97), (4, 0), fontsize=9, va="top", **place)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set(xlabel="updates", ylabel="perplexity (log scale)")
    legend_below(figure, axes, 2)
    return figure


def _images(results: Results) -> Any:
    dense = [*map(experiment.image_dense, experiment.IMAGE_RATES), "narrow"]
    factors = {
        experiment.image_arm(init, kind, rate): PURPLE if kind == "l2" else _INIT_STYLE[init][0]
        for (init, kind), rates in experiment.IMAGE_FACTORS.items()
        for rate in rates
    }
    if not results.has(*dense, *factors):
        return None
    results = results.shared(*dense, *factors)
    figure, (left, right) = panels(2, (8.0, 3.8))
    colours = dict.fromkeys(dense, GREY) | factors
    for axes, score, scale, arms in (
        (left, "accuracy", 100, colours),
        (right, "effective_rank", 1, factors),
    ):
        shown = []
        for arm, colour in arms.items():
            values = scale * results.values(arm, score)
            shown.append((arm_name(arm), values, intervals.student(values), colour))
        paired(axes, shown)
        axes.grid(visible=True, axis="x", alpha=0.25)
        axes.grid(visible=False, axis="y")
    for rate, style in zip(experiment.IMAGE_RATES, ("--", ":"), strict=True):
        ends = experiment.image_dense(rate), experiment.image_arm("he", "frobenius", rate)
        middle = 100 * np.mean([results.values(end, "accuracy").mean() for end in ends])
        left.axvline(middle, color="black", lw=0.9, ls=style, label=f"middle at the {rate} rate")
    left.set_xlabel("accuracy in per cent", fontsize=9)
    right.set_xlabel("effective rank at the end", fontsize=9)
    legend_below(figure, left, 2)
    return figure


def _image_ranks(results: Results, images: Results) -> Any:
    ranks = experiment.IMAGE_RANKS
    arms = {("spectral", rank): experiment.arm("spectral", rank) for rank in ranks}
    arms["he", experiment.HE_RANK] = experiment.arm("he", experiment.HE_RANK)
    if not results.has("dense", *arms.values()):
        return None
    results = results.shared("dense", *arms.values())
    # As in textures_low_rank.gin.
    runs = {("he", 0.1): (images, experiment.image_arm("he", "frobenius", "full"))}
    runs |= {place: (results, arm) for place, arm in arms.items()}
    figure, (axes,) = panels(1, (7.5, 4.2))
    dense = 100 * results.values("dense", "accuracy")
    axes.axhspan(dense.min(), dense.max(), color=GREY, alpha=0.2, lw=0)
    axes.axhline(dense.mean(), color="black", lw=1.2, label="dense, and its seeds")
    for side, init in zip((-0.01, 0.01), experiment.INITS[:2], strict=True):
        colour, label = _INIT_STYLE[init]
        means = {}
        for (start, rank), (where, arm) in runs.items():
            of_seeds = 100 * where.values(arm, "accuracy")
            if start == init and of_seeds.size:
                place = [rank + side] * len(of_seeds)
                axes.plot(place, of_seeds, "o", ms=4, color=colour, alpha=0.5, mew=0)
                means[rank + side] = of_seeds.mean()
        axes.plot(*zip(*means.items(), strict=True), "_-", ms=14, color=colour, label=label)
    axes.set_xticks(ranks)
    axes.set(xlabel="rank, share of the smaller side", ylabel="accuracy in per cent")
    legend_below(figure, axes, 3)
    return figure


def _decays(results: Results) -> Any:
    plain = experiment.spectral("full")
    arms = {
        kind: [experiment.decayed(kind, weight) for weight in weights]
        for kind, weights in experiment.GRIDS.items()
    }
    if not results.has(plain, *itertools.chain(*arms.values())):
        return None
    results = results.shared(plain, *itertools.chain(*arms.values()))
    figure, axes = panels(2, (8.4, 4.0))
    for one, (score, words) in zip(
        axes,
        (("perplexity", "perplexity"), ("effective_rank", _CAUSES["effective_rank"])),
        strict=True,
    ):
        one.axhline(results.values(plain, score).mean(), color=GREY, ls="--", label="no decay")
        for kind, every in arms.items():
            colour, marker = _DECAY_STYLE[kind]
            weights = [float(weight) for weight in experiment.GRIDS[kind]]
            values = [results.values(arm, score) for arm in every]
            for weight, of_seeds in zip(weights, values, strict=True):
                one.plot([weight] * len(of_seeds), of_seeds, ".", ms=5, color=colour, alpha=0.5)
            means = [of_seeds.mean() for of_seeds in values]
            one.plot(weights, means, color=colour, marker=marker, label=_DECAY_NAMES[kind])
        one.set_xscale("log")
        one.set(xlabel="weight of the decay", ylabel=words)
    axes[1].set_yscale("log")
    plain_ticks(axes[1].yaxis)
    legend_below(figure, axes[0], 3)
    return figure
