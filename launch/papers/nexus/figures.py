"""Plots of the parts' results; None where there is nothing to plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.nexus.arms import (
    BALANCE,
    CONTINUED,
    EXTENSIONS,
    LOW,
    MERGED,
    NEW,
    OLD,
    ROUTERS,
    SEED,
    Runs,
    expert,
    start,
)
from launch.papers.shared.domain_panels import excess_bars
from launch.papers.shared.domains import swept
from launch.plots import heat_maps, intervals, panels
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

_STYLES = {
    "ext_nexus": (BLUE, "s"),
    "ext_linear_reset": (ORANGE, "o"),
    "ext_linear_append": (GREEN, "^"),
    "ext_random": (PURPLE, "D"),
}
_MAPPED = ("ext_nexus", "ext_linear_append", "ext_linear_reset")


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    out: dict[str, tuple[Any, str]] = {}
    for name, results in swept(parts).items():
        out |= {
            f"{name}_extension.png": (
                _extension(results),
                f"Loss on the new and on the old {name} domains against the tokens of the extension; dashed: the "
                "expert of the new domain, and Nexus before the extension",
            ),
            f"{name}_routing.png": (
                _routing(results),
                f"Share of each of the {name} domains' tokens whose first choice an expert is, mean over layers and "
                "seeds: above before the extension's first update, below after the last",
            ),
            f"{name}_cosines.png": (
                _cosines(results),
                f"Cosines of the {name} domains' embeddings, and of the experts' vectors that Nexus projects from them "
                "(mean over layers); means over seeds",
            ),
            f"{name}_balance.png": (
                _balance(results),
                f"Loss on the old {name} domains against the weight of the balance loss",
            ),
            f"{name}_loss.png": (
                excess_bars(results, _bars(results), score=OLD),
                f"Mean loss over the old {name} domains after upcycling; dots are seeds",
            ),
        }
    return out


def _bars(results: Runs) -> dict[str, str]:
    """Returns arm -> colour: dense models, routers, and routers with a weak balance loss."""
    return {
        SEED: GREY,
        **{expert(domain): GREY for domain in results.initial},
        MERGED: GREY,
        CONTINUED: PURPLE,
        **{arm: BLUE if "nexus" in arm else ORANGE for arm in ROUTERS},
        **{arm: "#9CC9E3" if "nexus" in arm else "#F5D08A" for arm in LOW},
    }


def _extension(results: Runs) -> Any:
    if not [step for step in results.steps("ext_nexus") if step]:
        return None
    figure, axes = panels.panels(2, (11, 4.6))
    for arm, (colour, marker) in _STYLES.items():
        steps = results.steps(arm)
        rows = list(results.find(arm).values())
        if not rows or not [step for step in steps if step]:
            continue
        per_step = float(np.mean([row["tokens"] / row["step"] for row in rows])) / 1e3
        # A logarithmic axis has no 0: the start is drawn at half of the first reading.
        first = next(step for step in steps if step)
        at = [per_step * (step or first / 2) for step in steps]
        for one, score in zip(axes, (NEW, OLD), strict=True):
            values = [results.at(step).values(arm, score) for step in steps]
            panels.line(one, at, values, colour, EXTENSIONS[arm])
            one.lines[-len(values[0]) - 1].set_marker(marker)
        for one in axes:
            one.set_xscale("log")
            _ticks(one, steps, at)
    references = (expert(results.domains[-1]), NEW), ("nexus", OLD)
    for one, (arm, score) in zip(axes, references, strict=True):
        if (values := results.values(arm, score)).size:
            one.axhline(values.mean(), color=RED, ls="--", lw=1.5)
        one.set(xlabel="thousand tokens of the extension", ylabel=f"{score}, nats per token")
    panels.legend_below(figure, axes[0], 4)
    return figure


def _ticks(axes: Any, steps: Sequence[int], at: Sequence[float]) -> None:
    """Labels budgets that at least double, and the start as 0."""
    shown: dict[float, str] = {}
    for step, place in zip(steps, at, strict=True):
        if not shown or place >= 1.9 * max(shown):
            shown[place] = f"{place:.3g}" if step else "0"
    axes.set_xticks(list(shown), list(shown.values()))
    axes.minorticks_off()


def _routing(results: Runs) -> Any:
    arms = [arm for arm in _MAPPED if results.chosen(arm) is not None]
    if not arms:
        return None
    domains = list(results.domains)
    figure, axes = heat_maps.grid(2, len(arms), (len(domains), len(domains) - 1))
    for line, (when, name) in zip(axes, (("at step 0", start), ("at the end", str)), strict=True):
        for one, arm in zip(line, arms, strict=True):
            if (chosen_NDE := results.chosen(name(arm))) is None:
                one.set_visible(False)
                continue
            shown = {"title": f"{EXTENSIONS[arm]}, {when}", "row_names": one is line[0]}
            heat_maps.draw(one, chosen_NDE.mean(0), domains, domains[1:], **shown)
    return figure


def _cosines(results: Runs) -> Any:
    if (cosines := results.cosines("nexus")) is None:
        return None
    names, vectors_NEE, projected_NEE = cosines
    figure, axes = heat_maps.grid(1, 2, (len(names) + 1, len(names)))
    shown = {"domains' embeddings": vectors_NEE, "experts' vectors": projected_NEE}
    for one, (title, values) in zip(axes[0], shown.items(), strict=True):
        heat_maps.draw(
            one, values.mean(0), names, names, title=title, signed=True, row_names=one is axes[0][0]
        )
    return figure


def _balance(results: Runs) -> Any:
    lines = {"nexus": (BLUE, "Nexus"), "linear": (ORANGE, "linear router")}
    figure, (axes,) = panels.panels(1, (5.6, 4.2))
    drawn = 0
    for arm, (colour, label) in lines.items():
        names = [f"{arm}{suffix}" for suffix in BALANCE]
        if all(results.values(name, OLD).size for name in names):
            shown = [intervals.over_seeds(results.values(name, OLD)) for name in names]
            # Side by side, so that intervals do not cover each other.
            at = [weight * (1.06 if drawn else 1 / 1.06) for weight in BALANCE.values()]
            style = {"color": colour, "marker": "o", "capsize": 3, "lw": 2, "label": label}
            panels.with_errors(axes, at, shown, **style)
            drawn += 1
    if not drawn:
        return None
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(list(BALANCE.values()), [f"{weight:g}" for weight in BALANCE.values()])
    axes.set(xlabel="weight of the balance loss", ylabel=f"{OLD}; bars: 95 % over seeds")
    axes.legend(frameon=False)
    return figure
