"""Writing and checking of the files of a token cache, which are there whole or not at all. Checksums are SHA-256."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from espalier.common import files
from espalier.data.cache.columns import feature_dtype

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
