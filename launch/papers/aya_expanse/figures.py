"""Plots of the small experiment's results; None where there is nothing to plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.aya_expanse import lexicon
from espalier.launch.papers.aya_expanse.experiment import HARMFUL, ROUTINGS, SINGLE, SIX
from espalier.launch.papers.aya_expanse.scores import (
    OFFLINE_FIRST,
    ONLINE_ONLY,
    REWARD,
    STAGES,
    Runs,
    S,
    of_language,
    won_against,
)
from espalier.launch.papers.aya_expanse.small_pool import NOISES
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

_PROSE = Prose.of(__name__)

_WIDTH = 8.0  # inches, so that letters of 8 points are 11 pixels high where the figure is 800 wide
_SMALL = 8
_ROUTING_COLOURS = dict(zip(ROUTINGS, (GREY, PURPLE, ORANGE, BLUE, GREEN, RED), strict=True))
_STAGE_COLOURS = dict(zip(list(STAGES)[1:], (ORANGE, GREY, PURPLE, BLUE), strict=True))
_WAYS = {OFFLINE_FIRST: ("offline first", BLUE), ONLINE_ONLY: ("online only", ORANGE)}
_BESIDE = {"offline_long": ("offline only", "--"), "shared": ("start", ":")}
_MERGES = {
    "merged": ("linear", BLUE),
    "merged_sphere": ("on the sphere", ORANGE),
    "merged_ties": ("TIES", GREEN),
}
_FAMILY_COLOURS = {"en": GREY, "romance": ORANGE, "germanic": BLUE, "slavic": GREEN}


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    runs = parts.get("small")
    drawn = {
        "routing": _routing,
        "wins": _wins,
        "stages": _stages,
        "noise": _noise,
        "rounds": _rounds,
        "merging": _merging,
    }
    return {
        f"{name}.png": (draw(runs) if runs else None, _PROSE(f"{name}_figure"))
        for name, draw in drawn.items()
    }


def _routing(runs: Runs) -> Any:
    arms = {f"student_{name}": (name, colour) for name, colour in _ROUTING_COLOURS.items()}
    figure = _by_language(runs, arms, of_language)
    if figure is not None:
        figure.axes[0].set_ylabel("score of held-out answers")
    return figure


def _wins(runs: Runs) -> Any:
    arms = {arm: (STAGES[arm], colour) for arm, colour in _STAGE_COLOURS.items()}
    figure = _by_language(runs, arms, lambda code: won_against(SINGLE, code))
    if figure is not None:
        (axes,) = figure.axes
        axes.axhline(0.5, color="black", lw=0.8, ls=":")
        axes.set_ylabel("win rate against the best single\nteacher's student (0.5: equal)")
    return figure


def _by_language(runs: Runs, arms: Mapping[str, tuple[str, str]], score: Any) -> Any:
    """Draws a score of arms, with their names and colours, by language: dots of seeds, and their means; None without runs."""
    runs = runs.shared(*arms)
    figure, (axes,) = panels.panels(1, (_WIDTH, 4.0))
    step = 0.84 / len(arms)
    for i, (arm, (name, colour)) in enumerate(arms.items()):
        label = name
        for at, code in enumerate(lexicon.LANGUAGES):
            values = runs.values(arm, score(code))
            if values.size:
                place = at + step * (i - (len(arms) - 1) / 2)
                _narrow_dots(axes, place, values, colour, label)
                label = ""
    if not axes.lines:
        return None
    axes.set_xticks(range(len(lexicon.LANGUAGES)), lexicon.LANGUAGES)
    axes.set_xlabel("language of the requests")
    panels.legend_below(figure, axes, 3)
    return figure


def _narrow_dots(axes: Any, at: float, values: np.ndarray, colour: str, label: str) -> None:
    """Draws a dot for each seed above each other, and a line at their mean."""
    dots = {"ls": "", "marker": "o", "ms": 3, "alpha": 0.5, "mew": 0}
    axes.plot(np.full(len(values), at), values, color=colour, **dots)
    axes.plot([at - 0.055, at + 0.055], [values.mean()] * 2, color=colour, lw=2.5, label=label)


def _stages(runs: Runs) -> Any:
    runs = runs.shared(*STAGES)
    shown = [arm for arm in STAGES if runs.values(arm, S).size]
    if not shown:
        return None
    figure, (whole, parts) = panels.panels(2, (_WIDTH, 4.4), share_y=True)
    for at, arm in enumerate(shown):
        panels.dots(whole, at, runs.values(arm, S), BLUE)
    styles = {lexicon.SHARED: ("-", _FAMILY_COLOURS["en"])}
    for family, codes in lexicon.FAMILIES.items():
        styles |= {
            code: (ls, _FAMILY_COLOURS[family]) for code, ls in zip(codes, ("-", "--"), strict=True)
        }
    for code, (ls, colour) in styles.items():
        means = [runs.values(arm, of_language(code)).mean() for arm in shown]
        parts.plot(range(len(shown)), means, ls=ls, marker="o", ms=4, color=colour, label=code)
    names = [STAGES[arm].replace(" ", "\n") for arm in shown]
    for axes, title in ((whole, "mean over languages"), (parts, "each language, mean over seeds")):
        axes.set_xticks(range(len(shown)), names, fontsize=_SMALL)
        axes.set_title(title, fontsize=10)
    whole.set_ylabel("score of held-out answers")
    panels.legend_below(figure, parts, len(styles))
    return figure


def _noise(runs: Runs) -> Any:
    qualities = runs.pool("by_noise")
    if not qualities:
        return None
    figure, (axes,) = panels.panels(1, (_WIDTH, 4.0))
    places = range(len(NOISES))
    values_NP = np.array([[one[str(noise)] for noise in NOISES] for one in qualities.values()])
    _joined(axes, places, values_NP, BLUE, "by reward")
    fixed = [np.mean(list(one["fixed"].values())) for one in runs.pool("routings").values()]
    lines = {
        "fixed": (fixed, ORANGE, "--"),
        "at random": (runs.pool("uniform").values(), GREY, ":"),
    }
    for name, (values, colour, style) in lines.items():
        axes.axhline(float(np.mean(list(values))), color=colour, lw=1.5, ls=style, label=name)
    axes.set_xticks(places, [f"{noise:g}" for noise in NOISES])
    axes.set(xlabel="deviation of the reward's noise", ylabel="score of the chosen answers")
    panels.legend_below(figure, axes, 3)
    return figure


def _joined(
    axes: Any, places: Sequence[float], values_NP: np.ndarray, colour: str, label: str
) -> None:
    """Draws a thin line for each seed, and their mean."""
    for line in values_NP:
        axes.plot(places, line, color=colour, lw=0.7, alpha=0.45)
    axes.plot(places, values_NP.mean(0), color=colour, lw=2, marker="o", ms=4, label=label)


def _rounds(runs: Runs) -> Any:
    runs = runs.shared(*OFFLINE_FIRST, *ONLINE_ONLY, *_BESIDE)
    figure, every = panels.panels(2, (_WIDTH, 4.0))
    for axes, score in zip(every, (S, REWARD), strict=True):
        for arms, (name, colour) in _WAYS.items():
            shown = [arm for arm in arms if runs.values(arm, score).size]
            if shown:
                places = [arms.index(arm) + (arms == ONLINE_ONLY) for arm in shown]
                _joined(axes, places, np.array(runs.paired(score, *shown)).T, colour, name)
        axes.set(xlabel="round (0: offline)", ylabel=score)
    if not every[0].lines:
        return None
    for arm, (name, style) in _BESIDE.items():
        values = runs.values(arm, S)
        if values.size:
            every[0].axhline(values.mean(), color=GREY, ls=style, lw=1.2, label=name)
    panels.legend_below(figure, every[0], 4)
    return figure


def _merging(runs: Runs) -> Any:
    searches = runs.searches()
    found = {arm: runs.strengths(arm) for arm in _MERGES}
    if not searches or not any(found.values()):
        return None
    figure, (strengths, without) = panels.panels(2, (_WIDTH, 4.0))
    for arm, (name, colour) in _MERGES.items():
        losses_NLP = np.array([one["losses"] for one in found[arm].values()])
        if losses_NLP.size:
            _joined(strengths, losses_NLP[0, :, 0], losses_NLP[:, :, 1], colour, name)
    strengths.set(
        xlabel="share of the sum of the updates", ylabel="development loss, nats per token"
    )
    strengths.legend(frameon=False, fontsize=_SMALL)
    gains_NM = np.array([one["gains"] for one in searches.values()])
    names = [name.replace("_", " ").replace("student reward", "joint student") for name in SIX]
    names[-1] += ", copy"
    rows = [
        (name, list(column), {"value": column.mean(), "low": np.nan, "high": np.nan}, colour)
        for name, column, colour in zip(names, gains_NM.T, _harmful_red(), strict=True)
    ]
    panels.paired(without, rows)
    without.axvline(0, color="black", lw=0.8, ls=":")
    without.grid(visible=False, axis="y")
    without.grid(visible=True, axis="x", alpha=0.25)
    without.set_xlabel("lower loss without it, nats per token")
    return figure


def _harmful_red() -> list[str]:
    return [RED if i == HARMFUL else BLUE for i in range(len(SIX))]
