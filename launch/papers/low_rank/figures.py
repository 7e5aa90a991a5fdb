"""Plots of both experiments; None where there is nothing to plot."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.low_rank import sweep as lm
from launch.papers.low_rank import timing
from launch.papers.low_rank import vision_sweep as vision
from launch.papers.low_rank.arms import Results
from launch.plots import intervals
from launch.plots.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    bar,
    legend_below,
    level,
    line,
    panels,
    plain_ticks,
    with_errors,
)

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
_SHOWN = ("1e-3", "1e-2")  # lambdas whose spectra are drawn
_WIDTH = 0.14  # of the bars of images
_FROM = 100  # updates before which a curve is too steep to compare


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    results, images = (parts.get(part, Results(())) for part in ("lm", "vision"))
    return {
        "ranks.png": (
            _ranks(results),
            "Perplexity against the rank, by start; dense models as they are and as small as the factors",
        ),
        "spectra.png": (
            _spectra(results),
            "Singular values over the largest, mean over matrices and seeds, at the start and at the end; the sum "
            "of a curve is about the effective rank",
        ),
        "effective_rank.png": (_effective_rank(results), "Effective rank over training, by decay"),
        "explanations.png": (
            _explanations(results),
            "Perplexity against the effective step and against the effective rank, at the end; small points are "
            "seeds, lines join lambdas",
        ),
        "warm_start.png": (
            _warm_start(results),
            "Perplexity over training, factorised at the dashed line; smaller ranks are those of rank_rule = "
            "'param_ratio'",
        ),
        "sizes.png": (
            _sizes(results, parts.get("timing", {})),
            "Perplexity against parameters and against the measured time of a step",
        ),
        "images.png": (
            _bars(images),
            "Accuracy on images and effective rank at the end, by start and decay; dots are seeds, light bars are "
            "of half the learning rate, the line is dense",
        ),
        "image_explanations.png": (
            _image_explanations(images),
            "Accuracy on images against the effective step and against the effective rank, spectral start",
        ),
    }


def _ranks(results: Results) -> Any:
    arms = [lm.arm(init, rank) for init in lm.INITS for rank in lm.RANKS]
    if not results.has("dense", *arms):
        return None
    figure, (axes,) = panels(1, (7.5, 4.6))
    ranks = sorted(lm.RANKS)
    curves = {
        label: (colour, [lm.arm(init, rank) for rank in ranks])
        for init, (colour, label) in _INIT_STYLE.items()
    }
    narrow = [lm.narrow(rank) for rank in ranks]
    if results.has(*narrow):
        curves["dense, as few parameters"] = (GREY, narrow)
    for label, (colour, names) in curves.items():
        line(axes, ranks, results.paired("perplexity", *names), colour, label)
    level(axes, intervals.over_seeds(results.values("dense", "perplexity")), "dense")
    axes.set(xticks=ranks, xlabel="rank, share of the smaller side")
    axes.set_ylabel("perplexity; band: 95 % over seeds")
    legend_below(figure, axes, 3)
    return figure


def _profile(results: Results, arm: str, when: str) -> np.ndarray:
    """Returns singular values over the largest, mean over matrices and seeds; zeros for a matrix that is zero."""
    rows = [
        np.array(values) / (values[0] or 1.0)
        for row in results.find(arm).values()
        for stack in row[when].values()
        for values in stack
    ]
    return np.mean(rows, axis=0)  # all have the rank of the model's width


def _spectra(results: Results) -> Any:
    arms = ["spectral", *(lm.decayed(k, "full", w) for k in lm.DECAYS for w in _SHOWN)]
    runs = [row for arm in arms for row in results.find(arm).values()]
    if not results.has(*arms) or not all(row["last_spectra"] for row in runs):
        return None
    figure, axes = panels(len(_SHOWN), (11, 4.4), share_y=True)
    for weight, one in zip(_SHOWN, axes, strict=True):
        start = _profile(results, "spectral", "first_spectra")
        index = np.arange(1, len(start) + 1)
        one.plot(index, start, color="black", ls=":", lw=2, label="start")
        for kind, (colour, marker) in _DECAY_STYLE.items():
            arm = lm.decayed(kind, "full", weight)
            values = _profile(results, arm, "last_spectra")
            label = f"end, {_DECAY_NAMES[kind]}"
            one.plot(
                index, values, color=colour, marker=marker, ms=4, markevery=4, lw=2, label=label
            )
        one.set_title(f"lambda {weight}", fontsize=10)
        one.set(xlabel="singular value, by size", ylim=(0, 1.02))
    axes[0].set_ylabel("over the largest")
    legend_below(figure, axes[0], 4)
    return figure


def _readings(results: Results, arm: str, name: str) -> tuple[list[int], list[np.ndarray]]:
    """Returns steps, and the values over seeds at each of them."""
    runs = [{r["step"]: r[name] for r in row["spectrum"]} for row in results.find(arm).values()]
    steps = sorted(set.intersection(*map(set, runs)))
    return steps, [np.array([run[step] for run in runs]) for step in steps]


def _effective_rank(results: Results) -> Any:
    grid = [lm.decayed(kind, "full", weight) for kind in lm.DECAYS for weight in lm.WEIGHTS]
    if not results.has("spectral", *grid) or not results.values("spectral", "effective_rank").size:
        return None
    figure, axes = panels(len(lm.WEIGHTS), (12, 4.2), share_y=True)
    for weight, one in zip(lm.WEIGHTS, axes, strict=True):
        for kind, (colour, _) in _DECAY_STYLE.items():
            steps, values = _readings(results, lm.decayed(kind, "full", weight), "effective_rank")
            line(one, steps, values, colour, _DECAY_NAMES[kind])
        one.set_title(f"lambda {weight}", fontsize=10)
        one.set(xlabel="updates", ylim=(0, None))
    axes[0].set_ylabel("effective rank, mean over matrices")
    legend_below(figure, axes[0], 3)
    return figure


def _explanations(results: Results) -> Any:
    points = [
        _Point(lm.decayed(kind, rate, weight), kind, rate, weight)
        for rate in lm.RATES
        for kind in ("none", *lm.DECAYS)
        for weight in (("",) if kind == "none" else lm.WEIGHTS)
    ]
    return _scatter(results, points, "perplexity")


def _warm_start(results: Results) -> Any:
    arms = ("dense", "dense_start", "spectral", "warm_start")
    if not results.has(*arms):
        return None
    styles = {
        "dense": ("black", "dense"),
        "spectral": (BLUE, "factors from the start"),
        "warm_start": (RED, "dense, then factors"),
        "spectral_ratio": (GREEN, "factors from the start, smaller ranks"),
        "warm_start_ratio": (PURPLE, "dense, then factors, smaller ranks"),
    }
    figure, (axes,) = panels(1, (8.5, 5))
    starts = results.find("dense_start")
    for arm, (colour, label) in styles.items():
        runs = [
            dict([*(starts[seed]["curve"] if row["parents"] else ()), *row["curve"]])
            for seed, row in results.find(arm).items()
        ]
        if not runs:
            continue
        steps = sorted(step for step in set.intersection(*map(set, runs)) if step >= _FROM)
        curves = [np.array([run[step] for run in runs]) for step in steps]
        means = [float(values.mean()) for values in curves]
        axes.plot(steps, means, color=colour, lw=2, marker="o", ms=3, label=label)
    switch = next(iter(starts.values()))["step"]
    axes.axvline(switch, color=GREY, ls="--", lw=1.2)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate("factorised", (switch, 0.97), (4, 0), fontsize=9, va="top", **place)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set(xlabel="updates", ylabel="perplexity, mean over seeds")
    legend_below(figure, axes, 2)
    return figure


def _sizes(results: Results, times: Mapping[str, Any]) -> Any:
    families: dict[str, tuple[str, str, Sequence[str]]] = {
        "dense": ("black", "o", ["dense", *map(lm.narrow, lm.RANKS)]),
        "spectral": (BLUE, "s", [lm.arm("spectral", rank) for rank in lm.RANKS]),
        "spectral, smaller ranks": (PURPLE, "D", ["spectral_ratio"]),
    }
    if not results.has(*families["dense"][2], *families["spectral"][2]):
        return None
    figure, axes = panels(2 if times else 1, (11 if times else 6.5, 4.6), share_y=True)
    for label, (colour, marker, arms) in families.items():
        arms = [arm for arm in arms if results.has(arm)]
        if not arms:
            continue
        scores = [intervals.over_seeds(results.values(arm, "perplexity")) for arm in arms]
        places = [[results.values(arm, "parameters").mean() / 1e3 for arm in arms]]
        if times:
            ratios = [intervals.over_seeds(timing.ratios(times, arm)) for arm in arms]
            places.append([ratio["value"] for ratio in ratios])
        for one, at in zip(axes, places, strict=True):
            style = {"color": colour, "marker": marker, "capsize": 2, "label": label}
            with_errors(one, at, scores, ls="-" if len(arms) > 1 else "", **style)
    axes[0].set(xlabel="parameters, thousands", ylabel="perplexity; bars: 95 % over seeds")
    if times:
        axes[1].set_xlabel("time of a step over dense's, measured in turns")
    legend_below(figure, axes[0], 3)
    return figure


_IMAGE_CASES = tuple(itertools.product(vision.DECAYS, vision.RATES))


def _cases(results: Results, init: str) -> dict[tuple[str, str], str]:
    """Returns (decay, rate) -> arm, of the arms that have runs."""
    arms = {case: vision.arm(init, *case) for case in _IMAGE_CASES}
    return {case: name for case, name in arms.items() if results.has(name)}


def _bars(results: Results) -> Any:
    inits = [init for init in vision.INITS if _cases(results, init)]
    if not inits or not results.has("dense"):
        return None
    ranks = any(
        results.values(arm, "effective_rank").size
        for init in inits
        for arm in _cases(results, init).values()
    )
    figure, axes = panels(2 if ranks else 1, (13 if ranks else 7, 4.8))
    for one, score in zip(axes, ("accuracy", "effective_rank"), strict=False):
        lowest, highest = 1.0, 0.0
        for i, init in enumerate(inits):
            for case, arm in _cases(results, init).items():
                values = results.values(arm, score)
                if not values.size:
                    continue
                lowest, highest = min(lowest, values.min()), max(highest, values.max())
                kind, rate = case
                label = f"{_DECAY_NAMES[kind]}, {rate} rate"
                known = one.get_legend_handles_labels()[1]
                at = i + (_IMAGE_CASES.index(case) - (len(_IMAGE_CASES) - 1) / 2) * _WIDTH
                bar(one, at, values, _WIDTH, _DECAY_STYLE[kind][0], "" if label in known else label)
                if rate == "half":
                    one.patches[-1].set_facecolor(_lighter(_DECAY_STYLE[kind][0]))
        one.set_xticks(range(len(inits)), [_INIT_STYLE[init][1] for init in inits])
        one.set_ylabel(score.replace("_", " "))
        if score == "accuracy":  # differences are small beside what all arms reach
            dense = intervals.over_seeds(results.values("dense", "accuracy"))
            highest = max(highest, dense["value"])
            one.set_ylim(max(lowest - 0.1, 0), min(highest + 0.05, 1.0))
            one.axhline(dense["value"], color="black", ls="--", lw=1.5, label="dense")
    legend_below(figure, axes[0], 4)
    return figure


def _lighter(colour: str) -> tuple[float, ...]:
    from matplotlib import colors

    return tuple(0.5 + 0.5 * part for part in colors.to_rgb(colour))


def _image_explanations(results: Results) -> Any:
    cases = _cases(results, "spectral")
    if len(cases) < len(_IMAGE_CASES):
        return None
    points = [_Point(arm, *case, "") for case, arm in cases.items()]
    return _scatter(results, points, "accuracy")


@dataclasses.dataclass(frozen=True)
class _Point:
    """An arm, its decay, its learning rate, 'full' (filled) or 'half' (open), and its text in the plot."""

    arm: str
    kind: str
    rate: str
    text: str


def _scatter(results: Results, points: Sequence[_Point], score: str) -> Any:
    """Draws a score against the effective step and the effective rank; None where an arm or a score is missing."""
    if not all(results.values(p.arm, name).size for p in points for name in (score, *_CAUSES)):
        return None
    figure, axes = panels(2, (12, 5), share_y=True)
    for one, (cause, words) in zip(axes, _CAUSES.items(), strict=True):
        for (kind, (colour, marker)), rate in itertools.product(
            _DECAY_STYLE.items(), ("full", "half")
        ):
            means = []
            for point in points:
                if (point.kind, point.rate) == (kind, rate):
                    (x,), (y,) = (results.paired(name, point.arm) for name in (cause, score))
                    one.plot(x, y, ls="", marker=".", ms=4, color=colour, alpha=0.6)
                    means.append((float(np.mean(x)), float(np.mean(y))))
                    _write(one, point, *means[-1])
            full = rate == "full"
            look = {"mfc": colour, "ls": "-"} if full else {"mfc": "white", "ls": "--"}
            label = f"{_DECAY_NAMES[kind]}, {rate} rate"
            style = {"color": colour, "marker": marker, "ms": 8, "lw": 1, "label": label}
            one.plot(*np.reshape(means, (-1, 2)).T, **style, **look)
        one.set_xlabel(words)
    low, high = axes[0].get_xlim()
    if low <= 0 or high > 10 * low:  # within a decade a logarithmic axis lacks readable ticks
        axes[0].set_xscale("log")
    axes[0].set_ylabel(score)
    legend_below(figure, axes[0], 3)
    return figure


def _write(axes: Any, point: _Point, x: float, y: float) -> None:
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
