"""Factors on a mesh: every device has a part of each sum, and no process or device has a sum whole."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

_LARGE = 1 << 26  # bytes of an array that is gathered by matrices


def sharding(mesh: Mesh | AbstractMesh, shape: Sequence[int]) -> NamedSharding:
    """Returns how a sum [..., rows, columns] is split: its rows, or else its columns, over as many devices as divide them.

    Layers and experts, which come first, are not split: layers are read one after the other.
    """
    for axes in _groups(mesh):
        size = math.prod(mesh.shape[axis] for axis in axes)
        for place in (-2, -1):
            if len(shape) >= 2 and shape[place] % size == 0:
                spec: list[Any] = [None] * len(shape)
                spec[place] = axes
                return NamedSharding(mesh, PartitionSpec(*spec))
    return NamedSharding(mesh, PartitionSpec())


def _groups(mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, ...]]:
    """Yields sets of axes of more than one device, those of most devices first."""
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    every = [x for n in range(1, len(axes) + 1) for x in itertools.combinations(axes, n)]
    yield from sorted(every, key=lambda group: -math.prod(mesh.shape[axis] for axis in group))


def shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Returns `sharding` of each array of a tree, which may have only shapes."""
    return jax.tree.map(lambda x: sharding(mesh, x.shape), tree)


def on_host(tree: Any) -> Any:
    """Returns arrays on the host, whole, whichever processes have their parts. Every process must call it."""

    def whole(x: Any) -> np.ndarray:
        result = None
        for start, part in parts(x):
            if part.size == x.size:
                return part.reshape(x.shape)
            result = np.empty(x.size, part.dtype) if result is None else result
            result[start : start + part.size] = part.reshape(-1)
        assert result is not None
        return result.reshape(x.shape)

    return jax.tree.map(whole, tree)


def parts(x: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yields an array's values on the host, with the index of the first in the flattened array. Every process must read all.

    A large array comes one matrix after the other, so that no process or device ever has it whole.
    """
    if not isinstance(x, jax.Array):
        yield 0, np.asarray(x)
    elif x.ndim < 3 or x.nbytes <= _LARGE:
        replicated = x.is_fully_addressable or x.is_fully_replicated
        yield 0, np.asarray(x if replicated else _gatherer(_whole(x))(x))
    else:
        get = _gatherer(_whole(x))
        for n, index in enumerate(np.ndindex(x.shape[:-2])):
            yield n * math.prod(x.shape[-2:]), np.asarray(get(x, *index))


def _whole(x: jax.Array) -> Any:
    """Returns the sharding of what every device of an array has whole."""
    own = x.sharding
    return NamedSharding(own.mesh, PartitionSpec()) if isinstance(own, NamedSharding) else own


@functools.cache
def _gatherer(sharding: Any) -> Callable[..., jax.Array]:
    """Returns the compiled function (x, *index of a matrix) -> the matrix; x itself without an index."""

    def matrix(x: jax.Array, *index: Any) -> jax.Array:
        if not index:
            return x
        sizes = (*(1 for _ in index), *x.shape[len(index) :])
        first = (*index, *(0 for _ in x.shape[len(index) :]))
        return jax.lax.dynamic_slice(x, first, sizes).reshape(x.shape[len(index) :])

    return jax.jit(matrix, out_shardings=sharding)


def sent(array: np.ndarray, owner: int) -> np.ndarray:
    """Returns an array of the process `owner`. Every process must call it, with an array of the same shape and dtype.

    Bytes are sent: JAX would round float64 to float32.
    """
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    own = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    got = multihost_utils.broadcast_one_to_all(own, is_source=jax.process_index() == owner)
    return np.asarray(got).view(array.dtype).reshape(array.shape)
