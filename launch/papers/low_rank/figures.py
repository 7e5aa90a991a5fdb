"""Plots of both experiments; None where there is nothing to plot. Dots and thin lines are seeds."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.low_rank import experiment
from espalier.launch.papers.low_rank.experiment import Results, arm_name
from espalier.launch.papers.shared.page import Prose
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
_CAUSES = {
    "effective_step": "effective step at the end: rate over mean |W|²",
    "effective_rank": "effective rank at the end",
}
_INIT_STYLE = {
    "he": (ORANGE, "He"),
    "spectral": (BLUE, "spectral"),
    "spectral_ones": (GREEN, "spectral ones"),
}
_FROM = 100  # updates before which a curve is too steep to compare


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    results, images = (parts.get(part, Results(())) for part in ("lm", "vision"))
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
    }


def _ranks(results: Results) -> Any:
    if not results.has(
        "dense", *(experiment.arm(i, r) for i in experiment.INITS for r in experiment.RANKS)
    ):
        return None
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


def _spectra(results: Results) -> Any:
    arms = [
        "spectral",
        *(experiment.decayed(k, "full", w) for k in experiment.DECAYS for w in experiment.WEIGHTS),
    ]
    runs = [row for arm in arms for row in results.find(arm).values()]
    if not results.has(*arms) or not all(row["last_profile"] for row in runs):
        return None
    figure, axes = panels(len(experiment.WEIGHTS), (11, 4.4), share_y=True)
    start = _profile(results, "spectral", "first_profile")
    index = np.arange(1, len(start) + 1)
    for weight, one in zip(experiment.WEIGHTS, axes, strict=True):
        one.plot(index, start, color="black", ls=":", lw=2, label="start")
        for kind, (colour, marker) in _DECAY_STYLE.items():
            values = _profile(results, experiment.decayed(kind, "full", weight), "last_profile")
            style = {"color": colour, "marker": marker, "ms": 4, "markevery": 4, "lw": 2}
            one.plot(index, values, label=f"end, {_DECAY_NAMES[kind]}", **style)
        one.set_title(f"lambda {weight}", fontsize=10)
        one.set(xlabel="singular value, by size", ylim=(0, 1.02))
    axes[0].set_ylabel("over the largest")
    legend_below(figure, axes[0], 4)
    return figure


def _effective_rank(results: Results) -> Any:
    grid = [
        experiment.decayed(kind, "full", weight)
        for kind in experiment.DECAYS
        for weight in experiment.WEIGHTS
    ]
    if not results.has("spectral", *grid) or not results.values("spectral", "effective_rank").size:
        return None
    figure, axes = panels(len(experiment.WEIGHTS), (10, 4.2), share_y=True)
    for weight, one in zip(experiment.WEIGHTS, axes, strict=True):
        for kind, (colour, _) in _DECAY_STYLE.items():
            runs = results.find(experiment.decayed(kind, "full", weight)).values()
            curves = [{r["step"]: r["effective_rank"] for r in row["spectrum"]} for row in runs]
            _curves(one, curves, color=colour, label=_DECAY_NAMES[kind])
        one.set_title(f"lambda {weight}", fontsize=10)
        one.set(xlabel="updates", ylim=(0, None))
    axes[0].set_ylabel("effective rank, mean over matrices")
    legend_below(figure, axes[0], 3)
    return figure


def _curves(
    axes: Any, curves: Sequence[Mapping[int, float]], *, seeds: bool = True, **style: Any
) -> None:
    """Draws the mean of curves, {step: value}, at the steps that all have, and each as a thin line with `seeds`."""
    steps = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[step] for curve in curves] for step in steps])
    if seeds:
        axes.plot(steps, values, color=style["color"], lw=0.7, alpha=0.5)
    axes.plot(steps, values.mean(axis=1), **{"lw": 2, "marker": "o", "ms": 3, **style})


def _explanations(results: Results) -> Any:
    kinds = {
        kind: [*(("none", ""),), *((kind, w) for w in experiment.WEIGHTS)]
        for kind in experiment.DECAYS
    }
    arms = [
        experiment.decayed(k, rate, w)
        for rate in experiment.RATES
        for line in kinds.values()
        for k, w in line
    ]
    if not all(results.values(arm, n).size for arm in arms for n in ("perplexity", *_CAUSES)):
        return None
    figure, axes = panels(2, (12, 4.8), share_y=True)
    for one, (cause, words) in zip(axes, _CAUSES.items(), strict=True):
        for (kind, line), rate in itertools.product(kinds.items(), experiment.RATES):
            colour, marker = _DECAY_STYLE[kind]
            names = [experiment.decayed(k, rate, w) for k, w in line]
            x, y = (
                [results.values(name, score).mean() for name in names]
                for score in (cause, "perplexity")
            )
            full = rate == "full"
            look = {"mfc": colour, "ls": "-"} if full else {"mfc": "white", "ls": "--"}
            label = f"{_DECAY_NAMES[kind]}, {rate} rate"
            one.plot(x, y, color=colour, marker=marker, ms=7, lw=1, label=label, **look)
        one.set_xlabel(words)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("perplexity")
    legend_below(figure, axes[0], 4)
    return figure


def _warm_start(results: Results) -> Any:
    arms = {
        "dense": ("black", "-", "dense"),
        "spectral": (BLUE, "-", "factors from the start"),
        experiment.decayed("none", "half"): (BLUE, "--", "the same, half the rate"),
        experiment.warm("full"): (RED, "-", "dense, then factors"),
        experiment.warm("half"): (RED, "--", "the same, half the rate"),
        experiment.ratio_arm("full"): (GREEN, "-", "factors, smaller ranks"),
        experiment.warm("full", "_ratio"): (PURPLE, "-", "dense, then factors, smaller ranks"),
    }
    if not results.has("dense_start", *arms):
        return None
    figure, (axes,) = panels(1, (8.5, 5.4))
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
        _curves(axes, curves, seeds=False, color=colour, ls=line, label=label)
    switch = next(iter(starts.values()))["step"]
    axes.axvline(switch, color=GREY, ls="--", lw=1.2)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate("factorised", (switch, 0.97), (4, 0), fontsize=9, va="top", **place)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set(xlabel="updates", ylabel="perplexity")
    legend_below(figure, axes, 2)
    return figure


def _images(results: Results) -> Any:
    arms = [
        (experiment.image_arm(init, kind, rate), rate, _DECAY_STYLE[kind][0])
        for init, kind in experiment.IMAGE_FACTORS
        for rate in experiment.IMAGE_RATES
    ]
    if not results.has(
        *map(experiment.image_dense, experiment.IMAGE_RATES), *(arm for arm, *_ in arms)
    ):
        return None
    figure, (left, right) = panels(2, (12, 3.4))
    gaps, ranks = [], []
    for arm, rate, colour in arms:
        ones, dense = results.paired("accuracy", arm, experiment.image_dense(rate))
        differences = 100 * (ones - dense)
        gaps.append((arm_name(arm), differences, intervals.student(differences), colour))
        values = results.values(arm, "effective_rank")
        if values.size:
            ranks.append((arm_name(arm), values, intervals.student(values), colour))
    for axes, shown in ((left, gaps), (right, ranks)):
        paired(axes, shown)
        axes.grid(visible=True, axis="x", alpha=0.25)
        axes.grid(visible=False, axis="y")
    left.axvline(0, color="black", lw=0.8)
    means = [
        100 * results.values(experiment.image_dense(rate), "accuracy").mean()
        for rate in experiment.IMAGE_RATES
    ]
    dense = ", ".join(
        f"{mean:.1f} at the {rate} rate"
        for mean, rate in zip(means, experiment.IMAGE_RATES, strict=True)
    )
    left.set_xlabel(f"accuracy in points above dense ({dense})", fontsize=9)
    right.set_xlabel("effective rank at the end", fontsize=9)
    right.set_yticklabels([])
    return figure
