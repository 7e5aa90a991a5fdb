"""Saves the state of a run in the background: atomic, checksummed, keeping the last and best steps.

Only the host copies of the arrays block the loop; a thread computes digests and checksums, writes, and
deletes old steps. The state may be donated as soon as `save` returns.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import multihost

from model.ranges import Count, Size
from trainers.checkpoints import agreement, array_files, manifest, state_tree, step_dir
from trainers.checkpoints.commit import CheckpointSaveError, commit, save_error
from trainers.checkpoints.manifest import ArrayEntry, DamagedCheckpointError
from trainers.checkpoints.restore import Restored, restore_state

_log = logging.getLogger(__name__)

# How long a process waits for other processes to finish writing.
_TIMEOUT_SECONDS = 1200


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

    def check_metric(self, saved: Mapping[str, float]) -> None:
        """Raises ValueError if `metric` is missing among the metrics of its kind that a step was saved with.

        A step may be saved without an evaluation, and a source may be missing in a row of metrics.
        """
        kind = self.metric.split("/")[:-1][:1]  # ["eval"], or [] for the training metrics
        names = [name for name in saved if name.split("/")[:-1][:1] == kind]
        if self.keep_best and names and kind in ([], ["eval"]) and self.metric not in names:
            raise ValueError(
                f"best_metric = {self.metric!r} is not a metric of this run: choose from "
                f"{', '.join(sorted(names))}, or set keep_best = 0."
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


class Checkpointer(contextlib.AbstractContextManager):
    """The checkpoints of one run. Only its training processes may open it; other readers use restore.py."""

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: Size | None = 3,
        keep_best: Count = 0,
        best_metric: str = "loss",
        best_mode: Literal["min", "max"] = "min",
        asynchronous: bool = True,
    ):
        """Opens or creates a directory and removes the files of interrupted saves.

        Args:
          directory: directory of the steps; shared by all processes.
          keep_last, keep_best, best_metric, best_mode: see `Retention`.
          asynchronous: whether a thread finishes saves; otherwise `save` does.
        """
        self._retention = Retention(keep_last, keep_best, best_metric, best_mode)
        self._directory = step_dir.absolute(directory)
        self._asynchronous = asynchronous
        self._saves = 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None  # the last save
        self._wait_at_barrier = multihost.get_barrier_sync_fn()
        self._orbax = ocp.AsyncCheckpointer(
            array_files.handler(),
            async_options=ocp.AsyncOptions(
                timeout_secs=_TIMEOUT_SECONDS, barrier_sync_fn=self._numbered_barrier
            ),
        )
        if agreement.is_primary():
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in step_dir.steps_on_disk(self._directory).values():
                if step_dir.is_incomplete(path):
                    _log.warning("removing %s: its save was interrupted.", path)
                    step_dir.remove(path)
        metrics = list(self._read_metrics().items()) if agreement.is_primary() else []
        self._metrics = {int(step): values for step, values in agreement.gather(metrics)[0]}

    def _numbered_barrier(self, *, key: str, timeout_ms: int) -> None:
        # Orbax names its barriers after the written directory, which is `state` in every step.
        self._wait_at_barrier(key=f"{key}.{self._saves}", timeout_ms=timeout_ms)

    def _read_metrics(self) -> dict[int, Mapping[str, float]]:
        metrics: dict[int, Mapping[str, float]] = {}
        for step, path in step_dir.complete_steps(self._directory).items():
            metrics[step] = {}
            with contextlib.suppress(DamagedCheckpointError):  # Reported when the step is restored.
                metrics[step] = step_dir.read_record(path)["metrics"]
        return metrics

    def step_path(self, step: int) -> epath.Path:
        """Returns the directory of a step."""
        return self._directory / str(step)

    def all_steps(self) -> list[int]:
        """Returns the complete steps, ascending."""
        return sorted(self._metrics)

    def save(
        self,
        step: int,
        state: Any,
        *,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Saves a state; waits for the previous save first. Every process must call it.

        Args:
          step: the number of steps taken; names the directory.
          state: any pytree of jax.Array; may be donated when this returns.
          meta: JSON facts about the run.
          metrics: metrics of this step, including the metric that ranks steps.

        Returns:
          Whether the step was not saved before.

        Raises:
          CheckpointSaveError: this save could not begin, or the previous save failed.
          ValueError: the metric that ranks steps is none of the run's; the step is saved.
        """
        self.wait()
        if step in self._metrics:
            return False
        arrays = state_tree.flatten_arrays(state)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        record = {"step": step, "metrics": numbers, "meta": dict(meta or {})}
        json.dumps(record)  # Errors are raised here, not in the thread.
        path = self.step_path(step)
        self._saves += 1
        try:
            if agreement.is_primary():
                path.mkdir(parents=True, exist_ok=True)
                (path / step_dir.INCOMPLETE).touch()
            self._orbax.save(
                path / step_dir.STATE, args=ocp.args.PyTreeSave(item=state_tree.nest(arrays))
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(path, error) from error
        entries = {name: ArrayEntry(x.shape, x.dtype.name, 0) for name, x in arrays.items()}
        blocks = {name: manifest.owned_blocks(array) for name, array in arrays.items()}
        self._pending = self._pool.submit(self._finish, path, record, entries, blocks)
        self._retention.check_metric(numbers)
        if not self._asynchronous:
            self.wait()
        return True

    def _finish(self, path: epath.Path, record: Mapping[str, Any], *arrays: Any) -> None:
        def barrier(name: str) -> None:
            self._numbered_barrier(key=f"checkpoint.{name}", timeout_ms=_TIMEOUT_SECONDS * 1000)

        written = self._orbax.wait_until_finished
        try:
            commit(path, record, *arrays, written=written, barrier=barrier)
            self._metrics[record["step"]] = record["metrics"]
            self._make_room()
        except BaseException as error:  # The next call of `save`, `wait` or `check` raises it.
            raise self._failed(path, error) from error

    def _make_room(self) -> None:
        try:
            for step in self._retention.superfluous(self._metrics):
                self._metrics.pop(step)
                if agreement.is_primary():
                    step_dir.remove(self.step_path(step))
        except (OSError, ValueError) as error:  # the new step is still good
            text = f"could not delete an old step in {self._directory} ({type(error).__name__}: {error})"
            _log.warning("%s; it stays until the run starts again.", text)

    def _failed(self, path: epath.Path, error: BaseException) -> CheckpointSaveError:
        if agreement.is_primary() and not (path / step_dir.MANIFEST).exists():
            # Frees disk space; files that cannot be removed now are removed when the run restarts.
            with contextlib.suppress(OSError, ValueError):
                step_dir.remove(path)
        return save_error(path, error, self.all_steps())

    def wait(self) -> None:
        """Waits until the last save is committed; raises CheckpointSaveError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raises the error of a failed background save; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def restore_latest(
        self, abstract_state: Any, *, expected_meta: Mapping[str, Any] | None = None
    ) -> Restored | None:
        """Returns the latest good step, see `restore_state`; None if no step is saved.

        Newer, damaged steps are renamed to `<step>.aside`, with one warning.

        Raises:
          DamagedCheckpointError: steps are saved, but none is good.
          RunMismatchError, CheckpointMismatchError: see `restore_state`.
        """
        self.wait()
        damaged: dict[int, DamagedCheckpointError] = {}
        for step in reversed(self.all_steps()):
            try:
                restored = restore_state(
                    self.step_path(step), abstract_state, expected_meta=expected_meta
                )
            except DamagedCheckpointError as error:
                damaged[step] = error
                continue
            if damaged:
                self._set_aside(
                    list(damaged), f"{damaged[max(damaged)]} Continuing from step {step}"
                )
            skipped = [(step, str(error)) for step, error in damaged.items()]
            return dataclasses.replace(restored, skipped=skipped)
        if damaged:
            raise damaged[max(damaged)]
        return None

    def _set_aside(self, steps: list[int], reason: str) -> None:
        for step in steps:
            self._metrics.pop(step)
        names = ""
        if agreement.is_primary():
            names = ", ".join(step_dir.set_aside(self.step_path(step)).name for step in steps)
            _log.warning("%s; set aside in %s: %s.", reason, self._directory, names)
        agreement.gather(names)  # no process continues before the steps are renamed

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            try:
                self._orbax.close()
            except Exception as error:
                # An Orbax error here belongs to a save whose failure has already been raised.
                _log.warning("%s: %s: %s", self._directory, type(error).__name__, error)

    def __exit__(self, *exc_info: object) -> None:
        self.close()
