"""The files of a token cache: written whole or not at all, checked by SHA-256, and mapped into memory as ragged columns."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Self

import numpy as np

from espalier.common import files


def feature_dtype(kind: int | str) -> np.dtype:
    """Returns the stored dtype of a feature: a vocabulary size for tokens, 'text' or 'float32'.

    Raises:
        ValueError: any other kind.
    """
    if kind == "text":
        return np.dtype("u1")
    if kind == "float32":
        return np.dtype("<f4")
    if not isinstance(kind, int) or not 0 < kind <= 2**32:
        raise ValueError(f"The feature is {kind!r}; give a vocabulary size, 'text' or 'float32'.")
    return np.dtype("<u2") if kind <= 2**16 else np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class Column:
    """The concatenated values of all records, as one array per shard of the cache."""

    shards: list[np.ndarray]  # the values of each shard, memory-mapped
    # int64 [shards + 1], the index of the first value of each shard, and the total
    bounds: np.ndarray
    lengths: np.ndarray  # uint32 [records], the number of values of each record
    starts: np.ndarray  # int64 [records], the index of the first value of each record

    @classmethod
    def open(cls, stems: Sequence[pathlib.Path], dtype: np.dtype) -> "Column":
        """Maps `<stem>.bin` and reads `<stem>.len` for every stem."""
        shards = _mapped(stems, dtype)
        lengths = np.concatenate(
            [np.fromfile(stem.with_name(stem.name + ".len"), "<u4") for stem in stems]
        )
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        bounds = np.cumsum([0] + [len(shard) for shard in shards], dtype=np.int64)
        return cls(shards, bounds, lengths, starts)

    def mapped(self, stems: Sequence[pathlib.Path], dtype: np.dtype) -> "Column":
        """Returns the same column with the values of `<stem>.bin` mapped."""
        return Column(_mapped(stems, dtype), self.bounds, self.lengths, self.starts)

    def gather(
        self, begins: np.ndarray, lengths: np.ndarray, out: np.ndarray, at: np.ndarray
    ) -> None:
        """Copies values [begins, begins + lengths) to `out` from index `at` on, for every range.

        Each range must lie in one shard; `out` is flat. Slices are copied in a Python loop; from about
        a hundred values per slice on, copying dominates the time.
        """
        # An empty range may begin after the last value, which lies in no shard.
        nonempty = lengths > 0
        begins, lengths, at = begins[nonempty], lengths[nonempty], at[nonempty]
        shard_of = np.searchsorted(self.bounds, begins, side="right") - 1
        begins = begins - self.bounds[shard_of]
        shards = self.shards
        for shard, begin, length, to in zip(
            shard_of.tolist(), begins.tolist(), lengths.tolist(), at.tolist(), strict=True
        ):
            out[to : to + length] = shards[shard][begin : begin + length]

    def sums(self, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns the sum of values [begins, begins + lengths) of every range, float64; each must lie in one shard."""
        sums = np.zeros(len(begins))
        shard_of = np.searchsorted(self.bounds, begins, side="right") - 1
        for index, shard in enumerate(self.shards):
            here = (shard_of == index) & (lengths > 0)
            begin = begins[here] - self.bounds[index]
            totals = np.concatenate([[0], np.cumsum(shard, dtype=np.float64)])
            sums[here] = totals[begin + lengths[here]] - totals[begin]
        return sums

    def values(self, record: int) -> np.ndarray:
        """Returns all values of one record."""
        out = np.empty(int(self.lengths[record]), self.shards[0].dtype)
        if len(out):
            self.gather(self.starts[[record]], self.lengths[[record]], out, np.zeros(1, np.int64))
        return out

    def text(self, record: int) -> str:
        """Returns the string of one record of a 'text' feature."""
        return self.values(record).tobytes().decode("utf-8", "replace")


def _mapped(stems: Sequence[pathlib.Path], dtype: np.dtype) -> list[np.ndarray]:
    return [mapped(stem.with_name(f"{stem.name}.bin"), dtype) for stem in stems]


def mapped(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    """Returns the values of a file, mapped into memory."""
    # An empty file cannot be mapped. Slicing an ndarray view is twice as fast as slicing a memmap.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    # Of a text, unlike of a path, NumPy does not look for links, which takes as long as the mapping.
    return np.asarray(np.memmap(os.fspath(path), dtype, mode="r"))


Record = Mapping[str, np.ndarray | bytes | str]


class CacheCorruptError(ValueError):
    """Files of a cache are missing, truncated, altered or foreign."""


def canonical(value) -> bytes:
    """Returns the canonical JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


class ShardWriter:
    """Writes the files of one shard under temporary names and publishes them when complete. A context manager.

    Values are checked, converted and written for many records at once.

    Args:
      building: the folder.
      shard: its number.
      features: feature -> vocabulary size, 'text' or 'float32'.
      where: the shard and its cache, at the beginning of the message if a file cannot be written.
      report: called with numbers of values that were written since the last call.
    """

    def __init__(
        self,
        building: pathlib.Path,
        shard: int,
        features: Mapping[str, int | str],
        *,
        where: str,
        report: Callable[[int], None] = lambda values: None,
    ):
        self._building, self._shard, self._where, self._report = building, shard, where, report
        self._columns = {
            feature: _ColumnWriter(feature, kind, f"of shard {shard}")
            for feature, kind in features.items()
        }
        self._waiting = 0  # values that are not written yet
        self._whole = contextlib.ExitStack()
        with writing(self._where):
            for column in self._columns.values():
                column.file = self._whole.enter_context(
                    # Synced, as all files of a shard: it is not built again once its entry is there.
                    files.replacing(self._path(f"{column.name}.bin"), synced=True)
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._whole.__exit__(*error)

    def append(self, record: Record) -> None:
        """Adds one record; raises ValueError if a value does not fit its feature, and OSError."""
        for column in self._columns.values():
            self._waiting += column.append(record)
        if self._waiting >= _BATCH_VALUES:
            self._write()

    def finish(self) -> dict:
        """Publishes the shard and returns its entry for the manifest; raises as `append`."""
        self._write()
        columns = self._columns.values()
        sizes = {column.name: column.file.tell() for column in columns}
        with writing(self._where):
            self._whole.close()
            entries = {}
            for column in columns:
                lengths = self._path(f"{column.name}.len")
                content = np.concatenate([*column.lengths, np.empty(0, "<u4")]).tobytes()
                files.write(lengths, content, synced=True)
                entries[self._path(f"{column.name}.bin").name] = [
                    sizes[column.name],
                    column.checksum.hexdigest(),
                ]
                entries[lengths.name] = file_entry(content)
            entry = {
                "records": next(iter(columns)).records,
                "values": {column.name: column.values for column in columns},
                "text_bytes": {column.name: column.text_bytes for column in columns},
                "files": entries,
            }
            files.write(self._path("json"), canonical(entry), synced=True)
        return entry

    def _write(self) -> None:
        with writing(self._where):
            self._report(sum(column.write() for column in self._columns.values()))
        self._waiting = 0

    def _path(self, suffix: str) -> pathlib.Path:
        return self._building / f"{self._shard:05d}.{suffix}"


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Context manager: an OSError of its body names what cannot be written, and the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{what} cannot be written ({error.strerror or error}). Free some space, allow writing, or set cache_dir or "
            "$ESPALIER_CACHE to another disk; finished shards are kept, and the same command goes on after them",
        ) from error


_BATCH_VALUES = 1 << 17  # written at once


class _ColumnWriter:
    """Collects the values of one feature, and writes them."""

    file: BinaryIO

    def __init__(self, name: str, kind: int | str, where: str):
        self.name = name
        self.checksum = hashlib.sha256()
        self.records = self.values = 0  # that are written
        self.text_bytes: int | None = 0
        self.lengths: list[np.ndarray] = []
        self._kind, self._where, self._dtype = kind, where, feature_dtype(kind)
        self._text = f"{name}_pretokenized"
        self._waiting: list[Any] = []

    def append(self, record: Record) -> int:
        """Adds a record; returns the number of its values."""
        if self._kind == "text":
            value: Any = _text(self.name, record.get(self.name, b""))
        else:
            value = np.asarray(record.get(self.name, ()))
            if value.ndim != 1:
                raise ValueError(
                    f"Feature {self.name!r} has shape {value.shape}; a vector is needed."
                )
        self._waiting.append(value)
        if self.text_bytes is not None:
            size = _text_size(record.get(self._text))
            self.text_bytes = None if size is None else self.text_bytes + size
        return len(value)

    def write(self) -> int:
        """Writes what was added since the last call; returns its number of values, 0 for texts."""
        lengths = np.fromiter(map(len, self._waiting), "<u4", len(self._waiting))
        if self._kind == "text":
            data = b"".join(self._waiting)
        else:
            data = self._converted(lengths).tobytes()
        self.file.write(data)
        self.checksum.update(data)
        count = int(lengths.sum(dtype=np.int64))
        self.lengths.append(lengths)
        self.values += count
        self.records += len(lengths)
        self._waiting = []
        return 0 if self._kind == "text" else count

    def _converted(self, lengths: np.ndarray) -> np.ndarray:
        # An empty list is an array of floats, which would make floats of all.
        filled = [value for value in self._waiting if len(value)]
        values = np.concatenate(filled) if filled else np.empty(0, self._dtype)
        if isinstance(self._kind, int) and len(values):
            low, high = values.min(), values.max()
            if low < 0 or high >= self._kind:
                at = int(np.argmax((values < 0) | (values >= self._kind)))
                record = self.records + int(np.searchsorted(np.cumsum(lengths), at, side="right"))
                raise ValueError(
                    f"Record {record} {self._where}: feature {self.name!r} has token {values[at]}, outside its "
                    f"vocabulary of {self._kind}. The feature's vocabulary is not the one that made the tokens."
                )
        return values.astype(self._dtype, copy=False)


def _text(feature: str, value) -> bytes:
    """Returns the UTF-8 bytes of a text, or of a number's digits (some sources number documents)."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int | float | np.number):
        return str(value).encode()
    raise ValueError(
        f"Feature {feature!r} is a {type(value).__name__}"
        f"{f' of shape {value.shape}' if isinstance(value, np.ndarray) else ''}; one string or "
        "number for each record is needed. Convert it in a preprocessor."
    )


def _text_size(text) -> int | None:
    """Returns the number of UTF-8 bytes of a `<feature>_pretokenized`; None if it is not a text."""
    if isinstance(text, str):
        return len(text.encode())
    return len(text) if isinstance(text, bytes) else None


def add_known(*counts: int | None) -> int | None:
    """Returns the sum of counts; None (unknown) if any count is None."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def file_entry(data: bytes) -> list:
    """Returns [size, checksum] of a file with this content."""
    return [len(data), hashlib.sha256(data).hexdigest()]


def finished_shard(building: pathlib.Path, shard: int, *, checked: bool = True) -> dict | None:
    """Returns the manifest entry of a shard that an interrupted build finished.

    Returns None if the shard is not finished or its files are damaged. Without `checked`, only their sizes are compared.
    """
    check = check_file if checked else check_size
    try:
        entry = json.loads((building / f"{shard:05d}.json").read_bytes())
        for name, (size, checksum) in entry["files"].items():
            check(building / name, size, checksum)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry


def check_size(path: pathlib.Path, size: int, checksum: str) -> None:
    del checksum
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise corrupt(path.parent, path.name, "is missing") from None
    if actual != size:
        raise corrupt(path.parent, path.name, f"has {actual} bytes instead of {size}")


def check_file(path: pathlib.Path, size: int, checksum: str) -> None:
    check_size(path, size, checksum)
    if files.sha256(path) != checksum:
        raise corrupt(path.parent, path.name, "does not match its checksum")


def corrupt(directory: pathlib.Path | str, name: str, what: str) -> CacheCorruptError:
    return CacheCorruptError(
        f"Token cache {directory}: {name} {what}. Delete the directory: it is built again at the "
        "next start, or now by `espalier prepare cache --replace`."
    )
