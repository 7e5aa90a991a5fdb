"""Plots of the small experiment's results; None where there is nothing to plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.aya_expanse import lexicon
from espalier.launch.papers.aya_expanse.experiment import (
    BETAS,
    DIVERGENCE,
    HARMFUL,
    OFFLINE_FIRST,
    ONLINE_ONLY,
    REWARD,
    ROUTINGS,
    SIX,
    STAGES,
    Runs,
    S,
    of_language,
    won,
)
from espalier.launch.papers.aya_expanse.small_pool import NOISES
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

_PROSE = Prose.of(__name__)

_ROUTING_COLOURS = dict(zip(ROUTINGS, (GREY, PURPLE, ORANGE, BLUE, GREEN, RED), strict=True))
_STAGE_COLOURS = {
    "student_reward": ORANGE,
    "merged": GREY,
    "polish_tenth": PURPLE,
    "merged_offline": GREEN,
    "merged_online": BLUE,
}
_WAYS = {OFFLINE_FIRST: ("offline first", BLUE), ONLINE_ONLY: ("online alone", ORANGE)}


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    runs = parts.get("small")
    return {
        "routing.png": (
            _routing(runs),
            _PROSE("routing_figure"),
        ),
        "wins.png": (
            _wins(runs),
            _PROSE("wins_figure"),
        ),
        "stages.png": (
            _stages(runs),
            _PROSE("stages_figure"),
        ),
        "noise.png": (
            _noise(runs),
            _PROSE("noise_figure"),
        ),
        "rounds.png": (
            _rounds(runs),
            _PROSE("rounds_figure"),
        ),
        "betas.png": (
            _betas(runs),
            _PROSE("betas_figure"),
        ),
        "weights.png": (
            _weights(runs),
            _PROSE("weights_figure"),
        ),
    }


def _routing(runs: Runs | None) -> Any:
    arms = {f"student_{name}": colour for name, colour in _ROUTING_COLOURS.items()}
    if runs is None or not any(runs.has(arm) for arm in arms):
        return None
    figure, (axes,) = panels.panels(1, (10.5, 4.0))
    for i, (arm, colour) in enumerate(arms.items()):
        for at, code in enumerate(lexicon.LANGUAGES):
            values = runs.values(arm, of_language(code))
            if values.size:
                label = arm.removeprefix("student_") if not at else ""
                place = at + 0.14 * (i - (len(arms) - 1) / 2)
                _narrow_dots(axes, place, values, colour, label)
    _languages(axes)
    axes.set_ylabel("score")
    axes.legend(**panels.BESIDE)
    return figure


def _narrow_dots(axes: Any, at: float, values: np.ndarray, colour: str, label: str) -> None:
    """Draws a dot for each seed above each other, and a line at their mean."""
    dots = {"ls": "", "marker": "o", "ms": 3, "alpha": 0.5, "mew": 0}
    axes.plot(np.full(len(values), at), values, color=colour, **dots)
    axes.plot([at - 0.055, at + 0.055], [values.mean()] * 2, color=colour, lw=2.5, label=label)


def _languages(axes: Any) -> None:
    axes.set_xticks(range(len(lexicon.LANGUAGES)), lexicon.LANGUAGES)


def _wins(runs: Runs | None) -> Any:
    rows = {
        arm: [row["wins"] for row in runs.find(arm).values() if row.get("wins")]
        for arm in (_STAGE_COLOURS if runs else ())
        if runs
    }
    if not any(rows.values()):
        return None
    figure, (axes,) = panels.panels(1, (10.5, 4.0))
    for i, (arm, colour) in enumerate(_STAGE_COLOURS.items()):
        for at, code in enumerate(lexicon.LANGUAGES):
            if rows[arm]:
                values = np.array([won(one[code]) for one in rows[arm]])
                place = at + 0.16 * (i - (len(_STAGE_COLOURS) - 1) / 2)
                _narrow_dots(axes, place, values, colour, STAGES[arm] if not at else "")
    axes.axhline(0.5, color="black", lw=0.8, ls=":")
    _languages(axes)
    axes.set(ylabel="win rate", ylim=(-0.02, 1.02))
    axes.legend(**panels.BESIDE)
    return figure


def _stages(runs: Runs | None) -> Any:
    shown = [arm for arm in STAGES if runs and runs.has(arm)]
    if not runs or not shown:
        return None
    figure, (whole, parts) = panels.panels(2, (11.0, 4.2))
    for at, arm in enumerate(shown):
        panels.dots(whole, at, runs.values(arm, S), BLUE)
    colours = panels.colours(len(lexicon.LANGUAGES))
    for code, colour in zip(lexicon.LANGUAGES, colours, strict=True):
        means = [runs.values(arm, of_language(code)).mean() for arm in shown]
        parts.plot(range(len(shown)), means, marker="o", ms=3, lw=1.2, color=colour, label=code)
    for axes in (whole, parts):
        names = [STAGES[arm].replace(" ", "\n") for arm in shown]
        axes.set_xticks(range(len(shown)), names, fontsize=8)
        axes.set_ylabel("score")
    parts.legend(**panels.BESIDE)
    return figure


def _noise(runs: Runs | None) -> Any:
    qualities = runs.pool("by_noise") if runs else {}
    if not runs or not qualities:
        return None
    figure, (axes,) = panels.panels(1, (6.5, 3.8))
    places = range(len(NOISES))
    values_NP = np.array([[one[str(noise)] for noise in NOISES] for one in qualities.values()])
    for line in values_NP:
        axes.plot(places, line, color=BLUE, lw=0.6, alpha=0.4)
    axes.plot(places, values_NP.mean(0), color=BLUE, lw=2, marker="o", label="by reward")
    fixed = np.mean(
        [np.mean(list(one["fixed"].values())) for one in runs.pool("routings").values()]
    )
    axes.axhline(float(fixed), color=ORANGE, lw=1.5, ls="--", label="fixed")
    uniform = np.mean(list(runs.pool("uniform").values()))
    axes.axhline(float(uniform), color=GREY, lw=1.5, ls=":", label="uniform")
    axes.set_xticks(places, [f"{noise:g}" for noise in NOISES])
    axes.set(xlabel="deviation of the reward's noise", ylabel="score of the chosen answers")
    axes.legend(**panels.BESIDE)
    return figure


def _rounds(runs: Runs | None) -> Any:
    if not runs or not any(runs.has(*arms) for arms in _WAYS):
        return None
    figure, every = panels.panels(2, (10.5, 4.0))
    for axes, score in zip(every, (S, REWARD), strict=True):
        for arms, (name, colour) in _WAYS.items():
            drawn = [(at, runs.values(arm, score)) for at, arm in enumerate(arms)]
            drawn = [(at + (arms == ONLINE_ONLY), values) for at, values in drawn if values.size]
            if drawn:
                places, values = zip(*drawn, strict=True)
                means = [one.mean() for one in values]
                axes.plot(places, means, color=colour, marker="o", ms=4, lw=1.8, label=name)
                for at, one in drawn:
                    axes.plot(
                        [at] * len(one),
                        one,
                        ls="",
                        marker="o",
                        ms=3,
                        mew=0,
                        alpha=0.4,
                        color=colour,
                    )
        axes.set(xlabel="round (0: offline)", ylabel=score)
    long = runs.values("offline_long", S)
    if long.size:
        every[0].axhline(
            long.mean(), color=GREY, ls="--", lw=1.2, label="offline, as long as 3 rounds"
        )
    every[0].legend(frameon=False, fontsize=8)
    return figure


def _betas(runs: Runs | None) -> Any:
    arms = {**BETAS, "offline": 0.1}
    order = sorted(arms, key=lambda arm: arms[arm])
    shown = [arm for arm in order if runs and runs.values(arm, DIVERGENCE).size]
    if not runs or not shown:
        return None
    figure, (axes,) = panels.panels(1, (6.5, 3.8))
    for arm, colour in zip(shown, panels.colours(len(shown)), strict=True):
        divergences, scores = runs.paired(DIVERGENCE, arm)[0], runs.paired(S, arm)[0]
        axes.plot(
            divergences,
            scores,
            ls="",
            marker="o",
            ms=5,
            mew=0,
            color=colour,
            label=f"beta {arms[arm]:g}",
        )
    start = runs.values("student_reward", S)
    if start.size:
        axes.axhline(start.mean(), color=GREY, lw=1, ls=":", label="before")
    axes.set(xlabel="divergence from the reference, nats per answer", ylabel="score")
    axes.legend(**panels.BESIDE)
    return figure


def _weights(runs: Runs | None) -> Any:
    searches = runs.searches() if runs else {}
    if not searches:
        return None
    figure, (trials, without) = panels.panels(2, (11.0, 4.0))
    for seed, one in enumerate(searches.values()):
        every = np.array(one["trials"])
        trials.plot(
            every[:, 0], every[:, 1], ls="", marker="o", ms=3, mew=0, alpha=0.35, color=GREY
        )
        for key, colour, name in (("uniform", ORANGE, "equal"), ("best", BLUE, "chosen")):
            label = name if not seed else ""
            trials.plot(*one[key], ls="", marker="o", ms=6, color=colour, mew=0, label=label)
    trials.set(xlabel="mean loss, nats per token", ylabel="loss of the worst language")
    _plain_logarithms(trials)
    trials.legend(frameon=False)
    _gains(without, [one["gains"] for one in searches.values()])
    return figure


def _plain_logarithms(axes: Any) -> None:
    """Makes both axes logarithmic, with plain numbers."""
    from matplotlib import ticker

    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(ticker.NullLocator())


def _gains(axes: Any, gains: Sequence[Sequence[float]]) -> None:
    values_NM = np.array(gains)
    names = [name.replace("_", " ") for name in SIX]
    names[-1] += ", copy"
    rows = [
        (
            name,
            list(column),
            {"value": column.mean(), "low": np.nan, "high": np.nan},
            RED if i == HARMFUL else BLUE,
        )
        for i, (name, column) in enumerate(zip(names, values_NM.T, strict=True))
    ]
    panels.paired(axes, rows)
    axes.axvline(0, color="black", lw=0.8, ls=":")
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("lower loss without it, nats per token")
