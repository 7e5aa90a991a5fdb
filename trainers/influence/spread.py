"""Factors on a mesh: every device has a part of each sum, and decomposes some of the covariances.

Shapes: s size of a covariance.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


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
    """Returns `sharding` of each array of a tree, which may have shapes alone."""
    return jax.tree.map(lambda x: sharding(mesh, x.shape), tree)


def on_host(tree: Any) -> Any:
    """Returns arrays on the host, whole, whichever processes have their parts. Every process must call it."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(jax.device_get(x))

    return jax.tree.map(whole, tree)


def summed(array: np.ndarray) -> np.ndarray:
    """Returns the sum of an array over processes, in its own dtype. Every process must call it.

    Bytes are gathered: JAX would round float64 to float32.
    """
    from jax.experimental import multihost_utils

    array = np.ascontiguousarray(array)
    bytes_P = multihost_utils.process_allgather(array.view(np.uint8))
    return np.asarray(bytes_P).view(array.dtype).sum(0)


@dataclasses.dataclass
class Eigh:
    """Decomposes stacks of symmetric matrices in float64, each matrix on one of the devices in turn.

    TPUs, which have no float64, leave them to their hosts: each process decomposes the matrices of its own devices.

    Attributes:
      devices: of all processes, in one order.
    """

    devices: Sequence[Any]
    _next: int = 0

    def __call__(self, stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns eigenvalues [..., s] and eigenvectors [..., s, s]; zeros where another process has the matrix."""
        flat = np.asarray(stack, np.float64).reshape(-1, *stack.shape[-2:])
        values, vectors = np.zeros(flat.shape[:-1]), np.zeros(flat.shape)
        count, own = len(self.devices), jax.process_index()
        places = [self.devices[(self._next + i) % count] for i in range(len(flat))]
        self._next += len(flat)
        mine = [i for i, device in enumerate(places) if device.process_index == own]
        for first in range(0, len(mine), count):
            # As many at a time as there are devices, for their memory.
            begun = [(i, _begin(flat[i], places[i])) for i in mine[first : first + count]]
            for i, (own_values, own_vectors) in begun:
                values[i], vectors[i] = np.asarray(own_values), np.asarray(own_vectors)
        return values.reshape(stack.shape[:-1]), vectors.reshape(stack.shape)


def _begin(matrix: np.ndarray, device: Any) -> tuple[Any, Any]:
    """Starts one decomposition, and returns its results, which are not awaited."""
    if device.platform == "tpu":
        return np.linalg.eigh(matrix)
    # Within the mesh of all devices, a program cannot be on one of them.
    with jax.enable_x64(True), jax.set_mesh(Mesh(np.array([device]), ("one",))):
        values, vectors = jnp.linalg.eigh(jax.device_put(matrix, device))
    return values, vectors
