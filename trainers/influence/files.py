"""Stages of arrays on disk: safetensors with a checksum and a record, written whole or not at all."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from model.hf.files.safetensors_files import (
    SINGLE,
    SafetensorsReader,
    SafetensorsWriter,
    WeightFileError,
    read_json,
)
from trainers.checkpoints import agreement, manifest, state_tree
from trainers.influence import spread

RECORD = "record.json"
_OWN = "record_sha256"
_SHARD_BYTES = 1 << 60


class StageError(ValueError):
    """A stage that is missing, damaged, or of another model."""


def write(
    folder: pathlib.Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> None:
    """Writes arrays by name and a record of JSON values; a folder that exists is replaced once all is written.

    Every process must call it, with the same values; it returns once the folder is whole.
    """
    if agreement.is_primary():
        _write(folder, arrays, record)
    agreement.gather("written")  # other processes read what the first has written


def _write(
    folder: pathlib.Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> None:
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(fresh, layout, shard_bytes=_SHARD_BYTES) as writer:
        for name, array in arrays.items():
            # A scalar has no rows.
            writer.write(name, array)
    # Through JSON, as `read` sees them.
    full = json.loads(json.dumps({**record, "sha256": _checksum(fresh / SINGLE)}))
    full[_OWN] = _record_checksum(full)
    with open(fresh / RECORD, "w", encoding="utf-8") as file:
        file.write(json.dumps(full, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    old = _set_aside(folder)
    if folder.exists():
        # A folder with files cannot be replaced in one call: `exists` undoes a stop between these two.
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.old")


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays by name and the record.

    Raises:
      StageError: the folder is missing or damaged.
    """
    try:
        record = read_record(folder)
        with SafetensorsReader(folder) as reader:
            if _checksum(folder / SINGLE) != record.get("sha256"):
                raise StageError(
                    f"{folder / SINGLE} is damaged: its checksum is not the recorded one. Delete {folder} and run the "
                    "command again."
                )
            return {name: reader.read(name) for name in reader.tensors}, record
    except WeightFileError as error:
        raise StageError(
            f"{folder} is missing or damaged. Delete it and run the command again. ({error})"
        ) from None


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the record alone; raises StageError if it is damaged, WeightFileError if there is none."""
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


def by_site(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Returns arrays named 'path:kind' as {path: {kind: array}}."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        path, _, kind = name.rpartition(":")
        result.setdefault(path, {})[kind] = array
    return result


def named(by_site: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns {path: {kind: array}} as arrays on the host named 'path:kind'; the inverse of `by_site`."""
    return {
        f"{path}:{kind}": array
        for path, kinds in spread.on_host(by_site).items()
        for kind, array in kinds.items()
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


def _checksum(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
