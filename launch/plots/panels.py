"""Panels of the reproductions' plots, with values and their intervals over seeds."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colours, which people with colour blindness can distinguish.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#777777",
)
BESIDE = {"frameon": False, "fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1, 1)}


def panels(
    columns: int,
    size: tuple[float, float],
    *,
    rows: int = 1,
    share_y: bool | str = False,
    heights: Sequence[float] | None = None,
) -> Any:
    """Returns a figure and its axes, row by row; `heights` are the rows' relative ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        rows, columns, squeeze=False, sharey=share_y, height_ratios=heights
    ).ravel()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes


def save(figures: Mapping[str, tuple[Any, str]], folder: pathlib.Path) -> dict[str, str]:
    """Writes figures into a folder.

    Args:
      figures: file name -> (figure, caption); a figure is None if it has no data.
      folder: is created.

    Returns:
      The captions of the written figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: caption for name, (figure, caption) in figures.items() if figure is not None}
    for name in drawn:
        figures[name][0].savefig(folder / name, dpi=130)
    return drawn


def errors(shown: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Returns the distances of intervals' ends from their values, in the form of matplotlib."""
    return [[s["value"] - s["low"] for s in shown], [s["high"] - s["value"] for s in shown]]


def paired(
    axes: Any, rows: Sequence[tuple[str, Sequence[float], Mapping[str, float], str]]
) -> None:
    """Draws differences as rows from the top: a dot for each seed, the mean and its interval.

    Args:
      axes: to draw on.
      rows: (label, values by seed, {'value', 'low', 'high'}, colour); an end that is not finite is not drawn.
    """
    for at, (_, values, shown, colour) in enumerate(rows):
        axes.plot(
            values, [at] * len(values), ls="", marker="o", ms=4, color=colour, alpha=0.45, mew=0
        )
        axes.plot(shown["value"], at, marker="|", ms=13, mew=2, color=colour)
        if np.isfinite([shown["low"], shown["high"]]).all():
            axes.plot([shown["low"], shown["high"]], [at, at], color=colour, lw=1.5)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)


def dots(axes: Any, at: float, values: np.ndarray, colour: Any, label: str = "") -> None:
    """Draws a dot for each seed beside each other, and a line at their mean."""
    spread = np.linspace(-0.07, 0.07, len(values)) if len(values) > 1 else np.zeros(1)
    axes.plot(at + spread, values, ls="", marker="o", ms=4, color=colour, alpha=0.55, mew=0)
    axes.plot([at - 0.12, at + 0.12], [values.mean()] * 2, color=colour, lw=2.5, label=label)


def legend_below(figure: Any, axes: Any, columns: int) -> None:
    """Draws the legend of some axes below all of the figure's."""
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, ncols=columns, loc="outside lower center"
    )


def plain_ticks(axis: Any) -> None:
    """Writes the numbers of a logarithmic axis without powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())
