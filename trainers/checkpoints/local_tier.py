"""The local tier of a run's checkpoints: frequent saves on a disk of each host, beside the shared ones.

    <directory>/<run>-<digest of its path>/<token>.<process>of<processes>/<step>/

Each process writes and reads its own part without Orbax, the blocks that its devices hold, and nobody waits for another host:

    <step>/state/blocks.bin     the blocks, one after another
    <step>/state/blocks.json    {array: [[start, shape, offset in bytes], ...]}
    <step>/meta.json            the record, as in a shared step
    <step>/manifest.json        whole shapes and dtypes, digests of this process's blocks, checksums of the files

A step counts only if every process holds it, whole and verified, for the same number of processes. The shared directory
names the token of the start that wrote last; a start takes over the steps up to its own beginning under a new token. So no step is read that
a host kept of an earlier start, while the run went on elsewhere.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from espalier.common.ranges import Positive, Size
from espalier.trainers.checkpoints import agreement, manifest, restore, state_tree, step_dir
from espalier.trainers.checkpoints.array_files import sharding_of
from espalier.trainers.checkpoints.manifest import (
    ArrayEntry,
    Block,
    DamagedCheckpointError,
    Manifest,
)

_BLOCKS = f"{step_dir.STATE}/blocks.bin"
_PLACES = f"{step_dir.STATE}/blocks.json"
TOKEN = "local_tier.json"  # in the shared directory of steps: {"token", "directory"}
_log = logging.getLogger(__name__)


class LayoutError(ValueError):
    """The blocks of a step do not cover what this process's devices hold: it is of another mesh."""


def blocks_of(array: jax.Array) -> list[Block]:
    """Returns, as host arrays, what this process's devices hold of an array, each region once."""
    shards = {
        tuple(part.start or 0 for part in shard.index): shard for shard in array.addressable_shards
    }
    return [(start, np.asarray(shard.data)) for start, shard in shards.items()]


def write_local(
    path: epath.Path,
    record: Mapping[str, Any],
    entries: Mapping[str, ArrayEntry],
    blocks: Mapping[str, Sequence[Block]],
) -> None:
    """Writes and completes this process's part of a step.

    Args:
      path: the step directory; files of an interrupted save in it are replaced.
      record: the contents of meta.json.
      entries: shape and dtype of each whole array.
      blocks: results of `blocks_of` by array.

    Raises:
      OSError: a file could not be written; the step is incomplete.
    """
    (path / step_dir.STATE).mkdir(parents=True, exist_ok=True)
    (path / step_dir.INCOMPLETE).touch()
    places: dict[str, list[Any]] = {name: [] for name in blocks}
    end = crc = 0
    # Not synced: a step of which a power cut left a part does not match its checksums.
    with open(path / _BLOCKS, "wb") as file:
        for name, of_array in blocks.items():
            for start, values in of_array:
                data = _bytes(values)
                file.write(data)
                crc = zlib.crc32(data, crc)
                places[name].append([list(start), list(values.shape), end])
                end += data.nbytes
    text = json.dumps(places).encode()
    step_dir.write_file(path / _PLACES, text)
    step_dir.write_record(path, record)
    digests = manifest.digests(blocks)
    step_dir.complete(
        path,
        Manifest(
            {name: dataclasses.replace(x, digest=digests[name]) for name, x in entries.items()},
            {
                _BLOCKS: (end, f"{crc:08x}"),
                _PLACES: (len(text), f"{zlib.crc32(text):08x}"),
                step_dir.META: manifest.file_checksum(path / step_dir.META),
            },
        ),
    )


def _bytes(values: np.ndarray) -> memoryview:
    flat: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return memoryview(flat)


def read_local(path: epath.Path, recorded: Manifest, wanted: state_tree.Flat) -> state_tree.Flat:
    """Returns arrays by name on the shardings of `wanted`, after checks of all files and blocks.

    Raises:
      DamagedCheckpointError: files or blocks are damaged.
      LayoutError: this process's devices hold regions that the step lacks.
    """
    if problems := manifest.check_files(path, recorded.files):
        raise DamagedCheckpointError(path, problems)
    try:
        blocks = _blocks(path, recorded)
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"is not a list of blocks ({type(error).__name__}: {error})"
        raise DamagedCheckpointError(path, {_PLACES: problem}) from None
    digests = manifest.digests(blocks)
    if damaged := [name for name in wanted if digests[name] != recorded.arrays[name].digest]:
        raise DamagedCheckpointError(path, {}, damaged)
    return {name: _put_together(path, name, leaf, blocks[name]) for name, leaf in wanted.items()}


def _blocks(path: epath.Path, recorded: Manifest) -> dict[str, list[Block]]:
    """Returns the blocks as views of the file."""
    data = np.zeros(0, np.uint8)
    if recorded.files[_BLOCKS][0]:  # an empty file cannot be mapped
        data = np.memmap(os.fspath(path / _BLOCKS), np.uint8, mode="r")
    places = json.loads((path / _PLACES).read_bytes())
    blocks: dict[str, list[Block]] = {}
    for name, entry in recorded.arrays.items():
        dtype = np.dtype(entry.dtype)
        blocks[name] = []
        for start, shape, offset in places[name]:
            size = math.prod(shape) * dtype.itemsize
            values = data[offset : offset + size].view(dtype).reshape(shape)
            blocks[name].append((tuple(start), values))
    return blocks


def _put_together(path: epath.Path, name: str, leaf: Any, blocks: Sequence[Block]) -> jax.Array:
    """Returns an array on its sharding, put together from blocks."""

    def region(index: Any) -> np.ndarray:
        bounds = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
        values = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        covered = 0
        for at, block in blocks:  # disjoint
            low = [max(a, b) for a, (b, _) in zip(at, bounds, strict=True)]
            high = [min(a + n, b) for a, n, (_, b) in zip(at, block.shape, bounds, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, at, strict=True))
            here = tuple(
                slice(a - o, b - o) for a, b, (o, _) in zip(low, high, bounds, strict=True)
            )
            values[here] = block[there]
            covered += math.prod(b - a for a, b in zip(low, high, strict=True))
        if covered != values.size:
            raise LayoutError(f"checkpoint {path} has another mesh's part of {name}.")
        return values

    # On one process any mesh is covered; several processes need the layout that was saved.
    return jax.make_array_from_callback(leaf.shape, sharding_of(leaf), region)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTier:
    """Where and how often a run also saves on a disk of each host.

    Attributes:
      directory: a folder on a fast disk of the host, for any number of runs; hosts do not share it.
      period: updates between saves there.
      keep_last: number of steps to keep there.
      grace_seconds: time for the saves after a signal. The local one comes first; if the last shared save took longer than
        the remaining time, none is begun. None: the shared save is always made.
    """

    directory: str
    period: Size = 100
    keep_last: Size = 2
    grace_seconds: Positive | None = None

    def __post_init__(self):
        if not self.directory or "://" in self.directory:
            raise ValueError(
                f"LocalTier.directory = {self.directory!r}: give a folder on a disk of the host, such as /tmp/checkpoints."
            )


class LocalSteps:
    """The steps of one run in this process's folder of the local tier."""

    def __init__(self, settings: LocalTier, shared: epath.Path):
        """Opens the folder of the run that saves in `shared`, and reads which steps are there.

        Args:
          settings: place, period and number of steps.
          shared: the run's directory of shared steps.

        Raises:
          OSError: the folder cannot be made.
        """
        self._settings, self._shared = settings, shared
        digest = hashlib.blake2b(os.fspath(shared).encode(), digest_size=6).hexdigest()
        root = os.path.abspath(os.path.expanduser(settings.directory))
        name = step_dir.folder_of(shared / "0").name
        self._root = epath.Path(root) / f"{name}-{digest}"
        self._root.mkdir(parents=True, exist_ok=True)
        token = self._recorded_token() if agreement.is_primary() else None
        self._folder = self._folder_of(agreement.gather(token)[0])
        self._began = False
        self._good = True
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="local_tier")
        self._pending: concurrent.futures.Future[None] | None = None
        self._steps: set[int] = set()
        if self._folder is not None:
            self._steps = set(step_dir.complete_steps(self._folder))

    def _recorded_token(self) -> str | None:
        try:
            recorded = json.loads((self._shared / TOKEN).read_bytes())
            # A copy of the directory does not take over the steps of the original.
            if recorded["directory"] == os.fspath(self._shared):
                return uuid.UUID(recorded["token"]).hex
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # local steps are only a shorter way
        return None

    def _folder_of(self, token: str | None) -> epath.Path | None:
        if token is None:
            return None
        return self._root / f"{token}.{jax.process_index()}of{jax.process_count()}"

    def is_due(self, step: int) -> bool:
        """Returns whether the period asks for a save."""
        return step % self._settings.period == 0

    def steps(self) -> list[int]:
        """Returns the steps that all processes hold, ascending. Every process must call it."""
        self.wait()
        held = agreement.gather(sorted(self._steps))
        return sorted(set.intersection(*map(set, held)))

    def in_part(self, above: int) -> str:
        """Returns a sentence on steps after `above` that only some processes hold, or ''. Every process must call it."""
        held = agreement.gather(sorted(step for step in self._steps if step > above))
        partial = set.union(*map(set, held)) - set.intersection(*map(set, held))
        if not partial:
            return ""
        holders = sum(max(partial) in steps for steps in held)
        return f"local step {max(partial)} is held by {holders} of {len(held)} processes only"

    def restore(
        self, step: int, abstract_state: Any, expected_meta: Mapping[str, Any] | None
    ) -> tuple[restore.Restored | None, str]:
        """Returns a step of `steps()` and '', or None and why it is not used. Every process must call it.

        Raises:
          CheckpointMismatchError, RunMismatchError: see `restore_state`.
        """
        assert self._folder is not None
        problems: list[str] = []  # of all processes

        def read(*arguments: Any) -> state_tree.Flat:
            arrays = read_local(*arguments)
            problems.extend(agreement.gather(""))  # before all processes read a base together
            if any(problems):
                raise LayoutError
            return arrays

        try:
            restored = restore.read_step(
                self._folder / str(step),
                abstract_state,
                expected_meta=expected_meta,
                read=read,
                run=step_dir.folder_of(self._shared / "0"),
            )
        except (DamagedCheckpointError, LayoutError) as error:
            self._steps.discard(step)
            problems = problems or agreement.gather(str(error))
            return None, next(filter(None, problems))
        return restored, ""

    def begin(self, last: int | None) -> None:
        """Takes over the steps up to `last` under a new token, and deletes all others. Every process must call it.

        Args:
          last: the step that the run continues from; None for a new run.
        """
        self.wait()
        kept = {step for step in self._steps if last is not None and step <= last}
        if self._folder is not None and self._folder.exists():
            for step, path in step_dir.steps_on_disk(self._folder).items():
                if step not in kept:
                    path.rmtree()
        self._steps = kept
        if self._began:
            return
        self._began = True
        token = agreement.gather(uuid.uuid4().hex)[0]
        folder = self._folder_of(token)
        assert folder is not None
        if kept and self._folder is not None:
            self._folder.rename(folder)
        else:
            folder.mkdir(exist_ok=True)
        self._folder = folder
        agreement.gather(None)  # the token is recorded once all folders have it
        if agreement.is_primary():
            self._shared.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"token": token, "directory": os.fspath(self._shared)})
            step_dir.write_file(self._shared / TOKEN, text.encode())
        for other in self._root.iterdir():
            if not other.name.startswith(token):  # of earlier starts
                shutil.rmtree(other, ignore_errors=True)

    def save(
        self, record: Mapping[str, Any], arrays: Mapping[str, jax.Array], *, wait: bool = False
    ) -> bool:
        """Saves this process's part of a state, which may be donated when this returns.

        A save that fails is a warning: the shared ones go on.

        Args:
          record: the contents of meta.json.
          arrays: the state's arrays by name.
          wait: whether the save is finished here, not in a thread. Every process must then call it.

        Returns:
          With `wait`, whether every process holds the step now.
        """
        self.wait()
        if not self._began:
            self.begin(None)
        step = record["step"]
        if step not in self._steps:
            entries = {name: ArrayEntry(x.shape, x.dtype.name, 0) for name, x in arrays.items()}
            blocks = {name: blocks_of(array) for name, array in arrays.items()}
            self._pending = self._pool.submit(self._write, step, record, entries, blocks)
        if not wait:
            return False
        self.wait()
        return all(agreement.gather(step in self._steps))

    def _write(self, step: int, *contents: Any) -> None:
        assert self._folder is not None
        path = self._folder / str(step)
        try:
            write_local(path, *contents)
            self._steps.add(step)
            self._good = True
            for old in sorted(self._steps)[: -self._settings.keep_last]:
                self._steps.discard(old)
                step_dir.remove(self._folder / str(old))
        except (OSError, ValueError) as error:
            if step not in self._steps:
                with contextlib.suppress(OSError):
                    path.rmtree()
            if self._good:
                text = "the local tier cannot be used (%s: %s); shared checkpoints go on."
                _log.warning(text, type(error).__name__, error)
            self._good = False

    def wait(self) -> None:
        """Waits until the last save has ended."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and frees the thread."""
        self.wait()
        self._pool.shutdown()
