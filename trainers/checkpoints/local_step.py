"""One process's part of a step on a disk of its own: the blocks that its devices hold, written without Orbax.

    <step>/state/blocks.bin     the blocks, one after another
    <step>/state/blocks.json    {array: [[start, shape, offset in bytes], ...]}
    <step>/meta.json            the record, as in a shared step
    <step>/manifest.json        whole shapes and dtypes, digests of this process's blocks, checksums of the files

Writing and reading need no other process, so that a host that is slow or lost does not hold up the others.
"""

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from espalier.trainers.checkpoints import manifest, state_tree, step_dir
from espalier.trainers.checkpoints.array_files import sharding_of
from espalier.trainers.checkpoints.manifest import (
    ArrayEntry,
    Block,
    DamagedCheckpointError,
    Manifest,
)

_BLOCKS = f"{step_dir.STATE}/blocks.bin"
_PLACES = f"{step_dir.STATE}/blocks.json"


class LayoutError(ValueError):
    """The blocks of a step do not cover what this process's devices hold: it is of another mesh."""


def blocks_of(array: jax.Array) -> list[Block]:
    """Returns, as host arrays, what this process's devices hold of an array, each region once."""
    shards = {
        tuple(part.start or 0 for part in shard.index): shard for shard in array.addressable_shards
    }
    return [(start, np.asarray(shard.data)) for start, shard in shards.items()]


def write(
    path: epath.Path,
    record: Mapping[str, Any],
    entries: Mapping[str, ArrayEntry],
    blocks: Mapping[str, Sequence[Block]],
) -> None:
    """Writes and completes a step.

    Args:
      path: the step directory; files of an interrupted save in it are replaced.
      record: the contents of meta.json.
      entries: shape and dtype of each whole array.
      blocks: results of `blocks_of` by array.

    Raises:
      OSError: a file could not be written; the step is incomplete.
    """
    (path / step_dir.STATE).mkdir(parents=True, exist_ok=True)
    (path / step_dir.INCOMPLETE).touch()
    places: dict[str, list[Any]] = {name: [] for name in blocks}
    end = crc = 0
    # Not synced: a step of which a power cut left a part does not match its checksums.
    with open(path / _BLOCKS, "wb") as file:
        for name, of_array in blocks.items():
            for start, values in of_array:
                data = _bytes(values)
                file.write(data)
                crc = zlib.crc32(data, crc)
                places[name].append([list(start), list(values.shape), end])
                end += data.nbytes
    text = json.dumps(places).encode()
    step_dir.write_file(path / _PLACES, text)
    step_dir.write_record(path, record)
    digests = manifest.digests(blocks)
    step_dir.complete(
        path,
        Manifest(
            {name: dataclasses.replace(x, digest=digests[name]) for name, x in entries.items()},
            {
                _BLOCKS: (end, f"{crc:08x}"),
                _PLACES: (len(text), f"{zlib.crc32(text):08x}"),
                step_dir.META: manifest.file_checksum(path / step_dir.META),
            },
        ),
    )


def _bytes(values: np.ndarray) -> memoryview:
    flat: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return memoryview(flat)


def read_verified(path: epath.Path, recorded: Manifest, wanted: state_tree.Flat) -> state_tree.Flat:
    """Returns arrays by name on the shardings of `wanted`, after checks of all files and blocks.

    Raises:
      DamagedCheckpointError: files or blocks are damaged.
      LayoutError: this process's devices hold regions that the step lacks.
    """
    if problems := manifest.check_files(path, recorded.files):
        raise DamagedCheckpointError(path, problems)
    try:
        blocks = _blocks(path, recorded)
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"is not a list of blocks ({type(error).__name__}: {error})"
        raise DamagedCheckpointError(path, {_PLACES: problem}) from None
    digests = manifest.digests(blocks)
    if damaged := [name for name in wanted if digests[name] != recorded.arrays[name].digest]:
        raise DamagedCheckpointError(path, {}, damaged)
    return {name: _placed(path, name, leaf, blocks[name]) for name, leaf in wanted.items()}


def _blocks(path: epath.Path, recorded: Manifest) -> dict[str, list[Block]]:
    """Returns the blocks as views of the file."""
    data = np.zeros(0, np.uint8)
    if recorded.files[_BLOCKS][0]:  # an empty file cannot be mapped
        data = np.memmap(os.fspath(path / _BLOCKS), np.uint8, mode="r")
    places = json.loads((path / _PLACES).read_bytes())
    blocks: dict[str, list[Block]] = {}
    for name, entry in recorded.arrays.items():
        dtype = np.dtype(entry.dtype)
        blocks[name] = []
        for start, shape, offset in places[name]:
            size = math.prod(shape) * dtype.itemsize
            values = data[offset : offset + size].view(dtype).reshape(shape)
            blocks[name].append((tuple(start), values))
    return blocks


def _placed(path: epath.Path, name: str, leaf: Any, blocks: Sequence[Block]) -> jax.Array:
    """Returns an array on its sharding, put together from blocks."""

    def region(index: Any) -> np.ndarray:
        bounds = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
        values = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        covered = 0
        for at, block in blocks:  # disjoint
            low = [max(a, b) for a, (b, _) in zip(at, bounds, strict=True)]
            high = [min(a + n, b) for a, n, (_, b) in zip(at, block.shape, bounds, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, at, strict=True))
            here = tuple(
                slice(a - o, b - o) for a, b, (o, _) in zip(low, high, bounds, strict=True)
            )
            values[here] = block[there]
            covered += math.prod(b - a for a, b in zip(low, high, strict=True))
        if covered != values.size:
            raise LayoutError(f"checkpoint {path} has another mesh's part of {name}.")
        return values

    # On one process any mesh is covered; several processes need the layout that was saved.
    return jax.make_array_from_callback(leaf.shape, sharding_of(leaf), region)
