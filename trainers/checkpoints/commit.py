"""The end of a save: checksums of everything written, the manifest that completes the step, and which older steps stay."""

import concurrent.futures
import dataclasses
import errno
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from espalier.common.storage import paths
from espalier.trainers.checkpoints import agreement, manifest, step_dir
from espalier.trainers.checkpoints.manifest import ArrayEntry, Block, Manifest

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_TEXTS = ("No space left", "File too large", "quota exceeded")


class CheckpointSaveError(OSError):
    """A step could not be saved; the steps before it are untouched."""


def commit(
    path: epath.Path,
    record: Mapping[str, Any],
    entries: Mapping[str, ArrayEntry],
    blocks: Mapping[str, Sequence[Block]],
    *,
    written: Callable[[], None],
    barrier: Callable[[str], None],
) -> None:
    """Finishes a save. Every process must call it.

    Args:
      path: the step directory.
      record: the contents of meta.json.
      entries: shape and dtype of each array.
      blocks: host copies of the blocks that this process writes.
      written: waits until Orbax has written the arrays of all processes.
      barrier: waits until all processes have called it with the same name.

    Raises:
      OSError, ValueError, RuntimeError: a file could not be written; the step is incomplete.
    """
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="digests") as pool:
        digests = pool.submit(manifest.digests, blocks)  # Computed while Orbax writes.
        written()
        if agreement.is_primary():
            step_dir.write_record(path, record)
        barrier("written")
        names = step_dir.file_names(path)[jax.process_index() :: jax.process_count()]
        files = {name: manifest.file_checksum(path / name) for name in names}
        part: dict[str, Any] = {"digests": digests.result(), "files": files}
    parts = [part]
    if jax.process_count() > 1:
        part_paths = [path / f"part.{process}.json" for process in range(jax.process_count())]
        step_dir.write_file(part_paths[jax.process_index()], json.dumps(part).encode())
        barrier("checksummed")
        if agreement.is_primary():
            parts = [json.loads(part_path.read_bytes()) for part_path in part_paths]
            for part_path in part_paths:
                part_path.unlink()
    if agreement.is_primary():
        total = manifest.add_digests(p["digests"] for p in parts)
        arrays = {
            name: dataclasses.replace(entry, digest=total[name]) for name, entry in entries.items()
        }
        files = {name: (size, crc) for p in parts for name, (size, crc) in p["files"].items()}
        step_dir.complete(path, Manifest(arrays, files))
    barrier("committed")


def save_error(path: epath.Path, error: BaseException, good: Sequence[int]) -> CheckpointSaveError:
    """Returns an error with the reason and with the newest of the `good` steps."""
    text = str(error)
    full = getattr(error, "errno", None) in _NO_SPACE or any(t in text for t in _NO_SPACE_TEXTS)
    if full and not paths.is_remote(path):
        free = shutil.disk_usage(path.parent).free / 1e6
        reason = f"the disk is full or a quota is reached ({free:.0f} MB free)"
        remedy = "Free some space or keep fewer steps, then start again"
    else:
        reason = f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"
        remedy = "Start again once the cause is removed"
    remains = (
        f"step {good[-1]} is good and the run continues from it" if good else "no step is saved yet"
    )
    return CheckpointSaveError(f"could not save {path}: {reason}. {remedy}; {remains}.")


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which steps to keep: the latest ones, and the best ones by a metric.

    Attributes:
      keep_last: number of latest steps; None for all.
      keep_best: number of best steps, among the steps saved with `metric`.
      metric: a key of the metrics saved with a step.
      mode: 'min' or 'max'; NaN is never best.
    """

    keep_last: int | None = 3
    keep_best: int = 0
    metric: str = "loss"
    mode: str = "min"

    def __post_init__(self):
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"keep_last = {self.keep_last}: give 1 or more, or None to keep all.")
        if self.keep_best < 0:
            raise ValueError(f"keep_best = {self.keep_best}: give 0 or more.")
        if self.mode not in ("min", "max"):
            raise ValueError(f"best_mode = {self.mode!r}: use 'min' or 'max'.")

    def check_metric(self, saved: Mapping[str, float], later: Collection[str] | None) -> None:
        """Raises ValueError if `metric` is missing among the metrics of its kind that a step was saved with, or no step has its kind.

        A step may be saved without an evaluation, and a source may be missing in a row of metrics.

        Args:
          saved: the metrics of a step.
          later: see `Checkpointer.save`.
        """
        kind = self.metric.split("/")[:-1][:1]  # ["eval"], or [] for the training metrics
        names = [name for name in saved if name.split("/")[:-1][:1] == kind]
        missing = names and kind in ([], ["eval"]) and self.metric not in names
        if not names and "loss" in saved and later is not None:
            missing = not any(self.metric.startswith(prefix) for prefix in later)
        if self.keep_best and missing:
            raise ValueError(
                f"best_metric = {self.metric!r} is not a metric of this run: choose from "
                f"{', '.join(sorted(names or saved))}, or set keep_best = 0."
            )

    def best(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Returns the steps that have the metric, best first; of equal steps, the later first."""
        sign = 1 if self.mode == "min" else -1
        values = {
            step: sign * of_step[self.metric]
            for step, of_step in metrics.items()
            if not math.isnan(of_step.get(self.metric, math.nan))
        }
        return sorted(values, key=lambda step: (values[step], -step))

    def superfluous(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Returns the steps to delete, from the metrics of all saved steps."""
        if self.keep_last is None:
            return []
        keep = {*sorted(metrics)[-self.keep_last :], *self.best(metrics)[: self.keep_best]}
        return sorted(set(metrics) - keep)
