"""Plots of the parts' results; None where there is nothing to plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.nexus.arms import (
    APPENDED,
    BUDGETS,
    EXTENDED,
    EXTENSIONS,
    LOW,
    NEW,
    OLD,
    PLACED,
    RESET,
    ROUTERS,
    STARTED,
    Runs,
    start,
)
from launch.papers.nexus.claims import SELECTIVE
from launch.papers.shared.domain_panels import choice_maps, dots, load_dots
from launch.papers.shared.domains import swept
from launch.plots import heat_maps, panels
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE

_STYLES = {EXTENDED: (BLUE, "s"), RESET: (ORANGE, "o"), "ext_random": (PURPLE, "D")}
_MAPPED = ("nexus", start(EXTENDED), EXTENDED, start(APPENDED))


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    out: dict[str, tuple[Any, str]] = {}
    for name, runs in swept(parts).items():
        out |= {
            f"{name}_loss.png": (
                dots(runs, _colours(), OLD),
                f"Mean loss over the old {name} domains after upcycling: a dot for each seed, a bar for their mean",
            ),
            f"{name}_selectivity.png": (
                _selectivity(runs),
                f"The new expert's share of the new {name} domain's tokens less its share of the old domains', before the "
                "extension's first update, by layer: a dot for each seed, a bar for their mean; dashed: what N12 asks of the last layer",
            ),
            f"{name}_extension.png": (
                _extension(runs),
                f"Loss on the new and on the old {name} domains less that of a linear router with a row appended, against the "
                "updates of the extension: means over seeds, and the seeds as dots",
            ),
            f"{name}_choices.png": (
                choice_maps(runs, [(arm, "mlp") for arm in _MAPPED]),
                f"Share of each of the {name} domains' tokens whose first choice an expert is, by layer; means over seeds",
            ),
            f"{name}_loads.png": (
                load_dots(runs, _colours()),
                f"Largest share of the {name} domains' tokens that one expert gets, by layer: a dot for each seed. Dashed: the "
                "bound above which a router has collapsed",
            ),
            f"{name}_cosines.png": (
                _cosines(runs),
                f"Cosines of the {name} domains' embeddings, and below of the experts' vectors that Nexus projects from them "
                "in the last layer, by how embeddings are placed; means over seeds",
            ),
        }
    return out


def _colours() -> dict[str, str]:
    """Returns arm -> colour of the mixtures before the extension."""
    return {
        **{arm: BLUE if "nexus" in arm else ORANGE for arm in ROUTERS},
        **{arm: GREEN if "nexus" in arm else GREY for arm in LOW},
    }


def _selectivity(runs: Runs) -> Any:
    by_arm = {
        arm: np.array([*by_seed.values()])
        for arm in {**EXTENSIONS, **STARTED}
        if (by_seed := runs.selectivity(start(arm)))
    }
    if not by_arm:
        return None
    layers = next(iter(by_arm.values())).shape[1]
    size = (3.0 + 2.6 * layers, 1.2 + 0.28 * len(by_arm))
    figure, every = panels.panels(layers, size, share_y=True)
    values = np.concatenate([*by_arm.values()])
    low, high = min(values.min(), 0.0) - 0.05, max(values.max(), SELECTIVE) + 0.05
    for layer, axes in enumerate(every):
        rows = []
        for arm, values_NL in by_arm.items():
            mine = values_NL[:, layer]
            mean = {"value": mine.mean(), "low": np.nan, "high": np.nan}
            rows.append(((EXTENSIONS | STARTED)[arm], list(mine), mean, BLUE))
        panels.paired(axes, rows)
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(0, color="black", lw=0.8)
        axes.set(xlabel="share of the new less share of the old", title=f"layer {layer}")
        axes.set_xlim(low, high)
        axes.axvline(SELECTIVE, color="black", ls="--", lw=1)
    return figure


def _extension(runs: Runs) -> Any:
    steps = runs.steps(*_STYLES, APPENDED)
    if not [step for step in steps if step]:
        return None
    figure, every = panels.panels(2, (10, 4.2))
    # A logarithmic axis has no 0: the start is drawn at half of the first reading.
    at = [step or min(filter(None, steps)) / 2 for step in steps]
    for axes, score in zip(every, (NEW, OLD), strict=True):
        axes.axhline(0, color=GREY, lw=1.2, label=EXTENSIONS[APPENDED])
        for shift, (arm, (colour, marker)) in zip((0.94, 1.0, 1.06), _STYLES.items(), strict=True):
            gaps = [np.subtract(*runs.at(step).paired(score, arm, APPENDED)) for step in steps]
            places = [shift * x for x in at]
            means = [gap.mean() for gap in gaps]
            style = {"color": colour, "marker": marker, "ms": 5}
            axes.plot(places, means, lw=1.8, label=EXTENSIONS[arm], **style)
            for x, gap in zip(places, gaps, strict=True):
                axes.plot([x] * len(gap), gap, ls="", marker=".", ms=4, color=colour, alpha=0.5)
        axes.set_xscale("log")
        ticks = {x: str(step) for x, step in zip(at, steps, strict=True) if step in (0, *BUDGETS)}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.set(xlabel="updates of the extension", ylabel=f"{score} less that of a row appended")
    panels.legend_below(figure, every[0], 4)
    return figure


def _cosines(runs: Runs) -> Any:
    by_arm = {arm: [*by_seed.values()] for arm in PLACED if (by_seed := runs.cosines(arm))}
    if not by_arm:
        return None
    names: Sequence[str] = runs.initial
    figure, axes = heat_maps.grid(2, len(by_arm), (len(names), len(names)))
    for at, (arm, seeds) in enumerate(by_arm.items()):
        vectors_EE = np.mean([vectors for vectors, _ in seeds], axis=0)
        projected_EE = np.mean([projected_LEE[-1] for _, projected_LEE in seeds], axis=0)
        shown = {f"{PLACED[arm]}: domains": vectors_EE, "experts' vectors": projected_EE}
        for one, (title, values) in zip(axes[:, at], shown.items(), strict=True):
            heat_maps.draw(one, values, names, names, title=title, signed=True, row_names=at == 0)
    return figure
