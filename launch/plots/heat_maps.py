"""Matrices as coloured squares with their numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_DARK = 0.55  # share of the scale from which numbers are white


def draw(
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
    """Draws one matrix: shares from 0 to 1, or `signed` cosines from -1 to 1.

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


def grid(rows: int, columns: int, matrix: tuple[int, int]) -> tuple[Any, np.ndarray]:
    """Returns a figure and its axes [rows, columns] for matrices of this shape."""
    from matplotlib.figure import Figure

    height, width = matrix
    size = (1.2 + columns * max(0.42 * width + 0.35, 2.0), rows * (0.3 * height + 1.15))
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
