"""Loads a Hugging Face checkpoint as a model and its parameters in memory, for users of the library."""

import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from espalier.model.hf.config_fields import named
from espalier.model.hf.files.safetensors_files import SafetensorsReader, read_json
from espalier.model.hf.mapping import Piece
from espalier.model.hf.plan import Plan, plan
from espalier.model.hf.registry import family_of_config
from espalier.model.transformer import Transformer

_THREADS = 8  # also on fewer cores: with files that are not in memory, threads wait for the disk
_ALIGNMENT = 64  # bytes; jax uses host arrays with this alignment without a copy


def load(directory: str | os.PathLike, *, dtype: str | None = None) -> tuple[Transformer, Any]:
    """Returns the linen module of a Hugging Face checkpoint, with scanned layers, and its parameters.

    Args:
      directory: directory with config.json and safetensors files.
      dtype: dtype of the parameters; None for the dtypes of the files.

    Raises:
      CheckpointFileError, MismatchedTensors, UnsupportedConfig, UnsuitableDtypeError.
    """
    config = read_json(pathlib.Path(directory) / "config.json")
    with named(directory):
        family = family_of_config(config)
        model = family.model(config)
    with SafetensorsReader(directory) as source:
        arrays = fill(plan(family, model, source, dtype=dtype))
    arrays = {path: jax.device_put(x, may_alias=True) for path, x in arrays.items()}
    return model, traverse_util.unflatten_dict(arrays, sep="/")


def fill(checked: Plan) -> dict[str, np.ndarray]:
    """Returns the arrays of a plan; a few threads read every tensor once."""
    with filling(checked) as arrays:
        return arrays()


@contextlib.contextmanager
def filling(
    checked: Plan, finish: Callable[[str, np.ndarray], dict[str, Any]] | None = None
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Context manager: threads fill the arrays of a plan; yields a function that waits for these arrays and returns them.

    Args:
      finish: returns the arrays by path that replace a filled one at once, so that a few of those of the plan are in memory; None
        replaces none.
    """
    arrays = {path: _aligned(x.shape, x.dtype) for path, x in checked.arrays.items()}
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")

    def finished(path: str, parts: Sequence[concurrent.futures.Future]) -> None:
        for part in parts:  # which began before
            part.result()
        array = arrays.pop(path)
        results.update({path: array} if finish is None else finish(path, array))

    results: dict[str, Any] = {}
    futures = []
    for path, target in checked.arrays.items():
        # With `...` even a single number is a view.
        views = ((arrays[path][_place(piece)], piece) for piece in target.pieces)
        parts = [pool.submit(checked.fill, *view) for view in views]
        futures.append(pool.submit(finished, path, parts))

    def filled() -> dict[str, Any]:
        for future in futures:
            future.result()
        return results

    try:
        yield filled
    finally:
        pool.shutdown(cancel_futures=True)


def _place(piece: Piece) -> Any:
    return (*piece.native_at, ...)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
