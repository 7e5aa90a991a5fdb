"""Figures of the runs of MoV and MoLORA."""

from typing import Any

import numpy as np

from espalier.launch.papers.mov.evaluations import KINDS
from espalier.launch.papers.mov.full_size import ACCURACIES, SIZES
from espalier.launch.papers.mov.runs import (
    ACCURACY,
    BASE,
    BY_WIDTH,
    CHANCE,
    FULL,
    IA3,
    LORA,
    MOLORA,
    MOV,
    PARAMETERS,
    ROUTED,
    SCORE,
    SEEN,
    TUNED,
    VARIANTS,
    WIDTHS,
    Runs,
    plain,
)
from espalier.launch.papers.shared import domains
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

SPECIALISED = 0.05  # of total variation: by how much tasks must differ in what routers choose

COLOURS = {
    BASE: GREY,
    FULL: RED,
    IA3: PURPLE,
    **dict.fromkeys(LORA, ORANGE),
    **dict.fromkeys(MOV, BLUE),
    MOLORA: GREEN,
    **dict.fromkeys(VARIANTS, GREY),
}


_SIZES = (IA3, *MOV), LORA, (MOLORA,), (FULL,)  # lines of the figure of sizes
_RIGHT = "probability of the right choice, unseen compositions"


def scores(runs: Runs) -> Any:
    """Returns the figure of the right choices' probabilities, of unseen and of seen compositions."""
    columns = (SCORE, _RIGHT), (f"{SEEN}{SCORE}", _RIGHT.replace("unseen", "seen"))
    rows = [arm for arm in (BASE, *TUNED) if runs.values(arm, SCORE).size]
    if not rows:
        return None
    figure, every = panels.panels(2, (9.0, 1.2 + 0.32 * len(rows)), share_y=True)
    for axes, (score, label) in zip(every, columns, strict=True):
        panels.paired(
            axes, [_row(runs.label(arm), runs.values(arm, score), COLOURS[arm]) for arm in rows]
        )
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(CHANCE, color="black", ls="--", lw=1)
        axes.set_xlabel(label.replace(", ", ",\n"))
        axes.tick_params(axis="y", labelsize=10)
    return figure


def _row(label: str, values: np.ndarray, colour: str) -> tuple[str, list[float], dict, str]:
    mean = {"value": float(values.mean()), "low": np.nan, "high": np.nan}
    return label, [float(x) for x in values], mean, colour


def sizes(runs: Runs) -> Any:
    """Returns the figure of scores against trained parameters."""
    lines = [
        [
            (arm, sizes.mean(), values)
            for arm in arms
            if (values := runs.values(arm, SCORE)).size
            and (sizes := runs.values(arm, PARAMETERS)).size
        ]
        for arms in _SIZES
    ]
    if not any(lines):
        return None
    figure, (axes,) = panels.panels(1, (8.0, 4.8))
    vectors = (IA3, *MOV)
    for line in filter(None, lines):
        colour = COLOURS[line[-1][0]]
        at = [size for _, size, _ in line]
        axes.plot(at, [values.mean() for *_, values in line], color=colour, lw=1.8)
        for arm, size, values in line:
            axes.plot(
                [size] * len(values), values, ls="", marker="o", ms=4, color=colour, alpha=0.5
            )
            axes.plot(size, values.mean(), marker="_", ms=14, mew=2.5, color=colour)
            above = arm not in vectors
            axes.annotate(
                runs.label(arm),
                (size, values.max() if above else values.min()),
                xytext=(0, 6 if above else -14),
                textcoords="offset points",
                ha="right" if arm in LORA else "left" if arm == MOLORA else "center",
                color=colour,
            )
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.15)
    axes.set(xlabel="trained parameters, logarithmic", ylabel=_RIGHT.replace(", ", ",\n"))
    return figure


def paper_sizes(runs: Runs) -> Any:
    """Returns the figure of MoV-10 against (IA)3 and full tuning by size of the model, with the paper's sizes."""
    measured = [
        (sizes.mean(), *values)
        for width in WIDTHS
        if (values := runs.paired(ACCURACY, *((arm, width) for arm in BY_WIDTH)))[0].size
        and (sizes := runs.values(IA3, "parameters", width)).size
    ]
    if not measured:
        return None
    figure, every = panels.panels(2, (9.0, 3.9))
    for axes, (other, name) in zip(every, ((IA3, "(IA)3"), (FULL, "full tuning")), strict=True):
        means = []
        for size, *values in measured:
            by_arm = dict(zip(BY_WIDTH, values, strict=True))
            gaps = 100 * (by_arm[MOV[0]] - by_arm[other])
            axes.plot(
                [size] * len(gaps), gaps, ls="", marker="o", ms=4, color=BLUE, alpha=0.45, mew=0
            )
            means.append((size, gaps.mean()))
        axes.plot(*zip(*means, strict=True), color=BLUE, marker="_", ms=14, mew=2.5, label="here")
        gaps = np.subtract(ACCURACIES["MoV-10"], ACCURACIES[name])
        theirs = [(size.parameters, gap) for size, gap in zip(SIZES.values(), gaps, strict=True)]
        axes.plot(*zip(*theirs, strict=True), color=ORANGE, marker="D", ms=6, label="the paper")
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.set(title=f"MoV-10 minus {name}", xlabel="parameters of the model, logarithmic")
    every[0].set_ylabel("points of accuracy, unseen tasks")
    every[1].legend(frameon=False)
    return figure


def tasks(runs: Runs) -> Any:
    """Returns the map of scores by unseen composition."""
    names = runs.tasks()
    rows = {}
    for arm in (BASE, *TUNED):
        if by_seed := runs.by_task(arm, SCORE):
            rows[runs.label(arm)] = np.mean([*by_seed.values()], axis=0)
    if not rows:
        return None
    # Both orders of a composition do the same.
    groups: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        groups.setdefault(", ".join(sorted(name.split("_"))), []).append(at)
    means = np.array(
        [[values[some].mean() for some in groups.values()] for values in rows.values()]
    )
    figure, axes = panels.heat_map_grid(1, 1, (len(groups), len(rows)))
    panels.heat_map(axes[0, 0], means.T, [*groups], [*rows])
    axes[0, 0].set(ylabel="unseen composition, both orders")
    return figure


def specialisation(runs: Runs) -> Any:
    """Returns the figure of how much routers tell compositions apart."""
    every = {
        kind: [
            (runs.label(arm), np.array([x.mean() for x in by_seed.values()]), COLOURS[arm])
            for arm in ROUTED
            if (by_seed := runs.specialisation(arm, kind))
        ]
        for kind in KINDS
    }
    if not any(every.values()):
        return None
    figure, columns = panels.panels(len(KINDS), (9.5, 3.4), share_y=True)
    ends = [x for rows in every.values() for _, values, _ in rows for x in values]
    for axes, (kind, drawn) in zip(columns, every.items(), strict=True):
        panels.paired(axes, [_row(*row) for row in drawn])
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(0, color="black", lw=0.8)
        axes.axvline(SPECIALISED, color="black", ls="--", lw=1)
        axes.set(title=plain(kind), xlim=(min(0, *ends) - 0.02, max(ends) + 0.02))
        axes.tick_params(axis="y", labelsize=10)
    columns[1].set_xlabel(
        "total variation between two compositions minus that between halves of one's rows"
    )
    return figure


def choices(runs: Runs) -> Any:
    """Returns the map of first choices of MoV-10 in the decoder's last MLP."""
    by_seed = runs.choices(MOV[0], "mlp")
    if not by_seed:
        return None
    chosen_TE = next(iter(by_seed.values()))[-1]
    names = [name.replace("_", ", ") for name in runs.routed()]
    figure, axes = panels.heat_map_grid(1, 1, chosen_TE.shape)
    panels.heat_map(axes[0, 0], chosen_TE, names, [str(i) for i in range(chosen_TE.shape[1])])
    axes[0, 0].set(xlabel="expert", ylabel="unseen composition")
    return figure


def loads(runs: Runs) -> Any:
    """Returns the figure of the largest loads."""
    rows = []
    for arm in ROUTED:
        for kind in domains.ROUTERS:
            if by_seed := runs.loads(arm, kind):
                label = f"{runs.label(arm)}: {'MLPs' if kind == 'mlp' else 'self-attention'}"
                rows.append(
                    _row(label, np.array([x.max() for x in by_seed.values()]), COLOURS[arm])
                )
    if not rows:
        return None
    figure, (axes,) = panels.panels(1, (8.0, 1.2 + 0.32 * len(rows)))
    panels.paired(axes, rows)
    axes.grid(axis="x", alpha=0.25)
    axes.axvline(domains.LOAD_BOUND, color="black", ls="--", lw=1)
    axes.set(
        xlim=(0, 1),
        xlabel="share of the tokens that one expert gets, of the layer where it is largest",
    )
    axes.tick_params(axis="y", labelsize=10)
    return figure
