"""Plots of what the sweep found, part by part; none where there is nothing to plot."""

import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from launch.evaluation import routing_figure
from launch.papers.bam import caches
from launch.papers.bam.arms import BAM, BTX, CONTROLS, COSTLY, SEED, Runs, matched, specialist
from launch.papers.shared.domain_panels import curve, excess_bars, mean_tables
from launch.papers.shared.domains import on
from launch.plots import panels
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

_CURVES = {
    "btx": {"color": ORANGE, "marker": "o"},
    "bam": {"color": BLUE, "marker": "s"},
    "bam_shared_kv": {"color": GREEN, "marker": "^"},
    "moa_top2": {"color": PURPLE, "marker": "D"},
}


def draw(found: Mapping[str, Any], folder: pathlib.Path) -> dict[str, str]:
    """Writes the figures into `folder`; returns file name -> what it shows."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    figures: dict[str, tuple[Any, str]] = {}
    for name, results in Runs.parts(found).items():
        figures |= {
            f"{name}_loss.png": (
                excess_bars(results, _bars(results), label=partial(_label, results)),
                f"Mean loss over the {name} domains at the end; dots are seeds. Light ones are the arms to the left of "
                "them, ended when they have computed as much as BTX",
            ),
            f"{name}_curves.png": (
                _curves(results),
                f"Loss on each of the {name} domains over the training of the mixture: above, arms of equal data "
                "against tokens; below, arms of equal compute against FLOPs",
            ),
            f"{name}_gates.png": (
                _gates(results),
                f"Mean probability of each expert of BAM on held-out rows of the {name} domains, by router and layer, "
                "mean over seeds",
            ),
        }
    figures["cache.png"] = (
        _caches(found.get("caches", {})),
        f"Bytes of keys and values of {caches.LENGTH} tokens against the number of attention experts",
    )
    return panels.save(figures, folder)


def _bars(results: Runs) -> dict[str, str]:
    """Arms by colour: of the dense ones, BTX, BAM and its choices, and controls; twins of less training are light."""
    shown = dict.fromkeys([SEED, *map(specialist, results.domains[1:])], GREY)
    for arms, colour, light in (
        (BTX, ORANGE, "#F5D08A"),
        (BAM, BLUE, "#9CC9E3"),
        (CONTROLS, PURPLE, "#E8C9DA"),
    ):
        for arm in arms:
            shown[arm] = colour
            if arm in COSTLY:
                shown[matched(arm)] = light
    return shown


def _label(results: Runs, arm: str) -> str:
    return "equal compute" if arm.endswith("_cm") else results.label(arm)


def _curves(results: Runs) -> Any:
    if not results.has("btx", "bam") or not results.steps("btx", "bam"):
        return None
    from matplotlib.figure import Figure

    columns = len(results.domains)
    figure = Figure(figsize=(3.1 * columns, 6.2), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharey="col")
    for column, domain in enumerate(results.domains):
        above, below = axes[:, column]
        for arm, style in _CURVES.items():
            for one, run, unit in ((above, arm, "tokens"), (below, matched(arm), "flops")):
                label = results.label(arm)
                curve(
                    one,
                    results,
                    run,
                    on(domain),
                    style,
                    scale=_scale(results, run, unit),
                    label=label,
                )
        if (floor := results.floor(on(domain))) is not None:
            for one in (above, below):
                one.axhline(floor, color=RED, ls=":", lw=1.5, label="entropy")
        above.set_title(domain.replace("_", " "), fontsize=10)
        above.set_xlabel("tokens, millions")
        below.set_xlabel("training FLOPs, $10^{12}$")
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.25)
        one.set_yscale("log")
        panels.plain_ticks(one.yaxis)
    for one, words in zip(axes[:, 0], ("equal data", "equal compute"), strict=True):
        one.set_ylabel(f"{words}: loss, nats per token")
    panels.legend_below(figure, axes[0, 0], len(_CURVES) + 1)
    return figure


def _scale(results: Runs, arm: str, unit: str) -> float:
    """What a step is, in millions of tokens or 1e12 FLOPs."""
    rows = [row for row in results.find(arm).values() if row["tokens"]]
    if not rows:
        return 1.0
    return (
        float(np.mean([row[unit] / row["step"] for row in rows]))
        / {"tokens": 1e6, "flops": 1e12}[unit]
    )


def _gates(results: Runs) -> Any:
    measured = results.evaluation("bam", "routing")
    tables = mean_tables([found["domains"] for found in measured])
    if not tables:
        return None
    order = {domain: tables[domain] for domain in results.domains if domain in tables}
    return routing_figure.figure(order, measured[-1]["experts"])


def _caches(found: Mapping[str, Sequence[int]]) -> Any:
    if not found:
        return None
    figure, (axes,) = panels.panels(1, (6.5, 4.2))
    styles = {
        "expert_kv": (BLUE, "s", f"BAM, {caches.NAMES['expert_kv']}"),
        "shared_kv": (GREEN, "^", f"BAM, {caches.NAMES['shared_kv']}"),
        "dense": ("black", "", "dense, BTX"),
    }
    for kind, (colour, marker, label) in styles.items():
        kilobytes = np.array(found[kind]) / 1024
        style = "--" if kind == "dense" else "-"
        axes.plot(
            found["experts"], kilobytes, style, color=colour, marker=marker, lw=2, label=label
        )
    axes.set_xticks(found["experts"])
    axes.set_ylim(0, None)
    axes.set_xlabel("attention experts")
    axes.set_ylabel("cache, KiB")
    axes.legend(frameon=False)
    return figure
