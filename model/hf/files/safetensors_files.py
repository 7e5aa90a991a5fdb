"""Reads and writes regions of tensors in safetensors checkpoints on disk.

The safetensors library checks each file's header. It reads whole tensors through a memory map; here
regions are read at their offsets instead, so that only the requested data are in memory, and bfloat16
and 8-bit floats can be read too.

The format: eight bytes with the length of the header, the header as JSON of {name: {dtype, shape,
data_offsets}}, then the data. A checkpoint of several files has an index, {"weight_map": {name: file}}.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from espalier.common import checkpoint_files
from espalier.common.checkpoint_files import CheckpointFileError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER = 100_000_000  # bytes; the library's own limit
_MAX_JSON = 64 << 20  # bytes of config.json or an index
_MAX_DIMENSIONS = 32  # NumPy's limit is 64
_READ_BYTES = 1 << 26  # largest single read; the system limits a read to 2 GiB

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Dtype, shape and place of a tensor: `offset` bytes into `file`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: pathlib.Path
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


class TensorReader(contextlib.AbstractContextManager):
    """Tensors that are read whole or by rows; `tensors` has their shapes and dtypes by name."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a new array."""
        values = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_into(name, 0, values)
        return values

    def read_into(self, name: str, start: int, into: np.ndarray) -> None:
        """Fills a contiguous array with a tensor's rows from `start` on."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the files."""

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class SafetensorsReader(TensorReader):
    """The tensors of a directory.

    Args:
      directory: directory with an index and several files, or one file.
      single: name of that file.

    Raises:
      CheckpointFileError: there are no weights or only pickled ones, the index refers to a file outside
        the directory, or a file is damaged.
    """

    def __init__(self, directory: str | os.PathLike, *, single: str = SINGLE):
        self.directory = pathlib.Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._descriptors: dict[pathlib.Path, int] = {}
        for file, names in _files(self.directory, single).items():
            header = _read_header(file)
            if missing := sorted(set(names or header) - set(header)):
                raise CheckpointFileError(
                    f"{file} lacks {missing[0]}, which {INDEX} lists for this file. The checkpoint is "
                    "incomplete or mixed from two: copy it again."
                )
            self.tensors.update({name: header[name] for name in names or header})
        for file in {info.file for info in self.tensors.values()}:
            self._descriptors[file] = os.open(file, os.O_RDONLY)

    def read_into(self, name: str, start: int, into: np.ndarray) -> None:
        """Fills a contiguous array with a tensor's rows from `start` on. Thread-safe.

        Raises:
          CheckpointFileError: the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        width = math.prod(info.shape[1:]) if info.shape else 0
        self.read_values(name, start * width, into)

    def read_values(self, name: str, start: int, into: np.ndarray) -> None:
        """Fills a contiguous array with a flattened tensor's values from `start` on; see `read_into`."""
        info = self.tensors[name]
        data = into.reshape(-1).view(np.uint8)
        position, offset = 0, info.offset + start * info.dtype.itemsize
        while position < data.size:
            part = data[position : position + _READ_BYTES]
            count = os.preadv(self._descriptors[info.file], [part.data], offset + position)
            if not count:
                raise CheckpointFileError(f"{info.file} has been cut short since it was opened.")
            position += count

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      CheckpointFileError: the file is missing, a link out of its directory, too long, or not a JSON object.
    """
    if not os.path.lexists(path):
        raise CheckpointFileError(
            f"{path} is missing: give the directory of a Hugging Face checkpoint, as "
            "save_pretrained or a download of the whole repository writes it."
        )
    return checkpoint_files.read_json(path.parent, path.name, max_bytes=_MAX_JSON)


def _files(directory: pathlib.Path, single: str) -> dict[pathlib.Path, list[str] | None]:
    """Returns each weight file with the tensor names to read from it; None for all of its tensors."""
    alone = os.path.lexists(directory / single)
    if os.path.lexists(directory / INDEX) and not (alone and single != SINGLE):
        names = read_json(directory / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointFileError(f"{directory / INDEX} has no 'weight_map': copy it again.")
        files: dict[pathlib.Path, list[str]] = {}
        paths = {file: _inside(directory, file) for file in set(map(_text, names.values()))}
        if alone and single not in paths:
            raise CheckpointFileError(
                f"{directory} has {INDEX} and {single}, which it does not name: readers differ in which of the two they take. "
                "Remove the one that is not the model."
            )
        for name, file in names.items():
            files.setdefault(paths[file], []).append(name)
        return dict(files)
    if alone:
        return {_inside(directory, single): None}
    if not directory.is_dir():
        raise CheckpointFileError(
            f"{directory} is not a directory: give the directory of a checkpoint."
        )
    pickled = sorted(p.name for p in directory.iterdir() if _is_pickled(p.name))
    if pickled:
        raise CheckpointFileError(
            f"{directory} has its weights in {pickled[0]}, a pickle, which runs code when it is "
            "read. If you trust it, convert it with transformers: AutoModelForCausalLM"
            ".from_pretrained(...).save_pretrained(..., safe_serialization=True)."
        )
    raise CheckpointFileError(
        f"{directory} has no weights: give a directory with {single} or {INDEX}."
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _is_pickled(name: str) -> bool:
    return name.endswith(_PICKLED) or name.endswith(".bin.index.json")


def _inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file directly in the directory; links may not leave the checkpoint."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointFileError(
            f"{directory / INDEX} names the file {name[:200]!r}, which is not a plain name in its own "
            "directory. Do not use this checkpoint, or correct the index."
        )
    if (target := checkpoint_files.resolve(directory, name)) is None:
        raise CheckpointFileError(
            f"{directory}: {name[:200]!r} is missing: copy the checkpoint again."
        )
    return target


def _read_header(file: pathlib.Path) -> dict[str, TensorInfo]:
    try:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _MAX_HEADER:
                raise ValueError(f"its header of {size} bytes is too long")
            with safetensors.safe_open(file, framework="numpy"):
                pass  # Opening checks all offsets against shapes, each other and the file's size.
            header = json.loads(stream.read(size))
            length = os.fstat(stream.fileno()).st_size
        header.pop("__metadata__", None)
        return {name: _info(file, name, entry, 8 + size, length) for name, entry in header.items()}
    except CheckpointFileError:
        raise
    except (
        *(safetensors.SafetensorError, ValueError, RecursionError, OSError),
        *(AttributeError, KeyError, TypeError),
    ) as error:
        raise CheckpointFileError(
            f"{file} is damaged or not a safetensors file ({error}). Copy or download it again."
        ) from None


def _info(
    file: pathlib.Path, name: str, entry: Mapping[str, Any], base: int, length: int
) -> TensorInfo:
    """Returns the dtype, shape and place of a tensor, checked against the length of the file.

    The library has checked the same, but may read a key that the header has twice otherwise.
    """
    if entry["dtype"] not in DTYPES:
        raise CheckpointFileError(
            f"{file}: {name} has dtype {entry['dtype']}, which is not supported. Save it in one of "
            f"{', '.join(DTYPES)}."
        )
    dtype, shape, (start, end) = (
        DTYPES[entry["dtype"]],
        tuple(entry["shape"]),
        entry["data_offsets"],
    )
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions; at most {_MAX_DIMENSIONS} are read")
    if min((0, start, *shape)) < 0 or start + math.prod(shape) * dtype.itemsize != end:
        raise ValueError(f"the bytes {start} to {end} of {name} do not fit its shape")
    if base + end > length:
        raise ValueError(f"{name} ends after the file")
    return TensorInfo(dtype, shape, file, base + start)


class SafetensorsWriter(contextlib.AbstractContextManager):
    """Writes a checkpoint: the layout is fixed at the start, and tensors are written in any order.

    Args:
      directory: the directory of the new files.
      tensors: (dtype, shape) by name, in the order in which they are stored.
      shard_bytes: maximum data per file, unless a single tensor is larger; None for one file.
      single: name of the file, if it is one.
      again: continue the files of an earlier writer with the same arguments, where they are.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        *,
        shard_bytes: int | None = None,
        single: str = SINGLE,
        again: bool = False,
    ):
        self.directory = pathlib.Path(directory)
        self._again = again
        self.tensors: dict[str, TensorInfo] = {}
        self._descriptors: dict[pathlib.Path, int] = {}
        shards = list(_shards(tensors, shard_bytes))
        for number, names in enumerate(shards, 1):
            file = single
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(self.directory / file, {name: tensors[name] for name in names})
        if len(shards) > 1:
            total = sum(info.nbytes for info in self.tensors.values())
            names_to_files = {name: info.file.name for name, info in sorted(self.tensors.items())}
            index = {"metadata": {"total_size": total}, "weight_map": names_to_files}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: pathlib.Path, tensors: Mapping[str, Any]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        infos, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            infos[name] = TensorInfo(np.dtype(dtype), tuple(shape), file, end)
            start, end = end, end + infos[name].nbytes
            code = _CODES[np.dtype(dtype)]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        for name, info in infos.items():
            self.tensors[name] = dataclasses.replace(info, offset=base + info.offset)
        new = 0 if self._again else os.O_CREAT | os.O_EXCL
        descriptor = os.open(file, os.O_RDWR | new, 0o644)
        self._descriptors[file] = descriptor
        os.write(descriptor, len(text).to_bytes(8, "little") + text)
        # Allocate now, so that a full disk is an error before any weights are written.
        os.posix_fallocate(descriptor, 0, max(base + end, 1))

    def write(self, name: str, values: np.ndarray, row: int = 0) -> None:
        """Writes a tensor, or some of its rows from `row` on."""
        info = self.tensors[name]
        if values.dtype != info.dtype or values.shape[1:] != info.shape[1:]:
            raise ValueError(f"{name} is {info}, not {values.dtype}{list(values.shape)}")
        self.write_values(name, values, row * math.prod(info.shape[1:]))

    def write_values(self, name: str, values: np.ndarray, start: int) -> None:
        """Writes values of the tensor's dtype into the flattened tensor from `start` on."""
        info = self.tensors[name]
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        position, offset = 0, info.offset + start * info.dtype.itemsize
        while position < data.size:
            part = data[position : position + _READ_BYTES].data
            position += os.pwrite(self._descriptors[info.file], part, offset + position)

    def flush(self) -> None:
        """Flushes the files to disk."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Flushes the files to disk and closes them."""
        self.flush()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _shards(tensors: Mapping[str, Any], shard_bytes: int | None) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if names and shard_bytes is not None and total + size > shard_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names
