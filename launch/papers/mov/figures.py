"""Plots of the results; None where there is nothing to plot."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.mov.arms import (
    ACCURACY,
    BASE,
    CHANCE,
    FULL,
    IA3,
    LORA,
    MOLORA,
    MOV,
    ROUTED,
    TUNED,
    VARIANTS,
    Runs,
)
from launch.papers.mov.claims import SPECIALISED
from launch.papers.mov.evaluations import KINDS
from launch.papers.shared.domain_panels import load_dots
from launch.plots import heat_maps, panels
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

COLOURS = {
    BASE: GREY,
    FULL: RED,
    IA3: PURPLE,
    **dict.fromkeys(LORA, ORANGE),
    **dict.fromkeys(MOV, BLUE),
    **dict.fromkeys(MOLORA, GREEN),
    **dict.fromkeys(VARIANTS, GREY),
}
_SIZES = (IA3, *MOV), LORA, MOLORA, (FULL,)  # lines of the figure of sizes
_MAPPED = MOV[0], MOLORA[0]


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    out: dict[str, tuple[Any, str]] = {}
    for runs in parts.values():
        out |= {
            "accuracy.png": (
                _accuracy(runs),
                "Accuracy on held-out compositions: a dot for each seed, a bar for their mean; dashed: chance",
            ),
            "sizes.png": (
                _sizes(runs),
                "Accuracy on held-out compositions against the number of trained parameters: dots are seeds, lines their means",
            ),
            "tasks.png": (
                _tasks(runs),
                "Accuracy by held-out composition, the median over prompt templates; means over seeds",
            ),
            "specialisation.png": (
                _specialisation(runs),
                "By how much further apart two held-out compositions lie than the halves of one's rows, as total variation of "
                "mean probabilities of experts, by layer: a dot for each seed, a bar for their mean; dashed: what M11 asks of "
                "the mean over layers",
            ),
            "choices.png": (
                _choices(runs),
                "Share of each held-out composition's tokens whose first choice an expert is, in the decoder's last MLP; one seed, "
                "since experts of two seeds have nothing in common",
            ),
            "loads.png": (
                load_dots(runs, {arm: COLOURS[arm] for arm in ROUTED}),  # type: ignore[arg-type]
                "Largest share of the tokens of held-out compositions whose first choice is one expert, by layer, the encoder's "
                "first: a dot for each seed. Dashed: the bound above which a router that chooses one expert has collapsed",
            ),
        }
    return out


def _accuracy(runs: Runs) -> Any:
    rows = []
    for arm in (BASE, *TUNED):
        values = runs.values(arm, ACCURACY)
        if values.size:
            rows.append(_row(runs.label(arm), values, COLOURS[arm]))
    if not rows:
        return None
    figure, (axes,) = panels.panels(1, (7.5, 1.1 + 0.28 * len(rows)))
    panels.paired(axes, rows)
    axes.grid(axis="x", alpha=0.25)
    axes.axvline(CHANCE, color="black", ls="--", lw=1)
    axes.set_xlabel("accuracy on held-out compositions")
    return figure


def _row(label: str, values: np.ndarray, colour: str) -> tuple[str, list[float], dict, str]:
    mean = {"value": float(values.mean()), "low": np.nan, "high": np.nan}
    return label, [float(x) for x in values], mean, colour


def _sizes(runs: Runs) -> Any:
    lines = [
        [
            (arm, sizes.mean(), values)
            for arm in arms
            if (values := runs.values(arm, ACCURACY)).size
            and (sizes := runs.values(arm, "trained_parameters")).size
        ]
        for arms in _SIZES
    ]
    if not any(lines):
        return None
    figure, (axes,) = panels.panels(1, (7.5, 4.6))
    for line in filter(None, lines):
        colour = COLOURS[line[-1][0]]
        at = [size for _, size, _ in line]
        axes.plot(at, [values.mean() for *_, values in line], color=colour, lw=1.8)
        for arm, size, values in line:
            axes.plot(
                [size] * len(values), values, ls="", marker="o", ms=4, color=colour, alpha=0.5
            )
            axes.annotate(
                runs.label(arm),
                (size, values.mean()),
                xytext=(5, -11),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set(xlabel="trained parameters", ylabel="accuracy on held-out compositions")
    return figure


def _tasks(runs: Runs) -> Any:
    rows = {}
    for arm in (BASE, *TUNED):
        if by_seed := runs.by_task(arm):
            rows[runs.label(arm)] = np.mean([*by_seed.values()], axis=0)
    if not rows:
        return None
    names = runs.tasks()
    figure, axes = heat_maps.grid(1, 1, (len(rows), len(names)))
    heat_maps.draw(axes[0, 0], np.array([*rows.values()]), [*rows], names)
    return figure


def _specialisation(runs: Runs) -> Any:
    by_kind: dict[str, list[tuple[str, np.ndarray, str]]] = {}
    for kind in KINDS:
        for arm in ROUTED:
            if by_seed := runs.specialisation(arm, kind):
                values_NL = np.array([*by_seed.values()])
                by_kind.setdefault(kind, []).append((runs.label(arm), values_NL, COLOURS[arm]))
    if not by_kind:
        return None
    layers = max(values_NL.shape[1] for rows in by_kind.values() for _, values_NL, _ in rows)
    arms = max(map(len, by_kind.values()))
    size = (3.2 + 2.4 * layers, len(by_kind) * (1.0 + 0.26 * arms))
    figure, every = panels.panels(layers, size, rows=len(by_kind))
    for line, (kind, rows) in zip(np.reshape(every, (-1, layers)), by_kind.items(), strict=True):
        for layer, axes in enumerate(line):
            if layer >= rows[0][1].shape[1]:  # the encoder has no cross-attention
                axes.set_visible(False)
                continue
            labelled = [(label if layer == 0 else "", values_NL, c) for label, values_NL, c in rows]
            panels.paired(axes, [_row(label, x[:, layer], c) for label, x, c in labelled])
            axes.axvline(0, color="black", lw=0.8)
            axes.axvline(SPECIALISED, color="black", ls="--", lw=1)
            title = f"{kind.replace('_', '-')}, {_layer_name(layer, rows[0][1].shape[1], kind)}"
            axes.set_title(title, fontsize=9)
            axes.tick_params(axis="x", labelsize=8)
    return figure


def _layer_name(layer: int, layers: int, kind: str) -> str:
    """Returns the name of a layer; those of both stacks are one after the other, but for cross-attention."""
    if kind == "cross_attention":
        return f"decoder {layer}"
    half = layers // 2
    return f"encoder {layer}" if layer < half else f"decoder {layer - half}"


def _choices(runs: Runs) -> Any:
    tables = [
        (runs.label(arm), next(iter(by_seed.values()))[-1])
        for arm in _MAPPED
        if (by_seed := runs.choices(arm, "mlp"))
    ]
    if not tables:
        return None
    names = runs.tasks() or [str(i) for i in range(len(tables[0][1]))]
    figure, axes = heat_maps.grid(1, len(tables), tables[0][1].shape)
    for at, (label, chosen_TE) in enumerate(tables):
        experts = [str(i) for i in range(chosen_TE.shape[1])]
        heat_maps.draw(axes[0, at], chosen_TE, names, experts, title=label, row_names=at == 0)
    return figure
