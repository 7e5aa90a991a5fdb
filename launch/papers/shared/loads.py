"""Loads of the experts of a mixture's routers, by layer: a collapsed router makes a comparison with it decide nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.shared import page

ROUTING = "routing"  # the evaluation, launch/evaluation/routing.py
# Largest share of the tokens that one expert of a layer may get. Above it, a top-1 router has collapsed: the layer is dense
# in all but name, and a comparison with it decides nothing.
LOAD_BOUND = 0.8
ROUTERS = {"mlp": "FFN", "attention": "attention"}


def choices(
    row: Mapping[str, Any], router: str, domains: Sequence[str] | None = None
) -> np.ndarray | None:
    """Returns the share of each domain's tokens whose first choice an expert is: [layer, domain, expert].

    Of all domains that were measured if `domains` is None; None without the evaluation 'routing' on all of them.
    """
    chosen = ((row.get("evaluations") or {}).get(ROUTING) or {}).get("chosen", {})
    names = tuple(chosen) if domains is None else domains
    if not chosen or not all(router in chosen.get(name, {}) for name in names):
        return None
    return np.array([chosen[name][router] for name in names]).swapaxes(0, 1)


def largest_loads(choices_LDE: np.ndarray) -> np.ndarray:
    """Returns the largest share of the tokens of all domains, in equal parts, that an expert of each layer gets."""
    return choices_LDE.mean(1).max(-1)


def collapsed(row: Mapping[str, Any], routers: Sequence[str]) -> str:
    """Returns which of a run's top-1 routers sends too many tokens of a layer to one expert; empty if none does."""
    for router in routers:
        if (choices_LDE := choices(row, router)) is None:
            return f"the loads of its {ROUTERS[router]} router were not measured"
        for layer, load in enumerate(largest_loads(choices_LDE)):
            if load > LOAD_BOUND:
                return (
                    f"the {ROUTERS[router]} router of layer {layer} sends {load:.2f} of the tokens to one expert, "
                    f"more than {LOAD_BOUND}"
                )
    return ""


def table(name: str, runs: Any) -> list[str]:
    """Returns the table of the largest loads of all routers by layer: the mean over seeds, and the largest."""
    lines, layers = [], 0
    for arm in runs.arms:
        rows = [row for row in runs.find(arm).values() if row["tokens"]]
        for router, kind in ROUTERS.items():
            measured = [x for row in rows if (x := choices(row, router)) is not None]
            if not measured:
                continue
            loads_NL = np.array([largest_loads(x) for x in measured])
            cells = [
                f"{mean:.2f} ({most:.2f})"
                for mean, most in zip(loads_NL.mean(0), loads_NL.max(0), strict=True)
            ]
            top = "top-1" if router in runs.top_1(arm) else ""
            lines.append((f"{runs.label(arm)} (`{arm}`)", kind, top, *cells))
            layers = len(cells)
    if not lines:
        return []
    title = f"Largest share of the tokens that one expert gets, {name}: mean over seeds (largest)"
    header = ("arm", "router", "", *(f"layer {i}" for i in range(layers)))
    return page.table(header, lines, title)
