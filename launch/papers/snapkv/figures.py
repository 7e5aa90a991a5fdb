"""Plots of the measurements; None where there is nothing to plot."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.snapkv import measure, needles
from launch.papers.snapkv.methods import kernels, methods
from launch.papers.snapkv.results import Results
from launch.plots import intervals
from launch.plots.panels import BLUE, RED, errors, legend_below, level, panels, with_errors

# Okabe and Ito's colours, which people with colour blindness can distinguish; markers differ too.
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
_MAPPED = ("full", "snapkv", "h2o", "streaming_llm")
_KERNELS = {"kernel_1": "none", "kernel_3": "max 3", "kernel_5": "max 5", "snapkv": "max 7"}


def figures(parts: Mapping[str, Results]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    plots = {
        "accuracy.png": (_accuracy, "Exact match of the retrieval model against the capacity"),
        "depth.png": (_depth, "Exact match by depth and length of the retrieval prompt"),
        "windows.png": (_windows, "Hit rate of each of the prompt's last windows, by layer"),
        "needles.png": (_needles, "Needles found by SmolLM2-135M, by method and capacity"),
        "needle_grid.png": (_needle_grid, "Right digits by depth and length of the haystack"),
        "latency.png": (_latency, "Decoding time against the length of the prompt"),
    }
    return {name: (plot(parts["all"]), caption) for name, (plot, caption) in plots.items()}


def _accuracy(results: Results) -> Any:
    if not results.runs:
        return None
    figure, (left, right) = panels(2, (12, 4.8))
    capacities = measure.CAPACITIES
    full = intervals.share(results.exact("full", 0))
    for name, (colour, marker, label) in _STYLE.items():
        if name != "full":
            shares = [intervals.share(results.exact(name, c)) for c in capacities]
            style = {"color": colour, "marker": marker, "label": label}
            with_errors(left, capacities, shares, capsize=2, lw=1.5, ms=5, **style)
    level(left, full, "full cache", width=1.2)
    left.set_xscale("log", base=2)
    left.set_xticks(capacities, [f"{c}\n{c / results.length:.0%}" for c in capacities])
    left.set_xlabel(f"capacity C, and its share of the prompt of {results.length} tokens")
    left.set(ylabel="exact match of four tokens", ylim=(-0.03, 1.03))
    above = {"frameon": False, "fontsize": 8, "loc": "lower left", "bbox_to_anchor": (0, 1)}
    left.legend(ncols=5, **above)
    colours = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2")
    width = 0.8 / len(_KERNELS)
    for i, (name, label) in enumerate(_KERNELS.items()):
        shares = [intervals.share(results.exact(name, c)) for c in capacities]
        at = np.arange(len(capacities)) + (i - 1.5) * width
        middle = [s["value"] for s in shares]
        style = {"yerr": errors(shares), "capsize": 2, "color": colours[i], "label": label}
        right.bar(at, middle, width * 0.92, **style)
    level(right, full, "full cache", width=1.2)
    right.set_xticks(range(len(capacities)), [str(c) for c in capacities])
    right.set(xlabel="capacity C", ylabel="exact match of four tokens", ylim=(0, 1.03))
    right.legend(ncols=5, title="pooling of SnapKV's votes", **above)
    return figure


def _depth(results: Results) -> Any:
    if not results.runs:
        return None
    budgets = (24, 48)
    figure, every = panels(len(_MAPPED), (12, 4.6), rows=len(budgets))
    axes = every.reshape(len(budgets), len(_MAPPED))
    for budget, row in zip(budgets, axes, strict=True):
        for name, one in zip(_MAPPED, row, strict=True):
            shares = results.answers(name, budget).pivot_table("exact", "lines", "depth")
            _map(one, shares.to_numpy(), [f"{d * 20}-{d * 20 + 20}" for d in shares])
            one.set_yticks(range(len(shares)), [str(7 + 5 * lines) for lines in shares.index])
            title = "full cache" if name == "full" else f"{_STYLE[name][2]}, C = {budget}"
            one.set_title(title, fontsize=10)
        row[0].set_ylabel("prompt, tokens")
    for one in axes[-1]:
        one.set_xlabel("depth, %")
    return figure


def _map(axes: Any, table: np.ndarray, columns: list[str]) -> None:
    """Draws shares as colours and numbers."""
    axes.grid(False)
    axes.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "black" if value > 0.6 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)


def _windows(results: Results) -> Any:
    if (rates_LW := results.window_rates) is None:
        return None
    figure, (axes,) = panels(1, (7, 4))
    back = np.arange(rates_LW.shape[1] - 1, -1, -1)
    for layer, rates_W in enumerate(rates_LW):
        colour, marker = (("#0072B2", "o"), ("#D55E00", "^"))[layer % 2]
        axes.plot(back, rates_W, color=colour, marker=marker, label=f"layer {layer}")
    axes.invert_xaxis()
    axes.set(ylim=(0, None), ylabel="hit rate of the window's choices")
    axes.set_xlabel("windows before the last one (the last is 0)")
    axes.legend(frameon=False)
    return figure


def _needles(results: Results) -> Any:
    if not (grids := results.grids):
        return None
    known = {
        **methods(window=needles.WINDOW, kernel=needles.KERNEL),
        **kernels(window=needles.WINDOW, sizes=(1, 3)),
    }
    figure, axes = panels(len(grids), (6.5 * len(grids), 5))
    for grid, one in zip(grids, axes, strict=True):
        order = list(known)
        cases = sorted((c, order.index(n), n) for n, _, c in needles.cases(grid))
        bars = [("full cache", results.digits("full", 0, grid.tokens))]
        for capacity, _, name in cases:
            label = f"{known[name].label}, {capacity}"
            if name.startswith("kernel"):
                label = f"SnapKV, {label}"
            bars.append((label, results.digits(name, capacity, grid.tokens)))
        for i, (_, digits) in enumerate(bars):
            share = intervals.share(digits.all(-1))
            one.barh(i, share["value"], 0.7, xerr=errors([share]), capsize=2, color=BLUE)
            one.plot(digits.mean(), i, marker="D", color=RED, ls="", ms=5)
        one.plot([], [], marker="D", color=RED, ls="", label="share of right digits")
        one.barh([], [], color=BLUE, label="all five digits right, 95 %")
        one.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
        one.invert_yaxis()
        one.grid(axis="y", visible=False)
        one.grid(axis="x", alpha=0.25)
        one.set_xlim(0, 1)
        count = len(bars[0][1])
        one.set_title(f"{grid.tokens} tokens, {count} questions", fontsize=10)
        one.set(xlabel="share of questions or digits", ylabel="method, capacity C")
    legend_below(figure, axes[0], 2)
    return figure


def _needle_grid(results: Results) -> Any:
    if not (grids := results.grids):
        return None
    figure, axes = panels(len(_MAPPED), (12, 1.6 + 0.5 * len(grids)))
    for name, one in zip(_MAPPED, axes, strict=True):
        digits = [results.digits(name, grid.fifth, grid.tokens) for grid in grids]
        table = [some.mean(-1).reshape(-1, len(needles.DEPTHS)).mean(0) for some in digits]
        _map(one, np.stack(table), [f"{depth:.0%}" for depth in needles.DEPTHS])
        one.set_yticks(range(len(grids)), [str(grid.tokens) for grid in grids])
        one.set_title(_STYLE[name][2] + (", C = T / 5" if name != "full" else ""), fontsize=10)
        one.set_xlabel("depth")
    axes[0].set_ylabel("haystack, tokens")
    return figure


def _latency(results: Results) -> Any:
    if not results.latency:
        return None
    figure, (axes,) = panels(1, (7, 4))
    capacity = results.latency["settings"]["capacity"]
    for name, label in (("full", "full cache"), ("snapkv", f"SnapKV, C = {capacity}")):
        lengths = results.latency["result"][name]
        at = [int(n) for n in lengths]
        times = [one["ms"] for one in lengths.values()]
        colour, marker, _ = _STYLE[name]
        axes.plot(at, np.median(times, 1), color=colour, marker=marker or "s", label=label)
        axes.fill_between(at, np.min(times, 1), np.max(times, 1), color=colour, alpha=0.15, lw=0)
    axes.set_xticks(at, [f"{n // 1024}K" for n in at])
    axes.set(ylim=(0, None), xlabel="prompt, tokens")
    axes.set_ylabel("ms per token, median; band: all repeats")
    axes.legend(frameon=False)
    return figure
