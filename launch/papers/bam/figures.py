"""Plots of BAM's measurements; None where there is nothing to plot."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.launch.papers.bam.experiment import (
    BAM,
    BTX,
    CHOSEN,
    CONTROLS,
    DENSE,
    LATENCY,
    SEED,
    WIDTHS,
    Runs,
    matched,
    wide,
)
from espalier.launch.papers.shared.domain_panels import WIDTH as INCHES
from espalier.launch.papers.shared.domain_panels import choice_maps, curve, dots, load_dots
from espalier.launch.papers.shared.domains import (
    MEAN,
    PERPLEXITY,
    SIZES,
    SYNTHETIC,
    TEXT,
    on,
)
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

TIMED = {
    DENSE: "dense",
    "btx": BTX["btx"],
    "bam": BAM["bam"],
    "bam_shared_kv": BAM["bam_shared_kv"],
}
# Dense parameters -> mean perplexities of BTX and BAM at equal data, and of BAM at equal compute: tables 2 and 3 of the paper,
# whose second mean is without the general domain.
PAPER = {587_209_728: (10.72, 9.70, 10.00), 1_991_000_000: (3.27, 3.19, 3.21)}
PAPER_SECONDS = {"btx": 4.81, "bam": 6.17, "bam_shared_kv": 5.96}
_CURVES = {
    "btx": {"color": ORANGE, "marker": "o"},
    "btx6": {"color": RED, "marker": "v"},
    "bam_shared_kv": {"color": GREEN, "marker": "^"},
    "bam": {"color": BLUE, "marker": "s"},
}
_MAPPED = (("btx", "mlp"), ("bam", "mlp"), ("bam", "attention"), (matched("moa_top1"), "attention"))


def figures(prose: Prose, parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption); `prose` has the captions."""
    out: dict[str, tuple[Any, str]] = {}
    if runs := parts.get(SYNTHETIC):
        out |= {
            "synthetic_loss.png": (dots(runs, _colours(), MEAN), prose("loss_figure")),
            "synthetic_loads.png": (load_dots(runs, _colours()), prose("loads_figure")),
            "synthetic_choices.png": (choice_maps(runs, _MAPPED), prose("choices_figure")),
            "synthetic_curves.png": (_curves(runs), prose("curves_figure")),
        }
    if runs := parts.get(TEXT):
        arms = {DENSE: GREY, "btx": ORANGE, "bam": BLUE}
        out["text_loss.png"] = (dots(runs, arms, MEAN), prose("text_figure"))
    if SIZES in parts:
        figure = _sizes(parts.get(SYNTHETIC), parts[SIZES])
        out["sizes.png"] = (figure, prose("sizes_figure"))
    if timed := parts.get(LATENCY):
        out["latency.png"] = (_latency(timed), prose("latency_figure"))
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
    runs = runs.shared(*_CURVES)
    figure, every = panels.panels(2, (INCHES, 6.0), rows=2)
    for at, (domain, axes) in enumerate(zip(runs.domains, every, strict=True)):
        floor = runs.floor(on(domain)) or 0.0
        for arm, style in _CURVES.items():
            scale = _millions(runs, arm)
            curve(axes, runs, arm, on(domain), style, scale=scale, less=floor)
        axes.set_yscale("log")
        panels.plain_ticks(axes.yaxis)
        axes.set_title(domain.replace("_", " "), fontsize=10)
        if at >= 2:
            axes.set_xlabel("tokens of the mixture, millions")
        if at % 2 == 0:
            axes.set_ylabel("loss minus the entropy, nats\nper token (logarithmic)")
    panels.legend_below(figure, every[0], len(_CURVES))
    return figure


def _millions(runs: Runs, arm: str) -> float:
    """Returns the millions of tokens of an update."""
    rows = [row for row in runs.find(arm).values() if row["tokens"]]
    return float(np.mean([row["tokens"] / row["step"] for row in rows])) / 1e6 if rows else 1.0


def _sizes(narrow: Runs | None, sizes: Runs) -> Any:
    """Returns the figure of BAM's lead against the parameters of the dense model, ours and the paper's."""
    ours = [(sizes, *(wide(arm, width) for arm in (SEED, "btx", "bam"))) for width in WIDTHS]
    if narrow is not None:
        ours.insert(1, (narrow, SEED, "btx", "bam"))
    figure, (axes,) = panels.panels(1, (INCHES, 4.2))
    means = []
    for runs, seed, btx, bam in ours:
        counts = [row["parameters"] for row in runs.find(seed).values() if row["parameters"]]
        values = runs.paired(PERPLEXITY, btx, bam)
        if not counts or not values[0].size:
            continue
        leads = 100 * (1 - values[1] / values[0])
        axes.plot([counts[0]] * len(leads), leads, ls="", marker="o", ms=4, alpha=0.5, color=BLUE)
        means.append((counts[0], leads.mean()))
    if not means:
        return None
    axes.plot(*zip(*means, strict=True), color=BLUE, marker="_", ms=16, mew=2, label="here")
    sizes_of_paper = list(PAPER)
    for at, (label, style) in enumerate((("equal data", "-"), ("equal compute", "--")), 1):
        leads = [100 * (1 - values[at] / values[0]) for values in PAPER.values()]
        axes.plot(sizes_of_paper, leads, style, color=ORANGE, marker="s", label=f"paper, {label}")
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set(
        xlabel="parameters of the dense seed (logarithmic)",
        ylabel="mean perplexity of BAM\nbelow BTX's, %",
    )
    panels.legend_below(figure, axes, 3)
    return figure


def _latency(timed: Mapping[str, Any]) -> Any:
    """Returns the figure of seconds to answer a prompt and to score a text, divided by those of BTX."""
    figure, every = panels.panels(2, (INCHES, 2.9), share_y=True)
    for axes, (title, parts) in zip(
        every,
        {
            "to read a prompt and answer": ("read", "generate"),
            "to score a text": ("score",),
        }.items(),
        strict=True,
    ):
        rows = []
        for arm, label in TIMED.items():
            ratios = [
                sum(one["result"][arm][part] for part in parts)
                / sum(one["result"]["btx"][part] for part in parts)
                for one in timed.values()
            ]
            mean = {"value": float(np.mean(ratios)), "low": np.nan, "high": np.nan}
            rows.append((label, ratios, mean, BLUE))
        panels.paired(axes, rows)
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_xlabel(f"time {title}, divided by BTX's", fontsize=9)
    for at, arm in enumerate(TIMED):
        if arm in PAPER_SECONDS:
            ratio = PAPER_SECONDS[arm] / PAPER_SECONDS["btx"]
            label = "the paper" if arm == "btx" else ""
            every[0].plot(ratio, at, marker="D", ms=6, ls="", color=ORANGE, label=label)
    every[0].legend(frameon=False, fontsize=9, loc="upper right")
    return figure
