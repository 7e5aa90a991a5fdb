"""Writes a step from arrays that are computed block by block, so no array is in memory whole.

The files are the same as from `Checkpointer`: Orbax's layout and metadata, the record, and a manifest with
a digest of each array. The digest is summed while the blocks are written. A save that was killed can go on (`Interrupted`).
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from espalier.common.storage import paths
from espalier.trainers.checkpoints import array_files, commit, manifest, state_tree, step_dir
from espalier.trainers.checkpoints.manifest import ArrayEntry, Block, Manifest

_BYTES_IN_FLIGHT = 16 << 20
_STORE = "ocdbt.process_0"  # where the arrays of one process are, in the folder of a save


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array that is computed while it is written.

    Attributes:
      shape, dtype: shape and dtype of the array.
      chunk: shape of the stored chunks. Blocks must begin and end at chunk boundaries.
      blocks: returns the blocks, which cover each element once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    blocks: Callable[[], Iterator[Block]]


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """The arrays that a killed save has written, which a save of the same arrays continues with.

    Attributes:
      store: their folder, see `take_store`; it becomes part of the new step. None to begin again.
      digests: of the arrays in it that are whole, by name.
      finished: called with the name and digest of each further array, once it is on the disk.
    """

    store: str | None = None
    digests: Mapping[str, int] = dataclasses.field(default_factory=dict)
    finished: Callable[[str, int], None] = lambda name, digest: None


def take_store(directory: str | os.PathLike, to: str) -> bool:
    """Moves the arrays of a killed save, and removes what else it has left.

    Args:
      directory: directory `checkpoints` of the run, with one step at most.
      to: folder to make; if it exists, an earlier call has made it, and the save was killed before it took it.

    Returns:
      Whether there are arrays.
    """
    for store in epath.Path(directory).glob(f"*/{step_dir.STATE}*/{_STORE}"):
        shutil.rmtree(to, ignore_errors=True)
        os.rename(store, to)
    shutil.rmtree(directory, ignore_errors=True)
    return os.path.isdir(to)


class _Handler(ocp.type_handlers.TypeHandler):
    """Orbax handler that writes `StreamedArray` leaves; Orbax writes the other files."""

    def __init__(self, interrupted: Interrupted) -> None:
        self._interrupted = interrupted
        self.digests: dict[str, int] = {}

    def typestr(self) -> str:
        return "jax.Array"  # Readers of the step see ordinary arrays.

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise TypeError("streamed arrays are only written")

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        raise TypeError("streamed arrays are only written")

    async def serialize(
        self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        before = self._interrupted
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            folder = info.parent_dir / _STORE
            if before.store is not None and not self.digests:
                os.rename(before.store, folder)
            digest = before.digests.get(info.name)
            if digest is None:
                digest = _write(paths.kvstore(folder), info.name, value)
                before.finished(info.name, digest)
            self.digests[info.name] = digest
        return []


def _write(base: Mapping[str, Any], name: str, array: StreamedArray) -> int:
    """Writes an array and returns its digest."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        "metadata": {
            "shape": array.shape,
            "chunks": [max(1, size) for size in array.chunk],
            "dtype": array.dtype.name if array.dtype.name == "bfloat16" else array.dtype.str,
            "compressor": None,
        },
        "store_data_equal_to_fill_value": True,
        "create": True,
        "delete_existing": True,  # a part, of a killed save
    }
    store = tensorstore.open(spec).result()
    digest, pending, size = 0, [], 0
    try:
        for start, values in array.blocks():
            where = tuple(slice(a, a + b) for a, b in zip(start, values.shape, strict=True))
            pending.append(store[where].write(values, can_reference_source_data_indefinitely=True))
            digest += manifest.block_digest(values, start)
            size += values.nbytes
            if size >= _BYTES_IN_FLIGHT:
                _await(pending)
                pending, size = [], 0
            del values
        _await(pending)
    except BaseException:
        # Pending writes would create files after the caller has removed the step.
        for write in pending:
            with contextlib.suppress(Exception):
                write.result()
        raise
    return digest


def _await(writes: Sequence[Any]) -> None:
    for write in writes:
        write.result()


def save(
    directory: str | os.PathLike,
    arrays: Mapping[str, StreamedArray],
    *,
    step: int = 0,
    meta: Mapping[str, Any] | None = None,
    interrupted: Interrupted | None = None,
) -> epath.Path:
    """Writes a step in one process, and returns its directory.

    Args:
      directory: directory `checkpoints` of a run.
      arrays: arrays by path, such as 'params/final_norm/scale'.
      step: number of the step.
      meta: JSON facts about the run.
      interrupted: what a killed save of these arrays has left, with the names that `finished` was called with.

    Raises:
      CheckpointSaveError: the disk is full or cannot be written.
    """
    array_files.change_orbax()
    path = step_dir.absolute(directory) / str(step)
    writer = _Handler(interrupted or Interrupted())
    # Orbax warns if this argument is missing.
    plain = ocp.type_handlers.ArrayHandler(array_metadata_store=None)
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, writer), (jax.Array, plain)
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    try:
        path.mkdir(parents=True)
        (path / step_dir.INCOMPLETE).touch()
        with ocp.Checkpointer(handler) as orbax:
            orbax.save(
                path / step_dir.STATE, args=ocp.args.PyTreeSave(item=state_tree.nest(arrays))
            )
        entries = {
            name: ArrayEntry(x.shape, x.dtype.name, writer.digests[name.replace("/", ".")] % 2**64)
            for name, x in arrays.items()
        }
        step_dir.write_record(path, {"step": step, "metrics": {}, "meta": dict(meta or {})})
        names = step_dir.file_names(path)
        files = {name: manifest.file_checksum(path / name) for name in names}
        step_dir.complete(path, Manifest(entries, files))
    except (OSError, ValueError, RuntimeError) as error:
        raise commit.save_error(path, error, []) from error
    return path
