"""The files of a token cache: written whole or not at all, checked by SHA-256, and mapped into memory as ragged columns."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

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
        shards = [_map(stem.with_name(stem.name + ".bin"), dtype) for stem in stems]
        lengths = np.concatenate(
            [np.fromfile(stem.with_name(stem.name + ".len"), "<u4") for stem in stems]
        )
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        bounds = np.cumsum([0] + [len(shard) for shard in shards], dtype=np.int64)
        return cls(shards, bounds, lengths, starts)

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

    def values(self, record: int) -> np.ndarray:
        """Returns all values of one record."""
        out = np.empty(int(self.lengths[record]), self.shards[0].dtype)
        if len(out):
            self.gather(self.starts[[record]], self.lengths[[record]], out, np.zeros(1, np.int64))
        return out

    def text(self, record: int) -> str:
        """Returns the string of one record of a 'text' feature."""
        return self.values(record).tobytes().decode("utf-8", "replace")


def _map(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped. Slicing an ndarray view is twice as fast as slicing a memmap.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


Record = Mapping[str, np.ndarray | bytes | str]


class CacheCorruptError(ValueError):
    """Files of a cache are missing, truncated, altered or foreign."""


def canonical(value) -> bytes:
    """Returns the canonical JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


class ShardWriter:
    """Writes the files of one shard under temporary names and publishes them when complete."""

    def __init__(self, building: pathlib.Path, shard: int, features: Mapping[str, int | str]):
        self._building = building
        self._shard = shard
        self._features = features
        self._records = 0
        self._text_bytes: dict[str, int | None] = dict.fromkeys(features, 0)
        self._lengths: dict[str, list[int]] = {feature: [] for feature in features}
        self._whole = contextlib.ExitStack()
        self._files = {
            feature: self._whole.enter_context(
                # Synced, as all files of a shard: it is not built again once its entry is there.
                files.replacing(self._path(f"{feature}.bin"), synced=True)
            )
            for feature in features
        }
        self._hashes = {feature: hashlib.sha256() for feature in features}

    def append(self, record: Record) -> int:
        """Adds one record; returns the number of values written."""
        written = 0
        for feature, kind in self._features.items():
            values = self._encode(feature, kind, record.get(feature, b"" if kind == "text" else ()))
            data = values.tobytes()
            self._files[feature].write(data)
            self._hashes[feature].update(data)
            self._lengths[feature].append(len(values))
            text = record.get(f"{feature}_pretokenized")
            self._text_bytes[feature] = add_known(self._text_bytes[feature], _text_size(text))
            if kind != "text":
                written += len(values)
        self._records += 1
        return written

    def finish(self) -> dict:
        """Publishes the shard and returns its entry for the manifest."""
        sizes = {feature: file.tell() for feature, file in self._files.items()}
        self._whole.close()
        entries = {}
        for feature, size in sizes.items():
            values, lengths = self._path(f"{feature}.bin"), self._path(f"{feature}.len")
            entries[values.name] = [size, self._hashes[feature].hexdigest()]
            content = np.array(self._lengths[feature], "<u4").tobytes()
            files.write(lengths, content, synced=True)
            entries[lengths.name] = file_entry(content)
        entry = {
            "records": self._records,
            "values": {feature: sum(lengths) for feature, lengths in self._lengths.items()},
            "text_bytes": self._text_bytes,
            "files": entries,
        }
        files.write(self._path("json"), canonical(entry), synced=True)
        return entry

    def _path(self, suffix: str) -> pathlib.Path:
        return self._building / f"{self._shard:05d}.{suffix}"

    def _encode(self, feature: str, kind: int | str, value) -> np.ndarray:
        if kind == "text":
            return np.frombuffer(_text(feature, value), np.uint8)
        values = np.asarray(value)
        if values.ndim != 1:
            raise ValueError(f"Feature {feature!r} has shape {values.shape}; a vector is needed.")
        if isinstance(kind, int) and len(values):
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= kind:
                raise ValueError(
                    f"Record {self._records} of shard {self._shard}: feature {feature!r} has token "
                    f"{low if low < 0 else high}, outside its vocabulary of {kind}. The feature's "
                    "vocabulary is not the one that made the tokens."
                )
        return values.astype(feature_dtype(kind))


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


def finished_shard(building: pathlib.Path, shard: int) -> dict | None:
    """Returns the manifest entry of a shard that an interrupted build finished.

    Returns None if the shard is not finished or its files are damaged.
    """
    try:
        entry = json.loads((building / f"{shard:05d}.json").read_bytes())
        for name, (size, checksum) in entry["files"].items():
            check_file(building / name, size, checksum)
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
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != checksum:
        raise corrupt(path.parent, path.name, "does not match its checksum")


def corrupt(directory: pathlib.Path, name: str, what: str) -> CacheCorruptError:
    return CacheCorruptError(
        f"Token cache {directory}: {name} {what}. Delete the directory: it is built again at the "
        "next start, or now by `espalier prepare cache --replace`."
    )
