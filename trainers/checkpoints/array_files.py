"""The arrays of a step on disk: how they are stored, read onto shardings, and verified."""

import functools
import logging
import math
import os
import sys
import types
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from espalier.common import stages
from espalier.common.storage import paths
from espalier.trainers.checkpoints import agreement, manifest, state_tree, step_dir
from espalier.trainers.checkpoints.manifest import ArrayEntry, DamagedCheckpointError, Manifest

_ORBAX = f"{os.sep}orbax{os.sep}"


def handler() -> ocp.PyTreeCheckpointHandler:
    """Returns the Orbax handler of arrays: uncompressed, because weights hardly compress; one writer per element."""
    change_orbax()
    handler = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=False, enable_write_sharding_file=False, array_metadata_store=None
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
    """Returns the sharding of an abstract or concrete array; by default this process's first device."""
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def read_arrays(path: epath.Path, wanted: state_tree.Flat) -> state_tree.Flat:
    """Returns arrays by name; `wanted` must have their shapes and dtypes on disk.

    Raises:
      DamagedCheckpointError: it has not.
    """
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in wanted.values())
    with stages.stage(f"restoring {stages.size(size)} of {path}"):
        return _read_arrays(path, wanted)


def _read_arrays(path: epath.Path, wanted: state_tree.Flat) -> state_tree.Flat:
    _check_stored(path, wanted)
    arguments = {
        name: ocp.ArrayRestoreArgs(
            sharding=sharding_of(leaf), global_shape=leaf.shape, dtype=leaf.dtype
        )
        for name, leaf in wanted.items()
    }
    with ocp.Checkpointer(handler()) as reader:
        tree = reader.restore(
            path / step_dir.STATE,
            args=ocp.args.PyTreeRestore(
                item=state_tree.nest(wanted),
                restore_args=state_tree.nest(arguments),
                partial_restore=True,
            ),
        )
    return state_tree.flatten(tree)


def _check_stored(path: epath.Path, wanted: state_tree.Flat) -> None:
    """Raises DamagedCheckpointError if the files have other shapes or dtypes.

    Orbax would read an array with another dtype as if it were cast, and fail in the middle of others for a shape.
    """
    context = tensorstore.Context()  # shared, so that the index of the arrays is read once
    opening = {name: _open(path, name, context) for name in wanted}
    for name, leaf in wanted.items():
        try:
            store = opening[name].result()
        except Exception:  # of TensorStore; the caller searches for damaged arrays
            continue
        _check_layout(path, name, store, leaf)


def _check_layout(path: epath.Path, name: str, store: Any, leaf: Any) -> None:
    stored = f"{store.dtype.numpy_dtype.name}{list(store.shape)}"
    recorded = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    if stored != recorded:
        problem = f"has {recorded} for {name}, which is stored as {stored}"
        raise DamagedCheckpointError(path, {step_dir.MANIFEST: problem})


def open_array(path: epath.Path, name: str) -> Any:
    """Returns an array of a step as a TensorStore, opened without Orbax, to read regions."""
    return _open(path, name).result()


def _open(path: epath.Path, name: str, context: tensorstore.Context | None = None) -> Any:
    """Returns the future of a TensorStore."""
    state = path / step_dir.STATE
    kvstore = {
        "driver": "ocdbt",
        "base": paths.kvstore(state if paths.is_remote(state) else state.resolve()),
        "path": name.replace("/", ".") + "/",
    }
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, context=context)


def _damaged_arrays(path: epath.Path, recorded: Manifest) -> list[str]:
    """Returns the names of arrays that are unreadable or differ from their digests."""

    def is_good(name: str) -> bool:
        entry = recorded.arrays[name]
        try:
            values = open_array(path, name).read().result()
        except Exception:  # Any error of TensorStore means that the array is not readable.
            return False
        return manifest.block_digest(values, (0,) * values.ndim) == entry.digest

    share = sorted(recorded.arrays)[jax.process_index() :: jax.process_count()]
    shares = agreement.gather([name for name in share if not is_good(name)])
    return sorted(name for names in shares for name in names)


def read_verified(
    path: epath.Path, recorded: Manifest, wanted: state_tree.Flat, *, files: bool = True
) -> state_tree.Flat:
    """Returns arrays by name, after checks of every file of the step and of each array's digest.

    Args:
      files: whether to check the files; of several reads, the first does.

    Raises:
      DamagedCheckpointError: files or arrays are damaged.
    """
    # All processes agree that the files are good before any of them reads: if one process failed while
    # it reads, the other processes would wait for it.
    names = sorted(recorded.files)[jax.process_index() :: jax.process_count()] if files else []
    shares = agreement.gather(
        manifest.check_files(path, {name: recorded.files[name] for name in names})
    )
    problems = {name: text for part in shares for name, text in part.items()}
    if problems:
        raise DamagedCheckpointError(path, problems, _damaged_arrays(path, recorded))
    try:
        arrays = read_arrays(path, wanted)
    except DamagedCheckpointError:
        raise
    except Exception as error:
        if jax.process_count() > 1 or not (damaged := _damaged_arrays(path, recorded)):
            raise
        raise DamagedCheckpointError(path, {}, damaged) from error
    blocks = {name: manifest.owned_blocks(array) for name, array in arrays.items()}
    digests = manifest.add_digests(agreement.gather(manifest.digests(blocks)))
    damaged = [name for name in sorted(arrays) if digests[name] != recorded.arrays[name].digest]
    if damaged:
        raise DamagedCheckpointError(path, {}, damaged)
    return arrays


class StoredArray:
    """Reads regions of an array on disk; an array of one chunk is read once and cached in memory.

    `chunk` is the shape of the stored chunks.

    Raises:
      DamagedCheckpointError: shape or dtype are not those of `entry`.
    """

    def __init__(self, path: epath.Path, name: str, entry: ArrayEntry | None = None):
        self._store = open_array(path, name)
        if entry is not None:
            _check_layout(path, name, self._store, entry)
        self._whole: np.ndarray | None = None
        self.chunk: tuple[int, ...] = tuple(self._store.chunk_layout.read_chunk.shape or ())
        if all(a >= b for a, b in zip(self.chunk, self._store.shape, strict=True)):
            self._whole = self._store.read().result()

    def read(self, at: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> np.ndarray:
        """Returns the region at leading indices `at`, or its rows [start, stop)."""
        where: Any = (*at, slice(*rows)) if rows else (*at, ...)
        if self._whole is not None:
            return self._whole[where]
        return self._store[where].read().result()


@functools.cache
def change_orbax() -> None:
    """Changes what Orbax does in this process; once.

    Of a failed read or write, the error is raised once, to the caller, who reports it. Orbax also logs its traceback in each
    of its threads, leaves its other reads and writes to asyncio, which logs each of them, and closes the event loop that they
    report to.

    Orbax 0.12 knows gs:// and paths of files; it takes any other address for a relative path, also s3://, for which
    TensorStore has a driver. What it asks of an address are the functions of one module each, which are replaced here; for
    gs:// and for files they do what they did before.
    """
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(lambda record: _ORBAX not in record.getMessage())
    others = sys.unraisablehook

    def hook(raised: Any) -> None:
        if not _is_left_behind(raised):
            others(raised)

    sys.unraisablehook = hook
    # Steps on object stores end with a marker instead of a renaming.
    gcs_utils._GCS_PATH_PREFIX = paths.SCHEMES
    gcs_utils.get_kvstore_for_gcs = _kvstore
    tensorstore_utils._normalize_path = _plain
    tensorstore_utils._use_gcs_driver = paths.is_remote


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _ORBAX in record.pathname)


def _is_left_behind(raised: Any) -> bool:
    """Returns whether an exception without a caller is of a read or write whose error has been raised before."""
    task = raised.object
    if isinstance(task, types.CoroutineType):
        return _ORBAX in task.cr_code.co_filename
    error = raised.exc_value
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _plain(path: str) -> str:
    return paths.absolute(path) if paths.is_remote(path) else os.path.normpath(path)


def _kvstore(address: str) -> dict:
    spec = paths.kvstore(address)
    return {**spec, "path": spec["path"].rstrip("/")}
