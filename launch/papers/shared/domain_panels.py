"""Panels of losses by domain, which the reports on mixtures share."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from launch.papers.shared.domains import MEAN, DomainRuns
from launch.plots import panels


def excess_bars(
    results: DomainRuns,
    arms: Mapping[str, str],
    *,
    score: str = MEAN,
    label: Callable[[str], str] | None = None,
) -> Any:
    """Returns a figure of the losses of arms with intervals and dots for seeds; None without any of the arms.

    There are bars over the entropy where it is known; elsewhere zero means nothing, and there are points.

    Args:
      results: of a part.
      arms: arm -> colour; missing ones are not drawn.
      score: of results.
      label: arm -> its name; results.label if None.
    """
    shown = {arm: results.values(arm, score) for arm in arms if results.values(arm, score).size}
    if not shown:
        return None
    floor = results.floor(score)
    figure, (axes,) = panels.panels(1, (1.6 + 0.5 * len(shown), 5.0))
    for i, (arm, values) in enumerate(shown.items()):
        if floor is None:
            panels.point(axes, i, values, 0.85, arms[arm])
        else:
            panels.bar(axes, i, values - floor, 0.85, arms[arm])
    labels = [(label or results.label)(arm) for arm in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=40, ha="right", fontsize=8)
    over = "" if floor is None else " over the entropy"
    axes.set_ylabel(f"{score}{over}, nats per token")
    return figure


def curve(
    axes: Any,
    results: DomainRuns,
    arm: str,
    score: str,
    style: Mapping[str, Any],
    *,
    scale: float = 1.0,
    label: str = "",
) -> None:
    """Draws the mean loss over seeds against the step times `scale`, the seeds as thin lines.

    At the steps at which all of the arm's runs were evaluated.
    """
    steps = [step for step in results.steps(arm) if step]
    if not steps:
        return
    by_step = [results.at(step).values(arm, score) for step in steps]
    if not all(values.size for values in by_step):
        return
    at = scale * np.array(steps, float)
    values_SN = np.array(by_step)
    axes.plot(at, values_SN.mean(1), lw=2, ms=3, label=label or results.label(arm), **style)
    thin = {**style, "marker": ""}
    for column in values_SN.T if values_SN.shape[1] > 1 else ():
        axes.plot(at, column, lw=0.5, alpha=0.4, **thin)
