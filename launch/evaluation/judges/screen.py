"""Win rates as a table and as bars."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

_RATES = ("win", "tie", "loss", "win - loss", "judged", "invalid")
_BEHIND = ("same in both orders", "position bias", "wins of the longer", "rate at equal length")
_BY_LANGUAGE = ("win", "tie", "loss", "wins and half ties", "at equal length", "judged", "invalid")
_LENGTHS = ("answers", "empty", "words, mean", "median", "characters, mean", "median")
_COLOURS = {"win": "#2a6f97", "tie": "#c9ced3", "loss": "#d1603d"}


def print_tables(summary: Mapping[str, Any]) -> None:
    """Prints win rates and the judge's biases, a row for each pair of systems, and lengths by system."""
    from rich.console import Console

    rates = _table("win rates in %, with 95 % intervals over prompts", ("a", "b"), _RATES)
    behind = _table("the judge, in %", ("a", "b"), _BEHIND)
    for pair in summary["pairs"]:
        names = (pair["a"], pair["b"])
        shares = (_cell(pair[name]) for name in ("win", "tie", "loss"))
        counts = (f"{_judged(pair):,}", f"{pair['counts']['invalid']:,}")
        rates.add_row(*names, *shares, _cell(pair["difference"], sign="+"), *counts)
        bias = _cell(pair["position_bias"], sign="+")
        cells = (_cell(pair["longer_wins"]), _cell(pair["length_controlled"]))
        behind.add_row(*names, _cell(pair["consistency"]), bias, *cells)
    lengths = _table("lengths of answers", ("system",), _LENGTHS)
    for name, system in summary["systems"].items():
        sizes = [
            system[unit][kind] for unit in ("words", "characters") for kind in ("mean", "median")
        ]
        numbers = (f"{size:,.1f}" for size in sizes)
        lengths.add_row(name, f"{system['answers']:,}", f"{system['empty']:,}", *numbers)
    console = Console(width=160, markup=False)
    for table in (rates, behind, lengths):
        console.print(table)


def print_languages(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Prints the win rates of each two systems by language, as `shares.by_language` has them."""
    from rich.console import Console

    console = Console(width=160, markup=False)
    for pair in summaries:
        title = f"{pair['a']} against {pair['b']}: win rates in %, with 95 % intervals over prompts"
        table = _table(title, ("language",), _BY_LANGUAGE)
        for code, one in pair["languages"].items():
            shares = (_cell(one[x]) for x in ("win", "tie", "loss", "rate", "length_controlled"))
            table.add_row(code, *shares, f"{_judged(one):,}", f"{one['counts']['invalid']:,}")
        if mean := pair["mean"]:
            means = (f"{100 * mean[name]:.1f}" for name in ("win", "tie", "loss", "rate"))
            table.add_section()
            table.add_row("mean", *means, "", "", f"worst: {pair['worst']}")
        console.print(table)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _judged(pair: Mapping[str, Any]) -> int:
    return sum(pair["counts"][name] for name in ("win", "loss", "tie"))


def _cell(share: Mapping[str, float] | None, *, sign: str = "") -> str:
    """Returns a share and its interval in per cent."""
    if share is None:
        return "-"
    value, low, high = (f"{100 * share[name]:{sign}.1f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def plot(summary: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes a PNG with a stacked bar of wins, ties and losses for each pair of systems."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pairs = [pair for pair in summary["pairs"] if pair["win"] is not None]
    height = 1.5 + 0.75 * max(len(pairs), 1)
    figure = Figure(figsize=(9.5, height), layout="constrained")
    axes = figure.subplots()
    for y, pair in enumerate(pairs):
        start = 0.0
        for name in ("win", "tie", "loss"):
            width = 100 * pair[name]["value"]
            axes.barh(y, width, left=start, height=0.62, color=_COLOURS[name])
            if width >= 4:
                colour = "black" if name == "tie" else "white"
                place = (start + width / 2, y)
                axes.annotate(f"{width:.1f}", place, ha="center", va="center", color=colour)
            start += width
        axes.annotate(
            f"{_cell(pair['difference'], sign='+')}\n{_judged(pair):,} prompts",
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(pairs)), [f"{pair['a']}\nagainst {pair['b']}" for pair in pairs])
    axes.set_ylim(max(len(pairs), 1) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of prompts, %")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    labels = {"win": "first preferred", "tie": "tie", "loss": "second preferred"}
    handles = [Patch(color=_COLOURS[name], label=label) for name, label in labels.items()]
    axes.legend(handles=handles, ncols=3, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    axes.annotate(
        "win - loss, 95 %", (1.01, 1.02), xycoords="axes fraction", va="bottom", fontsize=9
    )
    figure.savefig(path, dpi=140)


def plot_languages(summaries: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Writes a PNG with the rate of the first system by language, a panel for each two systems."""
    from matplotlib.figure import Figure

    most = max(len(pair["languages"]) for pair in summaries)
    size = (1.2 + 3.6 * len(summaries), 1.4 + 0.26 * most)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(summaries), squeeze=False)[0]
    for axes, pair in zip(panels, summaries, strict=True):
        rates = {code: one["rate"] for code, one in pair["languages"].items() if one["rate"]}
        order = sorted(rates, key=lambda code: rates[code]["value"])
        for y, code in enumerate(order):
            low, value, high = (100 * rates[code][name] for name in ("low", "value", "high"))
            axes.plot([low, high], [y, y], color=_COLOURS["win"], lw=1.5)
            axes.plot(value, y, "o", color=_COLOURS["win"], ms=5)
        axes.axvline(50, color="#777777", lw=0.8, ls=":")
        if pair["mean"]:
            axes.axvline(
                100 * pair["mean"]["rate"], color=_COLOURS["loss"], lw=1, label="mean of languages"
            )
            axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.set_ylim(-0.6, max(len(order), 1) - 0.4)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"{pair['a']} against {pair['b']}:\nwins and half of the ties, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=140)
