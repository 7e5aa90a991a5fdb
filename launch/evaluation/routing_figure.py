"""Plots the shares of launch/evaluation/routing.py: task by expert, for each router and layer and their mean."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.plots import heat_maps

WORDS = {"mlp": "FFN", "attention": "attention"}


def draw(shares: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes a PNG of the mean probabilities.

    Args:
      shares: the result of routing.routing.
      path: of the PNG.
    """
    figure(shares["domains"], shares["experts"]).savefig(path, dpi=130)


def figure(domains: Mapping[str, Mapping[str, Any]], experts: Sequence[str] = ()) -> Any:
    """Returns the figure.

    Args:
      domains: task -> router -> [layer][expert].
      experts: names of the experts; a router with another number of experts has numbers instead.
    """
    tables = {
        router: np.array([domains[task][router] for task in domains])  # [task, layer, expert]
        for router in next(iter(domains.values()))
    }
    layers = max(values.shape[1] for values in tables.values())
    names = {
        router: list(experts) if len(experts) == values.shape[-1] else range(values.shape[-1])
        for router, values in tables.items()
    }
    size = (len(domains), max(values.shape[-1] for values in tables.values()))
    drawn, axes = heat_maps.grid(len(tables), layers + 1, size)
    for line, (router, values) in zip(axes, tables.items(), strict=True):
        shown = {"mean of layers": values.mean(1)}
        shown |= {f"layer {i}": values[:, i] for i in range(values.shape[1])}
        for panel, (title, matrix) in zip(line, shown.items(), strict=False):
            heat_maps.draw(
                panel,
                matrix,
                list(domains),
                [str(name) for name in names[router]],
                title=f"{WORDS[router]} router, {title}",
                row_names=panel is line[0],
            )
        for unused in line[len(shown) :]:
            unused.set_visible(False)
    return drawn
