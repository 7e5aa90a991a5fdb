"""Finds a model's arrays in a checkpoint that stores its layers in another layout.

Scanned with a period P, layers/block_p has a leading axis, whose row g is layer g * P + p. Unrolled, layers/block_i is
layer i. A run may read layers with another period (`layer_pattern`), or scan layers that were saved unrolled.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from espalier.trainers.checkpoints.array_files import sharding_of
from espalier.trainers.checkpoints.manifest import ArrayEntry

_BLOCK = re.compile(r"((?:.*/)?layers)/block_(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class Saved:
    """An array of the model, in a checkpoint.

    Attributes:
      entry: shape and dtype, in the model's layout if the array is made of layers.
      parts: (array in the checkpoint, its row or None for the whole array), one for each layer.
      stacked: whether the parts are rows of the array; otherwise there is one, which is the array.
    """

    entry: ArrayEntry
    parts: tuple[tuple[str, int | None], ...]
    stacked: bool = False

    @property
    def moved(self) -> bool:
        """Whether the checkpoint has the array's layers in another layout."""
        return self.stacked or self.parts[0][1] is not None

    def array(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the array, from those of the checkpoint by name."""
        values = [arrays[name] if row is None else arrays[name][row] for name, row in self.parts]
        return jnp.stack(values) if self.stacked else values[0]

    def abstract_parts(
        self, like: Any, saved: Mapping[str, ArrayEntry]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arrays to read, by name; a layer is split over devices as in `like`."""
        sharding = sharding_of(like)
        layer_rank = len(self.entry.shape) - self.stacked
        wanted = {}
        for name, _ in self.parts:
            entry, split = saved[name], sharding
            if self.moved and isinstance(sharding, NamedSharding):
                spec = (*sharding.spec, *(None,) * (len(like.shape) - len(sharding.spec)))
                whole = (None,) * (len(entry.shape) - layer_rank)
                of_layer = spec[len(spec) - layer_rank :]
                split = NamedSharding(sharding.mesh, PartitionSpec(*whole, *of_layer))
            dtype = jnp.dtype(entry.dtype)
            wanted[name] = jax.ShapeDtypeStruct(entry.shape, dtype, sharding=split)
        return wanted


class SavedArrays:
    """The arrays of a checkpoint, by the names of a model that may have another layout.

    Args:
      entries: the checkpoint's arrays by name.
      names: all names that will be looked up: they tell the model's layout.
    """

    def __init__(self, entries: Mapping[str, ArrayEntry], names: Iterable[str]):
        self.entries = entries
        self._blocks: dict[tuple[str, str], dict[int, str]] = {}  # by stack and path in a block
        self._periods = _periods(entries), _periods(names)
        for name in entries:
            if match := _BLOCK.fullmatch(name):
                self._blocks.setdefault((match[1], match[3]), {})[int(match[2])] = name

    def find(self, name: str, shape: tuple[int, ...]) -> Saved | None:
        """Returns an array of this shape; None if the checkpoint lacks it, one of another shape if it has only that."""
        entry = self.entries.get(name)
        whole = None if entry is None else Saved(entry, ((name, None),))
        if entry is not None and entry.shape == shape:
            return whole
        match = _BLOCK.fullmatch(name)
        moved = match and self._moved(match[1], int(match[2]), match[3], shape)
        return moved or whole

    def _moved(self, stack: str, block: int, rest: str, shape: tuple[int, ...]) -> Saved | None:
        blocks = self._blocks.get((stack, rest))
        if not blocks:
            return None
        theirs, ours = (periods[stack] for periods in self._periods)
        entry = self.entries[next(iter(blocks.values()))]
        layer = entry.shape if len(entry.shape) < len(shape) else entry.shape[1:]
        unrolled, stacked = len(entry.shape) == len(layer), len(shape) > len(layer)
        count = theirs if unrolled else theirs * entry.shape[0]
        if (
            count != (ours * shape[0] if stacked else ours)
            or shape[len(shape) - len(layer) :] != layer
        ):
            return None
        parts = []
        for i in range(block, count if stacked else block + 1, ours):
            source = blocks.get(i if unrolled else i % theirs)
            if source is None or self.entries[source].shape != entry.shape:
                return None
            parts.append((source, None if unrolled else i // theirs))
        return Saved(dataclasses.replace(entry, shape=shape), tuple(parts), stacked)


def _periods(names: Iterable[str]) -> dict[str, int]:
    """Returns the number of blocks of each stack of layers."""
    periods: dict[str, int] = {}
    for match in filter(None, map(_BLOCK.fullmatch, names)):
        periods[match[1]] = max(periods.get(match[1], 0), int(match[2]) + 1)
    return periods
