"""Plots of the parts' results; None where there is nothing to plot."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from launch.evaluation import routing
from launch.papers.bam.arms import (
    BAM,
    BTX,
    CACHES,
    CONTROLS,
    COSTLY,
    SEED,
    Runs,
    matched,
    specialist,
)
from launch.papers.bam.measure import CACHE_LENGTH
from launch.papers.shared.domain_panels import curve, excess_bars
from launch.papers.shared.domains import on, swept
from launch.plots import panels
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

_CURVES = {
    "btx": {"color": ORANGE, "marker": "o"},
    "bam": {"color": BLUE, "marker": "s"},
    "bam_shared_kv": {"color": GREEN, "marker": "^"},
    "moa_top2": {"color": PURPLE, "marker": "D"},
}


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    out: dict[str, tuple[Any, str]] = {}
    for name, runs in swept(parts).items():
        out |= {
            f"{name}_loss.png": (
                excess_bars(runs, _bars(runs), label=partial(_label, runs)),
                f"Mean loss over the {name} domains at the end; dots are seeds. Light ones are the arms to the left of "
                "them, ended when they have computed as much as BTX",
            ),
            f"{name}_curves.png": (
                _curves(runs),
                f"Loss on each of the {name} domains over the training of the mixture: above, arms of equal data "
                "against tokens; below, arms of equal compute against FLOPs",
            ),
            f"{name}_gates.png": (
                _gates(runs),
                f"Mean probability of each expert of BAM on held-out rows of the {name} domains, by router and layer, "
                "mean over seeds",
            ),
        }
    out["cache.png"] = (
        _caches(parts.get("caches", {})),
        f"Bytes of keys and values of {CACHE_LENGTH} tokens against the number of attention experts",
    )
    return out


def _bars(runs: Runs) -> dict[str, str]:
    """Returns arm -> colour: dense models, BTX, BAM and controls; compute-matched twins are light."""
    shown = dict.fromkeys([SEED, *map(specialist, runs.domains[1:])], GREY)
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


def _label(runs: Runs, arm: str) -> str:
    return "equal compute" if arm.endswith("_cm") else runs.label(arm)


def _curves(runs: Runs) -> Any:
    if not runs.has("btx", "bam") or not runs.steps("btx", "bam"):
        return None
    columns = len(runs.domains)
    figure, every = panels.panels(columns, (3.1 * columns, 6.2), rows=2, share_y="col")
    for domain, above, below in zip(runs.domains, every[:columns], every[columns:], strict=True):
        for arm, style in _CURVES.items():
            for axes, name, unit in ((above, arm, "tokens"), (below, matched(arm), "flops")):
                scale = _scale(runs, name, unit)
                curve(axes, runs, name, on(domain), style, scale=scale, label=runs.label(arm))
        if (floor := runs.floor(on(domain))) is not None:
            for axes in (above, below):
                axes.axhline(floor, color=RED, ls=":", lw=1.5, label="entropy")
        above.set_title(domain.replace("_", " "), fontsize=10)
        above.set(xlabel="tokens, millions")
        below.set(xlabel="training FLOPs, $10^{12}$")
    for axes in every:
        axes.set_yscale("log")
        panels.plain_ticks(axes.yaxis)
    for axes, words in zip(every[::columns], ("equal data", "equal compute"), strict=True):
        axes.set_ylabel(f"{words}: loss, nats per token")
    panels.legend_below(figure, every[0], len(_CURVES) + 1)
    return figure


def _scale(runs: Runs, arm: str, unit: str) -> float:
    """Returns the millions of tokens or 1e12 FLOPs of a step."""
    rows = [row for row in runs.find(arm).values() if row["tokens"]]
    if not rows:
        return 1.0
    per_step = float(np.mean([row[unit] / row["step"] for row in rows]))
    return per_step / {"tokens": 1e6, "flops": 1e12}[unit]


def _gates(runs: Runs) -> Any:
    measured = runs.evaluation("bam", "routing")
    if not measured:
        return None
    tables = {
        domain: {
            router: np.mean([one["domains"][domain][router] for one in measured], axis=0)
            for router in measured[0]["domains"][domain]
        }
        for domain in runs.domains
        if domain in measured[0]["domains"]
    }
    return routing.figure(tables, measured[-1]["experts"])


def _caches(measured: Mapping[str, Sequence[int]]) -> Any:
    if not measured:
        return None
    figure, (axes,) = panels.panels(1, (6.5, 4.2))
    styles = {
        "expert_kv": (BLUE, "s", f"BAM, {CACHES['expert_kv']}"),
        "shared_kv": (GREEN, "^", f"BAM, {CACHES['shared_kv']}"),
        "dense": ("black", "", "dense, BTX"),
    }
    for kind, (colour, marker, label) in styles.items():
        kilobytes = np.array(measured[kind]) / 1024
        style = "--" if kind == "dense" else "-"
        axes.plot(
            measured["experts"], kilobytes, style, color=colour, marker=marker, lw=2, label=label
        )
    axes.set_xticks(measured["experts"])
    axes.set(ylim=(0, None), xlabel="attention experts", ylabel="cache, KiB")
    axes.legend(frameon=False)
    return figure
