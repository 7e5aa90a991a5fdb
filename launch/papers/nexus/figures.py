"""Plots of Nexus' measurements; None where there is nothing to plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.nexus.experiment import (
    APPENDED,
    BUDGETS,
    DENSE,
    EXTENDED,
    EXTENSIONS,
    LINEAR,
    LOW,
    NEW,
    NEXUS,
    OLD,
    RESET,
    ROUTERS,
    STARTED,
    Runs,
    start,
)
from espalier.launch.papers.shared.domain_panels import WIDTH, choice_maps, dots, load_dots
from espalier.launch.papers.shared.domains import SYNTHETIC, TEXT
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE

SELECTIVE = 0.1  # by how much more of its domain than of others or by chance must go to an expert
_STYLES = {EXTENDED: (BLUE, "s"), RESET: (ORANGE, "o")}
_MAPPED = (NEXUS, LINEAR, start(EXTENDED), EXTENDED)


def figures(prose: Prose, parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption); `prose` has the captions."""
    out: dict[str, tuple[Any, str]] = {}
    names = {SYNTHETIC: "generated domains", TEXT: "domains of text"}
    for part, of in names.items():
        if part not in parts:
            continue
        runs = parts[part]
        out |= {
            f"{part}_loss.png": (dots(runs, _colours(), OLD), prose("loss_figure", of=of)),
            f"{part}_extension.png": (_extension(runs), prose("extension_figure", of=of)),
            f"{part}_choices.png": (
                choice_maps(runs, [(arm, "mlp") for arm in _MAPPED]),
                prose("choices_figure", of=of),
            ),
        }
    if runs := parts.get(SYNTHETIC):
        out |= {
            "synthetic_selectivity.png": (_selectivity(runs), prose("selectivity_figure")),
            "synthetic_loads.png": (load_dots(runs, _colours()), prose("loads_figure")),
            "synthetic_cosines.png": (_cosines(runs), prose("cosines_figure")),
        }
    return out


def _colours() -> dict[str, str]:
    """Returns arm -> colour of the mixtures before the extension, and of the dense model."""
    return {
        **{arm: BLUE if "nexus" in arm else ORANGE for arm in ROUTERS},
        **{arm: GREEN if "nexus" in arm else GREY for arm in LOW},
        DENSE: "black",
    }


def _selectivity(runs: Runs) -> Any:
    labels = {start(arm): f"{label}: before" for arm, label in {**EXTENSIONS, **STARTED}.items()}
    labels |= {arm: f"{label}: {BUDGETS[-1]} updates" for arm, label in EXTENSIONS.items()}
    runs = runs.shared(*labels)
    by_arm = {
        arm: np.array([*by_seed.values()]) for arm in labels if (by_seed := runs.selectivity(arm))
    }
    if not by_arm:
        return None
    layers = next(iter(by_arm.values())).shape[1]
    figure, every = panels.panels(layers, (WIDTH, 1.4 + 0.28 * len(by_arm)), share_y=True)
    values = np.concatenate([*by_arm.values()])
    low, high = min(values.min(), 0.0) - 0.05, max(values.max(), SELECTIVE) + 0.05
    for layer, axes in enumerate(every):
        rows = []
        for arm, values_NL in by_arm.items():
            mine = values_NL[:, layer]
            mean = {"value": mine.mean(), "low": np.nan, "high": np.nan}
            rows.append((labels[arm], list(mine), mean, GREY if arm.endswith("_start") else BLUE))
        panels.paired(axes, rows)
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_xlabel("share of the new domain\nless share of the old ones", fontsize=9)
        axes.set_xlim(low, high)
        axes.axvline(SELECTIVE, color="black", ls="--", lw=1)
    return figure


def _extension(runs: Runs) -> Any:
    other = APPENDED if runs.has(APPENDED) else RESET
    drawn = {arm: style for arm, style in _STYLES.items() if arm != other}
    steps = runs.steps(*drawn, other)
    if not [step for step in steps if step]:
        return None
    figure, every = panels.panels(2, (WIDTH, 3.6))
    for axes, score in zip(every, (NEW, OLD), strict=True):
        axes.axhline(0, color=GREY, lw=1.2, label=EXTENSIONS[other])
        for arm, (colour, marker) in drawn.items():
            gaps_SN = np.array([np.subtract(*runs.at(s).paired(score, arm, other)) for s in steps])
            style = {"color": colour, "marker": marker, "ms": 4}
            axes.plot(steps, gaps_SN.mean(1), lw=2, label=EXTENSIONS[arm], **style)
            axes.plot(steps, gaps_SN, lw=0.6, alpha=0.45, color=colour)
        axes.set_xlabel("updates of the extension")
        axes.set_title(f"{score.partition('-')[0]} domain{'s' * (score == OLD)}", fontsize=10)
    every[0].set_ylabel("loss minus that of the\ngrey line, nats per token")
    panels.legend_below(figure, every[0], 3)
    return figure


def _cosines(runs: Runs) -> Any:
    seeds = [*runs.cosines(NEXUS).values()]
    if not seeds:
        return None
    names: Sequence[str] = [name.replace("_", " ") for name in runs.initial]
    figure, every = panels.panels(2, (WIDTH, 3.6))
    shown = {
        "embeddings of domains": np.mean([vectors for vectors, _ in seeds], axis=0),
        "experts' vectors, last layer": np.mean([x_LEE[-1] for _, x_LEE in seeds], axis=0),
    }
    for axes, (title, values) in zip(every, shown.items(), strict=True):
        panels.heat_map(
            axes, values, names, names, title=title, signed=True, row_names=axes is every[0]
        )
        axes.set_xlabel("domain" if axes is every[0] else "expert of the domain")
    every[0].set_ylabel("domain")
    return figure
