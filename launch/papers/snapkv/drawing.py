"""Pieces of SnapKV's plots."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colours, which people with colour blindness can distinguish; markers differ too.
STYLE = {
    "full": ("black", "s", "full cache"),
    "snapkv": ("#0072B2", "o", "SnapKV"),
    "snapkv_avg": ("#56B4E9", "v", "average pooling"),
    "snapkv_int8": ("#CC79A7", "D", "int8"),
    "adakv": ("#009E73", "s", "Ada-KV"),
    "oracle": ("#777777", "*", "oracle"),
    "tova": ("#CC79A7", "D", "TOVA"),
    "h2o": ("#D55E00", "^", "H2O"),
    "streaming_llm": ("#E69F00", "P", "StreamingLLM"),
    "truncation": ("#009E73", "<", "truncation"),
    "random": ("#777777", "x", "random"),
    "kernel_1": ("#D55E00", "^", "no pooling"),
    "kernel_3": ("#E69F00", "P", "max pooling over 3"),
    "kernel_5": ("#56B4E9", "v", "max pooling over 5"),
}
_LINES = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"))


def shares_map(axes: Any, table: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Draws shares as colours and numbers."""
    axes.grid(False)
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "white" if value > 0.55 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)


def with_dots(axes: Any, at: Any, values_NX: np.ndarray, number: int, label: str) -> None:
    """Draws the mean of each column as a line, and its values as dots."""
    colour, marker = _LINES[number % len(_LINES)]
    axes.plot(at, values_NX.mean(0), color=colour, marker=marker, ms=5, label=label)
    for row in values_NX:
        axes.plot(at, row, ls="", color=colour, marker=marker, ms=2.5, alpha=0.4)


def joined(axes: Any, rows: Sequence[Sequence[float]], number: int, label: str) -> None:
    """Draws each row as dots that a line joins."""
    colour, marker = _LINES[number]
    for at, row in enumerate(rows):
        style = {"color": colour, "marker": marker, "lw": 0.8, "ms": 5, "alpha": 0.7}
        axes.plot(range(len(row)), row, label=label if not at else None, **style)
