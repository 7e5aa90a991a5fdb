"""Token caches that are read in place: in an object store, by ranges, without a copy on this machine.

At the start, the manifest and `blocks.json` are read, two objects. Values and lengths are read when rows need them, and each
block is verified (data/cache/blocks.py), so that damage anywhere is an error that names the object and the byte.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from espalier.common.storage import paths
from espalier.data.cache import blocks, store
from espalier.data.cache import cache_dir as directories
from espalier.data.cache.block_folder import BlockFolder
from espalier.data.cache.cache_files import CacheCorruptError, Column, feature_dtype
from espalier.data.cache.ranged import RangedArray

# How a cache of a store is read: 'copy' it to this machine first, read it 'in_place', or 'auto': by its size.
ReadCache = Literal["auto", "copy", "in_place"]
COPIED_BYTES = 10e9  # at most, by 'auto': a minute at 200 MB/s; of the free disk, at most half
_INDEX_IN_MEMORY = 10**7  # records of a cache of this machine whose lengths are read at once
_MOST_MAPS = 50_000  # Linux lets a process have 65,530
_WINDOW = 256  # blocks of lengths that are held at a time


class MissingChecksumsError(ValueError):
    """A cache has no checksums of blocks."""


class Starts:
    """The index of the first value of each record, found by the sums of lengths that tables of checksums hold.

    Args:
      lengths: of all records.
      bounds: the index of the first value of each shard, and the total.
    """

    dtype = np.dtype(np.int64)

    def __init__(self, lengths: RangedArray, bounds: np.ndarray):
        self._lengths, self._bounds = lengths, bounds
        self._per_block = blocks.BYTES // lengths.dtype.itemsize

    def __len__(self) -> int:
        return len(self._lengths)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all lengths."""
        lengths = np.asarray(self._lengths)
        return (np.cumsum(lengths, dtype=np.int64) - lengths).astype(dtype or self.dtype)

    def __getitem__(self, index: Any) -> Any:
        """Returns the starts of records by their numbers, of any shape; raises as `RangedArray.gather`."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        records = np.asarray(index, np.int64)
        flat, out = records.reshape(-1), np.empty(records.size, np.int64)
        shard = np.searchsorted(self._lengths.bounds, flat, side="right") - 1
        inside = flat - self._lengths.bounds[shard]
        block = inside // self._per_block
        pairs, place = np.unique(np.stack([shard, block]), axis=1, return_inverse=True)
        for begin in range(0, pairs.shape[1], _WINDOW):
            shard_K, block_K = pairs[:, begin : begin + _WINDOW]
            self._fill(out, shard_K, block_K, place.reshape(-1) - begin, inside)
        return out.reshape(records.shape)[()]

    def _fill(self, out, shard_K, block_K, place, inside) -> None:
        """Computes the starts of records that lie in some blocks of lengths; `place` is each record's block."""
        begin_K = block_K * self._per_block
        count = np.diff(self._lengths.bounds)[shard_K]
        size_K = np.minimum(begin_K + self._per_block, count) - begin_K
        at_K = np.cumsum(size_K) - size_K
        lengths = np.empty(size_K.sum(), self._lengths.dtype)
        self._lengths.gather(self._lengths.bounds[shard_K] + begin_K, size_K, lengths, at_K)
        before = np.cumsum(lengths, dtype=np.int64) - lengths
        files = self._lengths.files
        sums_K = [
            self._bounds[s] + self._lengths.folder.sums(files[s])[b]
            for s, b in zip(shard_K.tolist(), block_K.tolist(), strict=True)
        ]
        here = np.flatnonzero((place >= 0) & (place < len(shard_K)))
        at = place[here]
        first = before[at_K]
        out[here] = np.array(sums_K)[at] + before[at_K[at] + inside[here] - begin_K[at]] - first[at]


@dataclasses.dataclass(frozen=True)
class RangedColumn(Column):
    """A column whose values and lengths are read by ranges; its fields are used like the fields of `Column`."""

    all_values: RangedArray

    def gather(
        self, begins: np.ndarray, lengths: np.ndarray, out: np.ndarray, at: np.ndarray
    ) -> None:
        """See `Column.gather`; raises as `RangedArray.gather`."""
        self.all_values.gather(begins, lengths, out, at)


class _Shards(list):
    """The values of each shard, made when they are asked for: there may be thousands."""

    def __init__(self, folder: BlockFolder, stems: Sequence[str], dtype: np.dtype):
        super().__init__(stems)
        self._folder, self._dtype = folder, dtype

    def __getitem__(self, shard: Any) -> Any:
        return RangedArray(self._folder, [f"{super().__getitem__(shard)}.bin"], self._dtype)

    def __iter__(self) -> Iterator[Any]:
        return (self[shard] for shard in range(len(self)))


def _column(folder: BlockFolder, stems: Sequence[str], dtype: np.dtype) -> RangedColumn:
    values = RangedArray(folder, [f"{stem}.bin" for stem in stems], dtype)
    lengths: Any = RangedArray(folder, [f"{stem}.len" for stem in stems], np.dtype("<u4"))
    starts: Any = Starts(lengths, values.bounds)
    return RangedColumn(_Shards(folder, stems, dtype), values.bounds, lengths, starts, values)


def read_manifest(address: str) -> dict:
    """Returns the manifest of a cache; raises FileNotFoundError, CacheCorruptError or StoreError."""
    return store.parse_manifest(paths.read(paths.join(address, store.MANIFEST)), address)


def open_cache(address: str | os.PathLike, manifest: dict | None = None) -> store.Cache:
    """Opens a cache of a store, or of this machine, to be read in place.

    Raises:
      FileNotFoundError: there is no cache.
      MissingChecksumsError: it has no checksums of blocks.
      CacheCorruptError: the manifest or `blocks.json` is damaged.
      StoreError: the store refuses, or cannot be reached.
    """
    address = os.fspath(address)
    manifest = manifest or read_manifest(address)
    try:
        folder = BlockFolder(address, of=manifest["content"])
    except FileNotFoundError:
        raise MissingChecksumsError(
            f"The token cache {address} has no checksums of blocks, which it needs to be read in place. Make them with "
            "`espalier prepare cache --checksums` and the gin files and bindings of the run, or set READ_CACHE = 'copy'."
        ) from None
    for shard in manifest["shards"]:
        for name, (size, _) in shard["files"].items():
            if not name.endswith(".json") and folder.file(name).size != size:
                raise CacheCorruptError(
                    f"{paths.join(address, blocks.INDEX)} gives {name} {folder.file(name).size} bytes, and the manifest {size}."
                )
    columns: dict[str, Column] = {}
    for feature, kind in manifest["features"].items():
        stems = [f"{shard:05d}.{feature}" for shard in range(len(manifest["shards"]))]
        column = columns[feature] = _column(folder, stems, feature_dtype(kind))
        counts = (len(column.lengths), len(column.all_values))
        if counts != (manifest["records"], manifest["values"][feature]):
            raise CacheCorruptError(
                f"Token cache {address}: the manifest has wrong counts of feature {feature!r}."
            )
    return store.Cache(address, manifest["fingerprint"], manifest["content"], columns, manifest)


def open_here(directory: pathlib.Path, *, verify: bool = True) -> store.Cache:
    """Opens a cache of this machine: tokens are mapped; of a large one, lengths and texts are read when they are needed.

    In memory, the lengths and starts of a billion records are 12 GB for each feature.

    Args:
      directory: of the cache.
      verify: check every byte against its checksum.

    Raises:
      as `store.open_cache`.
    """
    manifest = store.read_manifest(directory)
    if manifest["records"] <= _INDEX_IN_MEMORY or not (directory / blocks.INDEX).exists():
        return store.open_cache(directory, verify=verify)
    store.check_files(directory, manifest, verify)
    opened = open_cache(directory, manifest)
    columns, shards = dict(opened.columns), len(manifest["shards"])
    for feature, kind in manifest["features"].items():
        if kind != "text" and shards * len(columns) < _MOST_MAPS:
            stems = [directory / f"{shard:05d}.{feature}" for shard in range(shards)]
            columns[feature] = columns[feature].mapped(stems, feature_dtype(kind))
    return dataclasses.replace(opened, directory=directory, columns=columns)


def open_if_chosen(directory: pathlib.Path, how: ReadCache) -> store.Cache | None:
    """Opens the cache of a store in place, if that is how it is to be read; prints which, and why.

    Args:
      directory: the folder of its copy on this machine.
      how: see `ReadCache`.

    Returns:
      None if the cache is to be copied, is copied already, or is not in the store.

    Raises:
      as `open_cache`.
    """
    address = directories.address_of(directory)
    if address is None or (how != "in_place" and directory.exists()):
        return None
    try:
        manifest = read_manifest(address)
    except FileNotFoundError:
        return None
    size = sum(size for shard in manifest["shards"] for size, _ in shard["files"].values())
    free = _free_bytes(directory)
    what = f"the token cache {address} ({size / 1e9:,.1f} GB; {free / 1e9:,.1f} GB are free here"
    large = size > min(COPIED_BYTES, free / 2)
    if how == "in_place" or (how == "auto" and large):
        try:
            opened = open_cache(address, manifest)
            print(f"reading {what}) in place: READ_CACHE = {how!r}", file=sys.stderr)
            return opened
        except MissingChecksumsError:
            if how == "in_place" or size > free:
                raise
            what += "; it has no checksums to be read in place, see `espalier prepare cache --checksums`"
    print(f"copying {what}): READ_CACHE = {how!r}", file=sys.stderr)
    return None


def _free_bytes(path: pathlib.Path) -> int:
    """Returns the free bytes where a path is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def add_checksums(place: str | os.PathLike, bar: Callable[[int], Any] = lambda size: None) -> bool:
    """Writes the checksums of blocks of a cache that has none; returns whether it had none.

    Every file is compared with the manifest's SHA-256 as its blocks are read. One that was interrupted goes on after the shards
    that are done.

    Args:
      place: the folder or the address of the cache.
      bar: called with numbers of bytes that are done.

    Raises:
      FileNotFoundError: there is no cache.
      CacheCorruptError: a file is not what the manifest says.
      OSError: a file cannot be read or written.
    """
    place = os.fspath(place)
    manifest = read_manifest(place)
    with contextlib.suppress(FileNotFoundError, CacheCorruptError):
        BlockFolder(place, of=manifest["content"])
        return False
    entries, groups = blocks.entries_of(manifest["shards"]), blocks.groups_of(manifest["shards"])

    def add(table: str) -> None:
        sizes = groups[table]
        wanted = sum(itertools.starmap(blocks.table_bytes, sizes.items()))
        with contextlib.suppress(FileNotFoundError):
            if len(paths.read(paths.join(place, table))) == wanted:
                return
        blocks.write_table(place, table, sizes, entries)

    with concurrent.futures.ThreadPoolExecutor(blocks.THREADS) as pool:
        for table, _ in zip(groups, pool.map(add, groups), strict=True):
            bar(sum(groups[table].values()))
    blocks.write_index(place, groups, of=manifest["content"])
    return True
