"""Plots of what was measured; none where there is nothing to plot."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.snapkv import claims, measure, needle_run
from launch.papers.snapkv.methods import kernels, methods
from launch.plots import intervals

# Okabe and Ito's colours, which people with colour blindness can tell apart; markers differ too.
_STYLE = {
    "full": ("black", "", "full cache"),
    "snapkv": ("#0072B2", "o", "SnapKV"),
    "pyramidkv": ("#56B4E9", "v", "PyramidKV"),
    "adakv": ("#009E73", "s", "Ada-KV"),
    "tova": ("#CC79A7", "D", "TOVA"),
    "h2o": ("#D55E00", "^", "H2O"),
    "streaming_llm": ("#E69F00", "P", "StreamingLLM"),
    "random": ("#777777", "x", "random"),
    "oracle": ("#000000", "*", "oracle"),
    "truncation": ("#B8A200", "<", "truncation"),
}
_KERNELS = {"kernel_1": "none", "kernel_3": "max 3", "kernel_5": "max 5", "snapkv": "max 7"}


def draw(found: Mapping[str, Any], folder: pathlib.Path) -> dict[str, str]:
    """Writes the figures into `folder`; returns file name -> what it shows."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    figures = {
        "accuracy.png": (_accuracy, "Exact match of the retrieval model against the capacity"),
        "depth.png": (_depth, "Exact match by depth and length of the retrieval prompt"),
        "windows.png": (_windows, "Hit rate of each of the prompt's last windows, by layer"),
        "needles.png": (_needles, "Needles found by SmolLM2-135M, by method and capacity"),
        "needle_grid.png": (_needle_grid, "Right digits by depth and length of the haystack"),
        "latency.png": (_latency, "Decoding time against the length of the prompt"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (plot, caption) in figures.items():
        if (figure := plot(found)) is not None:
            figure.savefig(folder / name, dpi=130)
            drawn[name] = caption
    return drawn


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes


def _curve(axes: Any, capacities: Any, arrays: Any, name: str, shift: float = 1.0) -> None:
    """Shares with their intervals, on a logarithmic axis of capacities."""
    colour, marker, label = _STYLE[name]
    shares = [intervals.share(values) for values in arrays]
    middle = np.array([s["value"] for s in shares])
    error = [[s["value"] - s["low"] for s in shares], [s["high"] - s["value"] for s in shares]]
    at = np.array(capacities) * shift
    axes.errorbar(
        at, middle, error, color=colour, marker=marker, label=label, capsize=2, lw=1.5, ms=5
    )


def _level(axes: Any, values: Any) -> None:
    share = intervals.share(values)
    axes.axhline(share["value"], color="black", ls="--", lw=1.2, label="full cache")
    axes.axhspan(share["low"], share["high"], color="black", alpha=0.08, lw=0)


def _accuracy(found: Mapping[str, Any]) -> Any:
    if not found.get("retrieval"):
        return None
    figure, axes = _subplots(1, 2, (12, 4.8))
    left, right = axes[0]
    capacities = measure.CAPACITIES
    length = next(iter(found["retrieval"].values()))["accuracy"]["length"]
    for name in _STYLE:
        if name != "full":
            arrays = [claims.small_exact(found, name, c) for c in capacities]
            _curve(left, capacities, arrays, name)
    _level(left, claims.small_full(found))
    left.set_xscale("log", base=2)
    left.set_xticks(capacities, [f"{c}\n{c / length:.0%}" for c in capacities])
    left.set_xlabel(f"capacity C, and its share of the prompt of {length} tokens")
    left.set_ylabel("exact match of four tokens")
    left.set_ylim(-0.03, 1.03)
    above = {"frameon": False, "fontsize": 8, "loc": "lower left", "bbox_to_anchor": (0, 1)}
    left.legend(ncols=5, **above)
    colours = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2")
    width = 0.8 / len(_KERNELS)
    for i, (name, label) in enumerate(_KERNELS.items()):
        shares = [intervals.share(claims.small_exact(found, name, c)) for c in capacities]
        at = np.arange(len(capacities)) + (i - 1.5) * width
        middle = [s["value"] for s in shares]
        error = [[s["value"] - s["low"] for s in shares], [s["high"] - s["value"] for s in shares]]
        right.bar(at, middle, width * 0.92, yerr=error, capsize=2, color=colours[i], label=label)
    _level(right, claims.small_full(found))
    right.set_xticks(range(len(capacities)), [str(c) for c in capacities])
    right.set_xlabel("capacity C")
    right.set_ylabel("exact match of four tokens")
    right.set_ylim(0, 1.03)
    right.legend(ncols=5, title="pooling of SnapKV's votes", **above)
    return figure


def _depth(found: Mapping[str, Any]) -> Any:
    runs = list(found.get("retrieval", {}).values())
    if not runs:
        return None
    names = ("full", "snapkv", "h2o", "streaming_llm")
    budgets = (24, 48)
    sizes = (12, 24, measure.LINES)
    figure, axes = _subplots(len(budgets), len(names), (12, 4.6))
    for budget, row in zip(budgets, axes, strict=True):
        for name, one in zip(names, row, strict=True):
            table = np.full((len(sizes), 5), np.nan)
            for i, lines in enumerate(sizes):
                key = "accuracy" if lines == measure.LINES else f"accuracy_{lines}"
                at_E = np.concatenate([np.array(run[key]["line"]) * 5 // lines for run in runs])
                kept = "full" if name == "full" else str(budget)
                right_E = np.concatenate(
                    [
                        np.asarray(
                            run[key]["correct"][name][
                                str(run[key]["length"]) if kept == "full" else kept
                            ]
                        ).all(-1)
                        for run in runs
                    ]
                )
                table[i] = [right_E[at_E == d].mean() for d in range(5)]
            _map(one, table, [f"{d * 20}-{d * 20 + 20}" for d in range(5)])
            one.set_yticks(range(len(sizes)), [str(7 + 5 * lines) for lines in sizes])
            title = "full cache" if name == "full" else f"{_STYLE[name][2]}, C = {budget}"
            one.set_title(title, fontsize=10)
        row[0].set_ylabel("prompt, tokens")
    for one in axes[-1]:
        one.set_xlabel("depth, %")
    return figure


def _map(axes: Any, table: np.ndarray, columns: list[str]) -> None:
    """Shares as colours and numbers."""
    axes.grid(False)
    axes.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "black" if value > 0.6 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)


def _windows(found: Mapping[str, Any]) -> Any:
    rates_LW = claims.window_rates(found)
    if rates_LW is None:
        return None
    figure, axes = _subplots(1, 1, (7, 4))
    back = np.arange(rates_LW.shape[1] - 1, -1, -1)
    for layer, rates_W in enumerate(rates_LW):
        colour, marker = (("#0072B2", "o"), ("#D55E00", "^"))[layer % 2]
        axes[0, 0].plot(back, rates_W, color=colour, marker=marker, label=f"layer {layer}")
    axes[0, 0].invert_xaxis()
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].set_xlabel("windows before the last one (the last is 0)")
    axes[0, 0].set_ylabel("hit rate of the window's choices")
    axes[0, 0].legend(frameon=False)
    return figure


def _needles(found: Mapping[str, Any]) -> Any:
    there = {one["tokens"] for one in found.get("needles", [])}
    grids = [grid for grid in needle_run.GRIDS if grid.tokens in there]
    if not grids:
        return None
    known = {
        **methods(window=needle_run.WINDOW, kernel=needle_run.KERNEL),
        **kernels(window=needle_run.WINDOW, sizes=(1, 3)),
    }
    figure, axes = _subplots(1, len(grids), (6.5 * len(grids), 5))
    for grid, one in zip(grids, axes[0], strict=True):
        order = ["snapkv", *known]
        cases = sorted(
            ((c, n) for n, _, c in needle_run.cases(grid)), key=lambda x: (x[0], order.index(x[1]))
        )
        bars = [("full cache", needle_digits(found, "full", 0, grid))]
        for capacity, name in cases:
            label = f"{known[name].label}, {capacity}"
            if name.startswith("kernel"):
                label = f"SnapKV, {label}"
            bars.append((label, needle_digits(found, name, capacity, grid)))
        for i, (_, digits) in enumerate(bars):
            share = intervals.share(digits.all(-1))
            error = [[share["value"] - share["low"]], [share["high"] - share["value"]]]
            one.barh(i, share["value"], 0.7, xerr=error, capsize=2, color="#0072B2")
            one.plot(digits.mean(), i, marker="D", color="#D55E00", ls="", ms=5)
        one.plot([], [], marker="D", color="#D55E00", ls="", label="share of right digits")
        one.barh([], [], color="#0072B2", label="all five digits right, 95 %")
        one.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
        one.invert_yaxis()
        one.grid(axis="y", visible=False)
        one.grid(axis="x", alpha=0.25)
        one.set_xlim(0, 1)
        count = len(bars[0][1])
        one.set_title(f"{grid.tokens} tokens, {count} questions", fontsize=10)
        one.set_xlabel("share of questions or digits")
        one.set_ylabel("method, capacity C")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=2, loc="outside lower center")
    return figure


def needle_digits(
    found: Mapping[str, Any], name: str, capacity: int, grid: needle_run.Grid
) -> np.ndarray:
    """Right digits [needles, 5] of one length."""
    return claims.needle_digits(found, name, capacity, grid.tokens)


def _needle_grid(found: Mapping[str, Any]) -> Any:
    there = {one["tokens"] for one in found.get("needles", [])}
    grids = [grid for grid in needle_run.GRIDS if grid.tokens in there]
    if not grids:
        return None
    from launch.papers.snapkv.needles import DEPTHS

    names = ("full", "snapkv", "h2o", "streaming_llm")
    figure, axes = _subplots(1, len(names), (12, 1.6 + 0.5 * len(grids)))
    for name, one in zip(names, axes[0], strict=True):
        table = np.stack(
            [
                needle_digits(found, name, 0 if name == "full" else grid.fifth, grid)
                .mean(-1)
                .reshape(-1, len(DEPTHS))
                .mean(0)
                for grid in grids
            ]
        )
        _map(one, table, [f"{depth:.0%}" for depth in DEPTHS])
        one.set_yticks(range(len(grids)), [str(grid.tokens) for grid in grids])
        one.set_title(_STYLE[name][2] + (", C = T / 5" if name != "full" else ""), fontsize=10)
        one.set_xlabel("depth")
    axes[0, 0].set_ylabel("haystack, tokens")
    return figure


def _latency(found: Mapping[str, Any]) -> Any:
    if not found.get("latency"):
        return None
    figure, axes = _subplots(1, 1, (7, 4))
    capacity = found["latency"]["settings"]["capacity"]
    for name, label in (("full", "full cache"), ("snapkv", f"SnapKV, C = {capacity}")):
        lengths = found["latency"]["result"][name]
        at = [int(n) for n in lengths]
        times = [one["ms"] for one in lengths.values()]
        middle, least = np.median(times, axis=1), np.min(times, axis=1)
        most = np.max(times, axis=1)
        colour, marker, _ = _STYLE[name]
        axes[0, 0].plot(at, middle, color=colour, marker=marker or "s", label=label)
        axes[0, 0].fill_between(at, least, most, color=colour, alpha=0.15, lw=0)
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].set_xticks(at, [f"{n // 1024}K" for n in at])
    axes[0, 0].set_xlabel("prompt, tokens")
    axes[0, 0].set_ylabel("ms per token, median; band: all repeats")
    axes[0, 0].legend(frameon=False)
    return figure
