"""Copies between arrays; one of them may be a transposed view."""

import numpy as np

ROWS = 256  # rows copied at a time: as many as the L1 cache has lines for
_LINE = 64  # bytes


def buffer(width: int, dtype: np.dtype) -> np.ndarray:
    """Returns the buffer that `copy` uses for rows of `width` elements; reuse it for many copies."""
    word = np.dtype(f"u{dtype.itemsize}")
    return np.empty((ROWS, width + _LINE // word.itemsize), word)[:, :width]


def copy(into: np.ndarray, values: np.ndarray, held: np.ndarray | None = None) -> None:
    """Copies `values` to `into`, cast to its dtype.

    A transposed matrix is copied through a buffer, some rows at a time. Buffer rows are one cache line
    longer than needed: rows whose size is a power of two would otherwise share a few cache lines.
    Elements are moved as plain integers, which is fast in NumPy and releases the GIL.
    """
    if into.dtype != values.dtype:
        into[...] = values.astype(into.dtype)
        return
    into, values = (x.view(f"u{x.itemsize}") for x in (into, values))
    if into.ndim != 2 or values.strides[0] >= values.strides[1]:
        into[...] = values
        return
    matrix = values.T
    if held is None:
        held = buffer(matrix.shape[1], into.dtype)
    for low in range(0, matrix.shape[0], ROWS):
        part = matrix[low : low + ROWS]
        held[: len(part)] = part
        into[:, low : low + ROWS] = held[: len(part)].T
