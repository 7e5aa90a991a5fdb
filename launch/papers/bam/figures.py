"""Plots of the parts' results; None where there is nothing to plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.bam.arms import BAM, BTX, CACHES, CHOSEN, CONTROLS, Runs, matched
from launch.papers.bam.measure import CACHE_LENGTH
from launch.papers.shared.domain_panels import choice_maps, curve, dots, load_dots
from launch.papers.shared.domains import MEAN, on, swept
from launch.plots import panels
from launch.plots.panels import BLUE, GREEN, ORANGE, PURPLE, RED

_CURVES = {
    "btx": {"color": ORANGE, "marker": "o"},
    "btx6": {"color": RED, "marker": "v"},
    "bam_shared_kv": {"color": GREEN, "marker": "^"},
    "bam": {"color": BLUE, "marker": "s"},
}
_MAPPED = (("btx", "mlp"), ("bam", "mlp"), ("bam", "attention"), (matched("moa_top1"), "attention"))


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    out: dict[str, tuple[Any, str]] = {}
    for name, runs in swept(parts).items():
        out |= {
            f"{name}_loss.png": (
                dots(runs, _colours(), MEAN),
                f"Mean loss over the {name} domains at the end: a dot for each seed, a bar for their mean. Seed and "
                "specialists are far to the right: see the table",
            ),
            f"{name}_loads.png": (
                load_dots(runs, _colours()),
                f"Largest share of the {name} domains' tokens that one expert gets as first choice, by router and layer: "
                "a dot for each seed. Dashed: the bound above which a top-1 router has collapsed",
            ),
            f"{name}_choices.png": (
                choice_maps(runs, _MAPPED),
                f"Share of each of the {name} domains' tokens whose first choice an expert is, by router and layer; "
                "means over seeds",
            ),
            f"{name}_curves.png": (
                _curves(runs),
                f"Loss on each of the {name} domains over its entropy, against the tokens of the mixture's training: means "
                "over seeds, and the seeds as thin lines",
            ),
        }
    out["cache.png"] = (
        _caches(parts.get("caches", {})),
        f"Bytes of keys and values of {CACHE_LENGTH} tokens against the number of attention experts",
    )
    return out


def _colours() -> dict[str, str]:
    """Returns arm -> colour of the mixtures, twins of equal compute after those of equal data."""
    colours = {
        **dict.fromkeys(BTX, ORANGE),
        **dict.fromkeys(BAM, BLUE),
        **dict.fromkeys(CONTROLS, PURPLE),
    }
    return colours | {matched(arm): GREEN for arm in (*BAM, *CHOSEN)}


def _curves(runs: Runs) -> Any:
    if not runs.has("btx", "bam") or not runs.steps("btx", "bam"):
        return None
    columns = len(runs.domains)
    figure, every = panels.panels(columns, (3.1 * columns, 3.6))
    for domain, axes in zip(runs.domains, every, strict=True):
        floor = runs.floor(on(domain)) or 0.0
        for arm, style in _CURVES.items():
            scale = _millions(runs, arm)
            curve(axes, runs, arm, on(domain), style, scale=scale, less=floor)
        axes.set_yscale("log")
        panels.plain_ticks(axes.yaxis)
        axes.set_title(domain.replace("_", " "), fontsize=10)
        axes.set(xlabel="tokens, millions")
    every[0].set_ylabel("loss over the entropy, nats per token" if runs.floors else "loss")
    panels.legend_below(figure, every[0], len(_CURVES))
    return figure


def _millions(runs: Runs, arm: str) -> float:
    """Returns the millions of tokens of an update."""
    rows = [row for row in runs.find(arm).values() if row["tokens"]]
    return float(np.mean([row["tokens"] / row["step"] for row in rows])) / 1e6 if rows else 1.0


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
