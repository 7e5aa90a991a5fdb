"""Stages of arrays on disk: safetensors with a checksum and a record, written whole or not at all."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from espalier.common import files
from espalier.common.checkpoint_files import CheckpointFileError
from espalier.model.hf.files.safetensors_files import (
    SINGLE,
    SafetensorsReader,
    SafetensorsWriter,
    read_json,
)
from espalier.trainers.checkpoints import agreement, manifest, state_tree
from espalier.trainers.influence import spread

RECORD = "record.json"
_OWN = "record_sha256"
_SHARD_BYTES = 1 << 60


class StageError(ValueError):
    """A stage that is missing, damaged, or of another model."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an open stage; indexing it reads only the values at the index.

    An index has whole numbers and slices without steps for the first dimensions.
    """

    reader: SafetensorsReader
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.tensors[self.name].shape

    @property
    def dtype(self) -> np.dtype:
        return self.reader.tensors[self.name].dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.reader.read(self.name), dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        if len(self.shape) < 2:
            return self.reader.read(self.name)[index]
        wanted = [*index] + [slice(None)] * (len(self.shape) - len(index))
        chosen = [
            range(size)[i] if isinstance(i, slice) else range(i, i + 1)
            for i, size in zip(wanted, self.shape, strict=True)
        ]
        *lead, rows, columns = chosen
        width = self.shape[-1]
        result = np.empty([len(one) for one in chosen], self.dtype)
        flat = result.reshape(math.prod(map(len, lead)), len(rows), len(columns))
        whole_rows = np.empty((len(rows), width), self.dtype)
        for n, place in enumerate(itertools.product(*lead)):
            first = 0
            for i, size in zip((*place, rows.start), self.shape[:-1], strict=True):
                first = first * size + i
            into = flat[n] if len(columns) == width else whole_rows
            self.reader.read_values(self.name, first * width, into)
            if into is whole_rows:
                flat[n] = whole_rows[:, columns.start : columns.stop]
        sizes = [len(o) for o, i in zip(chosen, wanted, strict=True) if isinstance(i, slice)]
        return result.reshape(sizes)


def write(
    folder: pathlib.Path,
    arrays: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    finish: Callable[[np.ndarray], np.ndarray] = lambda part: part,
) -> None:
    """Writes arrays by name and a record of JSON values; a folder that exists is replaced once all is written.

    Every process must call it; it returns once the folder is whole. Large arrays on devices are gathered by matrices.

    Args:
      finish: is applied to what is written, and keeps shapes and dtypes.
    """
    arrays = {n: x if isinstance(x, jax.Array) else np.asarray(x) for n, x in arrays.items()}
    pieces = (
        (name, start, finish(part)) for name, x in arrays.items() for start, part in spread.parts(x)
    )
    write_pieces(folder, {n: (x.dtype, x.shape) for n, x in arrays.items()}, pieces, record)


def write_pieces(
    folder: pathlib.Path,
    layout: Mapping[str, tuple[Any, tuple[int, ...]]],
    pieces: Iterable[tuple[str, int, np.ndarray]],
    record: Mapping[str, Any],
) -> None:
    """Writes pieces of tensors: (name, index of the first value in the flattened tensor, values); see `write`.

    Every process goes through all pieces; the first writes them.
    """
    if agreement.is_primary():
        fresh = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        with SafetensorsWriter(fresh, layout, shard_bytes=_SHARD_BYTES) as writer:
            for name, start, values in pieces:
                writer.write_values(name, values, start)
        # Through JSON, as `read` sees them.
        full = json.loads(json.dumps({**record, "sha256": files.sha256(fresh / SINGLE)}))
        full[_OWN] = _record_checksum(full)
        # Synced: the folder counts as whole once it has its record.
        files.write_json(fresh / RECORD, full, synced=True, ensure_ascii=True)
        old = _set_aside(folder)
        if folder.exists():
            # A folder with files cannot be replaced in one call: `exists` undoes a stop between these two.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        for _ in pieces:
            pass
    agreement.gather("written")  # other processes read what the first has written


def _set_aside(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.old")


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays by name and the record; raises the errors of `opened`."""
    with opened(folder) as (tensors, record):
        return {name: np.asarray(tensor) for name, tensor in tensors.items()}, record


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Yields the record and the tensors by name; a tensor's values are read when it is indexed.

    Raises:
      StageError: the folder is missing or damaged.
    """
    try:
        record = read_record(folder)
        with SafetensorsReader(folder) as reader:
            if files.sha256(folder / SINGLE) != record.get("sha256"):
                raise StageError(
                    f"{folder / SINGLE} is damaged: its checksum is not the recorded one. Delete {folder} and run the "
                    "command again."
                )
            yield {name: Tensor(reader, name) for name in reader.tensors}, record
    except CheckpointFileError as error:
        raise StageError(
            f"{folder} is missing or damaged. Delete it and run the command again. ({error})"
        ) from None


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """Returns only the record; raises StageError if it is damaged, CheckpointFileError if there is none."""
    record = read_json(folder / RECORD)
    # Stages of earlier versions have no checksum of the record.
    if record.get(_OWN, own := _record_checksum(record)) != own:
        raise StageError(
            f"{folder / RECORD} is damaged: its checksum is not the recorded one. Delete {folder} and run the "
            "command again."
        )
    return record


def exists(folder: pathlib.Path) -> bool:
    """Returns whether a stage was written whole. Every process must call it: all take the answer of the first."""
    whole = False
    if agreement.is_primary():
        old = _set_aside(folder)
        if not folder.exists() and (old / RECORD).is_file():  # a stop while it was replaced
            os.replace(old, folder)
        whole = (folder / RECORD).is_file()
    return agreement.gather(whole)[0]


def remove(folder: pathlib.Path) -> None:
    """Removes a stage, if it is there."""
    if agreement.is_primary():
        for each in (_set_aside(folder), folder):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(each)


def by_site(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns arrays named 'path:kind' as {path: {kind: array}}."""
    result: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        path, _, kind = name.rpartition(":")
        result.setdefault(path, {})[kind] = array
    return result


def named(by_site: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {path: {kind: array}} as arrays named 'path:kind'; the inverse of `by_site`."""
    return {
        f"{path}:{kind}": array for path, kinds in by_site.items() for kind, array in kinds.items()
    }


def model_digest(params: Any) -> str:
    """Returns a digest of all parameters, whatever mesh they are on. Every process must call it."""
    flat = state_tree.flatten(params)
    blocks = {name: manifest.owned_blocks(array) for name, array in flat.items()}
    own = {name: str(value) for name, value in manifest.digests(blocks).items()}
    shares = [{n: int(v) for n, v in share.items()} for share in agreement.gather(own)]
    total = manifest.add_digests(shares)
    lines = [f"{n} {flat[n].dtype} {list(flat[n].shape)} {total[n]}" for n in sorted(flat)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _record_checksum(record: Mapping[str, Any]) -> str:
    values = {name: value for name, value in record.items() if name != _OWN}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
