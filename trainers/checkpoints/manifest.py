"""Checksums of a checkpoint: a digest of each array in memory, and a checksum of each file on disk.

The digest of an array is linear in its elements, so it does not depend on how a mesh splits the array:
each process sums over its own blocks, and the sums are added.

    digest(x) = sum_ij.. word(x[i, j, ..]) * key_0[i] * key_1[j] * ..   (mod 2^64)

A word is the bit pattern of an element (at most 32 bits; wider elements are split along one more axis,
a scalar counts as an array of one element) and the keys are odd pseudo-random 64-bit numbers. Products
of odd numbers are odd, and an odd number times 2^b with b < 64 is not 0 mod 2^64: one flipped bit always
changes the digest. Other damage, such as swapped rows or zeroed blocks, goes unnoticed with a
probability of about 2^-32.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from espalier.common.storage import paths

# Limits the memory of the cached keys; longer axes are contracted in pieces.
_KEYS_AT_ONCE = 1 << 18
_READ_BYTES = 1 << 22
_MODULUS = 1 << 64
_VERSION = 1

# (start indices of a block in the whole array, values of the block).
Block = tuple[tuple[int, ...], np.ndarray]


class DamagedCheckpointError(ValueError):
    """Files or arrays of a checkpoint are damaged.

    Attributes:
      files: problems by path below the step directory.
      arrays: names of the arrays known to be damaged.
    """

    def __init__(self, path: Any, files: Mapping[str, str], arrays: Iterable[str] = ()):
        self.files = dict(files)
        self.arrays = tuple(arrays)
        parts = [f"{name} {problem}" for name, problem in sorted(self.files.items())]
        parts += [f"array {name}" for name in self.arrays]
        more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
        super().__init__(
            f"checkpoint {path} is damaged: {'; '.join(parts[:4])}{more}. "
            "Use an earlier step or another copy of it."
        )


@functools.lru_cache(maxsize=64)
def _keys(axis: int, start: int, stop: int) -> np.ndarray:
    """Returns odd 64-bit keys of the indices [start, stop) of an axis: splitmix64 of (axis, index)."""
    key = np.arange(start, stop, dtype=np.uint64) + np.uint64((axis + 1) << 48)
    key *= np.uint64(0x9E3779B97F4A7C15)
    key ^= key >> np.uint64(30)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(27)
    key *= np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    return key | np.uint64(1)


def _words(values: np.ndarray) -> np.ndarray:
    """Returns bit patterns as unsigned integers of at most 32 bits."""
    values = np.ascontiguousarray(values)
    if values.itemsize in (1, 2, 4):
        return values.view(f"u{values.itemsize}")
    return values.view(np.uint32).reshape(*values.shape, values.itemsize // 4)


def block_digest(values: np.ndarray, start: Sequence[int]) -> int:
    """Returns the summand of the block at index `start` in the digest of the whole array."""
    if values.size == 0:
        return 0
    sums = _words(values)
    start = [*start, *[0] * (sums.ndim - len(start))]
    for axis in reversed(range(sums.ndim)):
        rows = sums.reshape(-1, sums.shape[axis])
        total = np.zeros(len(rows), np.uint64)
        for low in range(0, rows.shape[1], _KEYS_AT_ONCE):
            piece = rows[:, low : low + _KEYS_AT_ONCE]
            low += start[axis]
            keys = _keys(axis, low, low + piece.shape[1])
            total += np.einsum("ij,j->i", piece, keys, dtype=np.uint64, casting="unsafe")
        sums = total.reshape(sums.shape[:axis])
    return int(sums)


def owned_blocks(array: jax.Array) -> list[Block]:
    """Returns, as host arrays, the blocks whose first replica is on this process.

    The blocks of all processes cover the array exactly once. On CPU they are views, which stay valid and
    unchanged even if the array is donated to a later step.
    """
    return [
        (tuple(part.start or 0 for part in shard.index), np.asarray(shard.data))
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]


def digests(blocks: Mapping[str, Sequence[Block]]) -> dict[str, int]:
    """Returns this process's summand of the digest of each array."""

    def share(parts: Sequence[Block]) -> int:
        return sum(block_digest(values, start) for start, values in parts) % _MODULUS

    with concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="digest") as pool:
        return dict(zip(blocks, pool.map(share, blocks.values()), strict=True))


def add_digests(shares: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Returns the digests of whole arrays from the summands of all processes."""
    total: dict[str, int] = {}
    for share in shares:
        for name, value in share.items():
            total[name] = (total.get(name, 0) + value) % _MODULUS
    return total


def file_checksum(path: epath.Path) -> tuple[int, str]:
    """Returns the size in bytes and the CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            size += len(data)
            crc = zlib.crc32(data, crc)
    return size, f"{crc:08x}"


def is_inside(directory: epath.Path, name: str) -> bool:
    """Returns whether a file of a step is a regular file in its directory; raises FileNotFoundError if there is none."""
    if paths.is_remote(directory):  # an object store has no links
        return ".." not in name.split("/")
    path = os.path.join(directory, name)
    inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(directory), ""))
    return inside and stat.S_ISREG(os.stat(path).st_mode)


def unlisted(directory: epath.Path, files: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    """Returns the problem of each file or link below `state` that the manifest does not list."""
    problems = {}
    for folder, folders, names in os.walk(directory / "state"):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            below = os.path.relpath(path, directory)
            if os.path.islink(path):
                problems[below] = "is a link"
            elif name in names and below not in files:
                problems[below] = "is not in the manifest"
    return {"state": "is a link"} if os.path.islink(directory / "state") else problems


def check_files(directory: epath.Path, files: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    """Returns the problem of each file that differs from its record; empty if no file differs."""

    def problem(name: str) -> str | None:
        size, crc = files[name]
        try:
            if not is_inside(directory, name):
                return "is not a file of the checkpoint itself"
            size_on_disk, crc_on_disk = file_checksum(directory / name)
        except FileNotFoundError:
            return "is missing"
        except (OSError, ValueError) as error:  # ValueError: a name that no path can have
            return f"cannot be read ({error})"
        if size_on_disk != size:
            return f"has {size_on_disk} bytes instead of {size}"
        return None if crc_on_disk == crc else "does not match its checksum"

    with concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="checksum") as pool:
        problems = zip(files, pool.map(problem, files), strict=True)
        return {name: text for name, text in problems if text}


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """The record of one array."""

    shape: tuple[int, ...]
    dtype: str
    digest: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def _shape(name: str, entry: Mapping[str, Any]) -> tuple[int, ...]:
    sizes = entry["shape"]
    if not isinstance(sizes, list) or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise ValueError(f"array {name} has the shape {sizes!r}")
    return tuple(sizes)


def _dtype(name: str, entry: Mapping[str, Any]) -> str:
    text = entry["dtype"]
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError):
        dtype = None
    is_number = dtype is not None and any(jnp.issubdtype(dtype, x) for x in (np.number, np.bool_))
    if dtype is None or dtype.name != text or not is_number:
        raise ValueError(f"array {name} has the dtype {text!r}")
    return text


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The arrays and files of one step; writing it commits the step."""

    arrays: Mapping[str, ArrayEntry]
    files: Mapping[str, tuple[int, str]]

    def use_ema(self, params: str) -> bool:
        """Returns whether to read the averaged parameters: 'raw', 'ema', or 'auto' for 'ema' if they are saved."""
        saved = any(name.startswith("ema_params/") for name in self.arrays)
        return params == "ema" or (params == "auto" and saved)

    def params(self, params: str) -> tuple[str, dict[str, ArrayEntry]]:
        """Returns the root of the parameters ('params/' or 'ema_params/'; see `use_ema`), and their entries.

        The entries are by path below the root; empty if the step has no such parameters.
        """
        root = "ema_params/" if self.use_ema(params) else "params/"
        arrays = self.arrays.items()
        return root, {name.removeprefix(root): x for name, x in arrays if name.startswith(root)}

    def to_bytes(self) -> bytes:
        """Returns the manifest as JSON, with a checksum of its contents."""
        arrays = {
            name: {"shape": list(x.shape), "dtype": x.dtype, "digest": f"{x.digest:016x}"}
            for name, x in self.arrays.items()
        }
        files = {name: list(entry) for name, entry in self.files.items()}
        body = {"version": _VERSION, "arrays": arrays, "files": files}
        text = json.dumps(body, sort_keys=True).encode()
        body["checksum"] = hashlib.blake2b(text, digest_size=16).hexdigest()
        return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Parses a manifest; raises ValueError unless the bytes are a result of `to_bytes`."""
        try:
            body = json.loads(data)
            if body["version"] != _VERSION:
                raise ValueError(f"version {body['version']} is not {_VERSION}")
            arrays = {
                name: ArrayEntry(_shape(name, x), _dtype(name, x), int(x["digest"], 16))
                for name, x in body["arrays"].items()
            }
            manifest = cls(
                arrays, {name: (size, crc) for name, (size, crc) in body["files"].items()}
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"is not a manifest ({type(error).__name__}: {error})") from error
        if manifest.to_bytes() != data:
            raise ValueError("does not match its checksum")
        return manifest
