"""Plots of the parts' results; None where there is nothing to plot."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.aya23.arms import LOSS, PLAIN, TUNED, TURNS, Runs
from launch.papers.aya23.fertility import SHARES
from launch.papers.aya23.sweep import BASE, COUNTS, WIDTHS, breadth, heads
from launch.plots import panels
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE

_WIDTHS = {"narrow": ORANGE, "wide": BLUE}
_SHARE_COLOURS = {"raw": ORANGE, "balanced": BLUE}
_BLOCKS = (BASE, "sequential", "gelu", heads(4), heads(1))


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    runs = parts.get("toy")
    return {
        "languages.png": (
            _languages(runs),
            "Loss on the four common languages against the number of languages in training, at equally many tokens: a dot "
            "for each seed, and the means; right, over training",
        ),
        "blocks.png": (
            _blocks(runs),
            "Loss of the same model with other blocks: a dot for each seed, a bar for their mean",
        ),
        "answers.png": (
            _answers(runs),
            "Share of instructions that are answered right, with turns and without: a dot for each seed, and the means",
        ),
        "fertility.png": (
            _fertility(parts.get("fertility")),
            "Tokens over the tokens of the same messages in English, by language: a dot for each seed, whose language of "
            "most text is another one, and the means",
        ),
    }


def _languages(runs: Runs | None) -> Any:
    if not runs or not any(runs.has(breadth(c, w)) for c in COUNTS for w in WIDTHS):
        return None
    figure, (ends, course) = panels.panels(2, (10.5, 4.0))
    for width, colour in _WIDTHS.items():
        means = []
        for at, count in enumerate(COUNTS):
            values = runs.values(breadth(count, width), LOSS)
            if values.size:
                panels.dots(
                    ends, at, values, colour, f"{width}, width {WIDTHS[width][0]}" if not at else ""
                )
                means.append((at, values.mean()))
        ends.plot(*zip(*means, strict=True), color=colour, lw=1) if means else None
        for count, style in zip(COUNTS, ("-", "--", ":"), strict=True):
            curves = [row["curve"] for row in runs.find(breadth(count, width)).values()]
            if curves and all(len(curve) == len(curves[0]) for curve in curves):
                steps, losses = np.mean(np.array(curves, float), axis=0).T
                label = f"{width}, {count} languages"
                course.plot(steps, losses, style, color=colour, lw=1.5, label=label)
    ends.set_xticks(range(len(COUNTS)), [str(count) for count in COUNTS])
    ends.set(xlabel="languages in training", ylabel="loss, nats per token")
    ends.legend(frameon=False)
    course.set(xlabel="updates", ylabel="loss, nats per token")
    course.legend(**panels.BESIDE)
    return figure


def _blocks(runs: Runs | None) -> Any:
    rows = [
        (
            runs.label(arm),
            list(values),
            {"value": values.mean(), "low": np.nan, "high": np.nan},
            BLUE if arm == BASE else GREY,
        )
        for arm in (_BLOCKS if runs else ())
        if runs and (values := runs.values(arm, LOSS)).size
    ]
    if not rows:
        return None
    figure, (axes,) = panels.panels(1, (7.5, 1.1 + 0.35 * len(rows)))
    panels.paired(axes, rows)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("loss, nats per token")
    return figure


def _answers(runs: Runs | None) -> Any:
    if not runs or not any(runs.has(arm) for arm in TUNED):
        return None
    figure, (axes,) = panels.panels(1, (8.0, 3.8))
    for i, (score, colour, label) in enumerate(
        ((TURNS, BLUE, "with turns"), (PLAIN, GREEN, "without turns"))
    ):
        for at, arm in enumerate(TUNED):
            values = runs.values(arm, score)
            if values.size:
                panels.dots(axes, at + 0.3 * i - 0.15, values, colour, "" if at else label)
    axes.set_xticks(range(len(TUNED)), [runs.label(arm) for arm in TUNED])
    axes.set(ylim=(-0.03, 1.03), ylabel="share of right answers")
    axes.legend(**panels.BESIDE)
    return figure


def _fertility(measured: Mapping[str, Any] | None) -> Any:
    if not measured:
        return None
    seeds = list(measured.values())
    codes = [code for code in seeds[0]["raw"] if code != "spread"]
    means = {
        name: {code: np.mean([one[name][code] for one in seeds]) for code in codes}
        for name in SHARES
    }
    codes.sort(key=lambda code: means["balanced"][code])
    figure, (axes,) = panels.panels(1, (9.0, 4.0))
    for i, (name, colour) in enumerate(_SHARE_COLOURS.items()):
        for at, code in enumerate(codes):
            values = np.array([one[name][code] for one in seeds])
            label = f"{name} shares" if not at else ""
            panels.dots(axes, at + 0.36 * i - 0.18, values, colour, label)
    axes.set_xticks(range(len(codes)), codes)
    axes.axhline(1.0, color=GREY, lw=0.8, ls=":")
    axes.set_ylabel("tokens over those of the same text in English")
    axes.legend(frameon=False)
    return figure
