"""Panels of losses and loads by domain, which the reports on mixtures share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.shared.domains import (
    LOAD_BOUND,
    ROUTERS,
    DomainRuns,
    choices,
    largest_loads,
)
from espalier.launch.plots import panels

WIDTH = 7.0  # inches: at 800 pixels a page, text of 8 points has 11 pixels and more


def dots(results: DomainRuns, arms: Mapping[str, str], score: str) -> Any:
    """Returns a figure of a score of arms: a row each with the mean and a dot for each seed that all have; None without any.

    Args:
      results: of a part.
      arms: arm -> colour; missing ones are not drawn.
      score: of results.
    """
    results = results.shared(*arms)
    rows = [
        (
            results.label(arm),
            list(values),
            {"value": values.mean(), "low": np.nan, "high": np.nan},
            c,
        )
        for arm, c in arms.items()
        if (values := results.values(arm, score)).size
    ]
    if not rows:
        return None
    figure, (axes,) = panels.panels(1, (WIDTH, 1.1 + 0.28 * len(rows)))
    panels.paired(axes, rows)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(f"{score}, nats per token")
    return figure


def load_dots(results: DomainRuns, arms: Mapping[str, str]) -> Any:
    """Returns a figure of the largest load of every router and layer by seed, a panel for each layer; None without any."""
    loads = {}  # (arm, router) -> [seed, layer]
    for arm in arms:
        for router in ROUTERS:
            tables = [choices(row, router) for row in results.find(arm).values()]
            if measured := [largest_loads(table) for table in tables if table is not None]:
                loads[arm, router] = np.array(measured)
    if not loads:
        return None
    layers = next(iter(loads.values())).shape[1]
    size = (WIDTH if layers <= 2 else 3.2 + 2.6 * layers, 1.2 + 0.26 * len(loads))
    figure, every = panels.panels(layers, size, share_y=True)
    for layer, axes in enumerate(every):
        rows = []
        for (arm, router), loads_NL in loads.items():
            values = loads_NL[:, layer]
            top = " (top-1)" if router in results.top_1(arm) else ""
            label = f"{results.label(arm)}: {ROUTERS[router]}{top}"
            mean = {"value": values.mean(), "low": np.nan, "high": np.nan}
            rows.append((label, list(values), mean, arms[arm]))
        panels.paired(axes, rows)
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(LOAD_BOUND, color="black", ls="--", lw=1)
        axes.set(xlim=(0, 1), xlabel="largest load", title=f"layer {layer}")
    return figure


def choice_maps(results: DomainRuns, shown: Sequence[tuple[str, str]], *, columns: int = 2) -> Any:
    """Returns a figure of first choices in the last layer, which knows domains: a map for each (arm, router); None without any.

    The darkest colour is the largest share. Means are over the seeds that all of these arms have.
    """
    results = results.shared(*(arm for arm, _ in shown))
    tables = [
        (
            f"{results.label(arm)}:\n{ROUTERS[router]} router",
            arm,
            np.mean([*by_seed.values()], 0)[-1],
        )
        for arm, router in shown
        if (by_seed := results.choices(arm, router))
    ]
    if not tables:
        return None
    domains = [name.replace("_", " ") for name in results.domains]
    most = max(chosen_DE.max() for _, _, chosen_DE in tables)
    columns = min(columns, len(tables))
    rows = math.ceil(len(tables) / columns)
    figure, axes = panels.panels(columns, (WIDTH, rows * (0.22 * len(domains) + 1.6)), rows=rows)
    for at, (title, arm, chosen_DE) in enumerate(tables):
        names = [name.replace("_", " ") for name in results.experts(arm, chosen_DE.shape[-1])]
        first = at % columns == 0
        panels.heat_map(
            axes[at], chosen_DE, domains, names, title=title, row_names=first, most=most
        )
        axes[at].set_xlabel("expert")
        if first:
            axes[at].set_ylabel("tokens of the domain")
    for one in axes[len(tables) :]:
        one.set_visible(False)
    return figure


def curve(
    axes: Any,
    results: DomainRuns,
    arm: str,
    score: str,
    style: Mapping[str, Any],
    *,
    scale: float = 1.0,
    less: float = 0.0,
) -> None:
    """Draws the mean loss over seeds minus a constant, against the step times `scale`; the seeds as thin lines.

    At the steps at which all of the arm's runs were evaluated.
    """
    steps = [step for step in results.steps(arm) if step]
    if not steps:
        return
    by_step = [results.at(step).values(arm, score) for step in steps]
    if not all(values.size for values in by_step):
        return
    at = scale * np.array(steps, float)
    values_SN = np.array(by_step) - less
    axes.plot(at, values_SN.mean(1), lw=2, ms=3, label=results.label(arm), **style)
    thin = {**style, "marker": ""}
    for column in values_SN.T if values_SN.shape[1] > 1 else ():
        axes.plot(at, column, lw=0.5, alpha=0.4, **thin)
