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
_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
_DARK = 0.55  # share of the scale from which numbers are white
DPI = 130  # of saved figures
BESIDE = {"frameon": False, "fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1, 1)}


def colours(count: int) -> Sequence[str]:
    """Returns colours that can be distinguished, or a scale for more lines than there are of these."""
    if count <= len(_COLOURS):
        return _COLOURS[:count]
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(scale(i / (count - 1) * 0.92)) for i in range(count)]


def columns(count: int) -> int:
    """Returns 3 or 4 columns for so many panels, the number that leaves fewer places empty; fewer for fewer panels."""
    return min(count, min((3, 4), key=lambda wide: (-count % wide, -wide)))


def room(axes: Any, axis: str) -> None:
    """Widens the range of an axis whose values are all equal, so that it does not show digits of nothing."""
    widen = axes.set_xlim if axis == "x" else axes.set_ylim
    spans = [getattr(line, f"get_{axis}data")() for line in axes.lines]
    values = np.concatenate([np.asarray(span, float) for span in spans]) if spans else np.zeros(0)
    values = values[np.isfinite(values)]
    if values.size and np.ptp(values) <= 1e-6 * np.abs(values).max():
        far = 1.3 * float(values[0])
        widen(*((min(0.0, far), max(0.0, far)) if far else (-1.0, 1.0)))


def panels(
    columns: int,
    size: tuple[float, float],
    *,
    rows: int = 1,
    share_y: bool | str = False,
) -> Any:
    """Returns a figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # inches: a title stays apart from the axis above it
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y).ravel()
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
        figures[name][0].savefig(folder / name, dpi=DPI)
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
    """Draws a dot for each seed, side by side, and a line at their mean."""
    spread = np.linspace(-0.07, 0.07, len(values)) if len(values) > 1 else np.zeros(1)
    axes.plot(at + spread, values, ls="", marker="o", ms=4, color=colour, alpha=0.55, mew=0)
    axes.plot([at - 0.12, at + 0.12], [values.mean()] * 2, color=colour, lw=2.5, label=label)


def legend_below(figure: Any, axes: Any, columns: int) -> None:
    """Draws the legend of some axes below all of the figure's."""
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, ncols=columns, loc="outside lower center"
    )


def short_ticks(axis: Any) -> None:
    """Writes the numbers of an axis without a factor above it, large ones as 2 M."""
    from matplotlib import ticker

    large = ticker.EngFormatter()

    def text(value: float, at: int | None) -> str:
        del at
        return (large(value) if abs(value) >= 1e5 else f"{value:g}").replace("-", "−")

    axis.set_major_formatter(ticker.FuncFormatter(text))


def plain_ticks(axis: Any) -> None:
    """Writes the numbers of a logarithmic axis without powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())


def heat_map(
    axes: Any,
    values: Sequence[Sequence[float]] | np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    signed: bool = False,
    row_names: bool = True,
    most: float = 1.0,
) -> None:
    """Draws a matrix as coloured squares with their numbers: shares from 0 to 1, or `signed` cosines from -1 to 1.

    Args:
      axes: axes to draw on.
      values: the matrix.
      rows, columns: names of rows and columns.
      title: title above the matrix.
      signed: whether colours go from blue to red around 0.
      row_names: whether to write the names of the rows; False beside a matrix with the same rows.
      most: value of the darkest colour, for numbers other than shares and cosines.
    """
    values_RC = np.asarray(values, float)
    low = -most if signed else 0.0
    axes.imshow(values_RC, cmap="RdBu_r" if signed else "Blues", vmin=low, vmax=most, aspect="auto")
    for (i, j), value in np.ndenumerate(values_RC):
        dark = (abs(value) if signed else value) > _DARK * most
        text = f"{value:.2f}".replace("0.", ".", 1)
        axes.text(
            j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
        )
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows if row_names else [""] * len(rows), fontsize=8)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=9)


def heat_map_grid(rows: int, columns: int, matrix: tuple[int, int]) -> tuple[Any, np.ndarray]:
    """Returns a figure and its axes [rows, columns] for matrices of this shape."""
    from matplotlib.figure import Figure

    height, width = matrix
    size = (1.2 + columns * max(0.42 * width + 0.35, 2.0), rows * (0.3 * height + 1.15))
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
