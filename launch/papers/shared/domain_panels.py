"""Panels of losses by domain, which the reproductions of mixtures share."""

from collections.abc import Callable, Mapping, Sequence
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
    """Losses of arms beside each other with intervals, and dots for seeds: bars over the entropy where it is known.

    Where it is not, zero means nothing and there are no bars.

    Args:
      results: of a part.
      arms: arm -> colour; those that are not there are left out.
      score: of results.
      label: arm -> what is written below it; results.label if None.

    Returns:
      The figure; None without any of the arms.
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
    """Mean loss over seeds against the step times `scale`, the seeds as thin lines.

    Steps are those at which all of the arm's runs were evaluated.
    """
    steps = [step for step in results.steps(arm) if step]
    if not steps:
        return
    by_step = [list(results.at(step).scores(arm, score).values()) for step in steps]
    if not all(by_step):
        return
    at = scale * np.array(steps, float)
    values_SN = np.array(by_step)
    axes.plot(at, values_SN.mean(1), lw=2, ms=3, label=label or results.label(arm), **style)
    thin = {**style, "marker": ""}
    for column in values_SN.T if values_SN.shape[1] > 1 else ():
        axes.plot(at, column, lw=0.5, alpha=0.4, **thin)


def mean_tables(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """The mean over runs of what launch/evaluation/routing.py says of each: task -> router -> [layer, expert]."""
    if not found:
        return {}
    return {
        task: {
            router: np.mean([one[task][router] for one in found], axis=0)
            for router in found[0][task]
        }
        for task in found[0]
    }
