"""Plots of the experiment on images; None where there is nothing to plot."""

from typing import Any

from launch.papers.low_rank import vision_sweep as vision
from launch.papers.low_rank.arms import Results
from launch.papers.low_rank.scatter import DECAY_NAMES, DECAY_STYLE, Point, scatter
from launch.plots import intervals
from launch.plots.panels import bar, legend_below, panels

_WIDTH = 0.14
_NAMES = {"he": "He", "spectral": "spectral", "spectral_ones": "spectral ones"}


def figures(results: Results) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    return {
        "images.png": (
            _bars(results),
            "Accuracy on images and effective rank at the end, by start and decay; dots are seeds, light bars are "
            "of half the learning rate, the line is dense",
        ),
        "image_explanations.png": (
            _explanations(results),
            "Accuracy on images against the effective step and against the effective rank, spectral start",
        ),
    }


def _cases(results: Results, init: str) -> dict[tuple[str, str], str]:
    """Returns (decay, rate) -> arm, of the arms that have runs."""
    arms = {
        (kind, rate): vision.arm(init, kind, rate)
        for kind in vision.DECAYS
        for rate in vision.RATES
    }
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
    cases = [(kind, rate) for kind in vision.DECAYS for rate in vision.RATES]
    for one, score in zip(axes, ("accuracy", "effective_rank"), strict=False):
        lowest, highest = 1.0, 0.0
        for i, init in enumerate(inits):
            for case, arm in _cases(results, init).items():
                values = results.values(arm, score)
                if not values.size:
                    continue
                lowest, highest = min(lowest, values.min()), max(highest, values.max())
                kind, rate = case
                label = f"{DECAY_NAMES[kind]}, {rate} rate"
                known = one.get_legend_handles_labels()[1]
                at = i + (cases.index(case) - (len(cases) - 1) / 2) * _WIDTH
                bar(one, at, values, _WIDTH, DECAY_STYLE[kind][0], "" if label in known else label)
                if rate == "half":
                    one.patches[-1].set_facecolor(_lighter(DECAY_STYLE[kind][0]))
        one.set_xticks(range(len(inits)), [_NAMES[init] for init in inits])
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


def _explanations(results: Results) -> Any:
    cases = _cases(results, "spectral")
    if len(cases) < len(vision.DECAYS) * len(vision.RATES):
        return None
    points = [Point(arm, kind, rate, "") for (kind, rate), arm in cases.items()]
    return scatter(results, points, "accuracy", "accuracy")
