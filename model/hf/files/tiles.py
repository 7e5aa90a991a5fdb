"""Copies between arrays of which one may be a transposed view."""

import numpy as np

ROWS = 256  # at a time: as many cache lines as the first cache holds
_LINE = 64  # bytes


def buffer(width: int, dtype: np.dtype) -> np.ndarray:
    """What `copy` takes rows of `width` elements through; for many copies, to be made once."""
    word = np.dtype(f"u{dtype.itemsize}")
    return np.empty((ROWS, width + _LINE // word.itemsize), word)[:, :width]


def copy(into: np.ndarray, values: np.ndarray, held: np.ndarray | None = None) -> None:
    """into[...] = values, cast to its dtype.

    A transposed matrix is taken through a buffer of some of its rows that are a cache line longer than
    they need be: with powers of two as sizes all rows would share a few lines of the cache. Elements are
    moved as plain integers, which NumPy does fast and without holding up other threads.
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
