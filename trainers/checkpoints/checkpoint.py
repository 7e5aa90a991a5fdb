"""Saves the state of a run in the background: atomic, checksummed, keeping the last and best steps.

Only the host copies of the arrays block the loop; a thread computes digests and checksums, writes, and
deletes old steps. The state may be donated as soon as `save` returns. With a local tier (local_tier.py), steps are also
saved on a disk of each host, more often; the newest good step of both is restored.

`Checkpointer` is the way into this folder for a run; what only reads a checkpoint begins with restore_params.py. Below them:

    commit                      the end of a save, and which steps stay
    local_tier                  the steps on a disk of each host
    restore, initial            the state of a run, of this one or of another
    base_step                   steps without a base model
    stream_checkpoint           steps that are written block by block
    step_dir, manifest, array_files, state_tree, agreement
                                files, checksums, arrays and Orbax, names, processes
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import multihost

from espalier.common.ranges import Count, Size
from espalier.trainers.checkpoints import (
    agreement,
    array_files,
    base_step,
    manifest,
    state_tree,
    step_dir,
)
from espalier.trainers.checkpoints.commit import CheckpointSaveError, Retention, commit, save_error
from espalier.trainers.checkpoints.local_tier import LocalSteps, LocalTier
from espalier.trainers.checkpoints.manifest import ArrayEntry, DamagedCheckpointError
from espalier.trainers.checkpoints.restore import Restored, restore_state

_log = logging.getLogger(__name__)

# How long a process waits for other processes to finish writing.
_TIMEOUT_SECONDS = 1200

# Why a step is saved: it is due, due in the local tier alone, or a signal has come.
Occasion = Literal["period", "local", "signal"]


class Checkpointer(contextlib.AbstractContextManager):
    """The checkpoints of one run: `save` writes a step, `restore_latest` reads the newest good one.

    Each step is a folder of its own, which counts as soon as it is complete. All processes of a run call each method. Only they
    may open the directory; other programs read it with trainers/checkpoints/restore.py. `wait` ends the saves that a thread
    has begun, and so does leaving the `with` block.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: Size | None = 3,
        keep_best: Count = 0,
        best_metric: str = "loss",
        best_mode: Literal["min", "max"] = "min",
        asynchronous: bool = True,
        local: LocalTier | None = None,
    ):
        """Opens or creates a directory and removes the files of interrupted saves.

        Args:
          directory: directory of the steps; shared by all processes.
          keep_last: number of latest steps to keep; None for all.
          keep_best: number of best steps to keep, among the steps saved with `best_metric`.
          best_metric: a key of the metrics saved with a step.
          best_mode: 'min' or 'max', what is best; NaN never is.
          asynchronous: whether a thread finishes saves; otherwise `save` does.
          local: the tier on a disk of each host; None for only shared steps.
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
        self._local = None if local is None else LocalSteps(local, self._directory)
        self._grace = local.grace_seconds if local is not None else None
        self._anchored = bool(self._metrics)  # see `save`
        self._shared_seconds = 0.0  # of the last shared save
        self._shared_since = 0.0  # when it began, by time.monotonic
        self._rescued: int | None = None  # the local step of a signal

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

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics that were measured after a step's save, which rank it until this object is closed."""
        if step in self._metrics:
            self._metrics[step] = {**metrics, **self._metrics[step]}

    def step_path(self, step: int) -> epath.Path:
        """Returns the directory of a step."""
        return self._directory / str(step)

    def all_steps(self) -> list[int]:
        """Returns the complete shared steps, ascending."""
        return sorted(self._metrics)

    def is_due_locally(self, step: int) -> bool:
        """Returns whether the local tier asks for a save."""
        return self._local is not None and self._local.is_due(step)

    def lacks(self, step: int) -> bool:
        """Returns whether a step is only in the local tier; waits for the last save."""
        self.wait()
        return self._local is not None and step not in self._metrics

    def save(
        self,
        step: int,
        state: Any,
        *,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        later: Collection[str] | None = None,
        occasion: Occasion = "period",
    ) -> bool:
        """Saves a state; waits for the previous save first. Every process must call it.

        A run's first checkpoint is always shared too: it records where the run begins, and no local step is used without.

        Args:
          step: the number of steps taken; names the directory.
          state: any pytree of jax.Array; may be donated when this returns.
          meta: JSON facts about the run. If they name a base model (base_step.py), its parameters are left out.
          metrics: metrics of this step, including the metric that ranks steps.
          later: beginnings of the names of metrics that other steps may have; None if they are unknown.
          occasion: 'period' saves a shared step, and a local one if that is due; 'local' a local one alone; 'signal' first a
            local one, then a shared one if the time suffices.

        Returns:
          Whether the step was not saved before.

        Raises:
          CheckpointSaveError: this save could not begin, or the previous save failed.
          ValueError: the metric that ranks steps is none of the run's; the step is saved.
        """
        arrays = base_step.without_base(state_tree.flatten_arrays(state), meta or {})
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        record = {"step": step, "metrics": numbers, "meta": dict(meta or {})}
        json.dumps(record)  # Errors are raised here, not in the thread.
        if self._local is not None and not self._save_locally(record, arrays, occasion):
            return True
        try:
            return self._save_shared(step, arrays, record, later)
        except CheckpointSaveError as error:
            self._raise_unless_local(error)
            return True

    def _save_shared(
        self,
        step: int,
        arrays: Mapping[str, Any],
        record: Mapping[str, Any],
        later: Collection[str] | None,
    ) -> bool:
        self.wait()
        if step in self._metrics:
            return False
        path = self.step_path(step)
        self._saves += 1
        self._anchored, self._shared_since = True, time.monotonic()
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
        self._retention.check_metric(record["metrics"], later)
        if not self._asynchronous:
            self.wait()
        return True

    def _save_locally(
        self, record: Mapping[str, Any], arrays: Mapping[str, Any], occasion: Occasion
    ) -> bool:
        """Saves in the local tier what is due there; returns whether the step is to be shared too."""
        assert self._local is not None
        if occasion == "signal":
            since = time.monotonic()
            saved = self._local.save(record, arrays, wait=True)
            self._rescued = record["step"] if saved and self._anchored else None
            if self._grace is None or self._rescued is None:
                return True
            # What is being saved ends first. The clocks of processes differ: one decides.
            rest = self._shared_since + self._shared_seconds - since if self._is_saving() else 0.0
            needed = max(rest, 0.0) + self._shared_seconds + time.monotonic() - since
            if agreement.gather(needed <= self._grace)[0]:
                return True
            _log.warning(
                "step %d is saved in the local tier alone: a shared save takes about %.0f s, and grace_seconds is %g.",
                *(record["step"], self._shared_seconds, self._grace),
            )
            return False
        if occasion == "local" or self._local.is_due(record["step"]):
            self._local.save(record, arrays)
        return occasion != "local" or not self._anchored

    def _is_saving(self) -> bool:
        return self._pending is not None and not self._pending.done()

    def _finish(self, path: epath.Path, record: Mapping[str, Any], *arrays: Any) -> None:
        def barrier(name: str) -> None:
            self._numbered_barrier(key=f"checkpoint.{name}", timeout_ms=_TIMEOUT_SECONDS * 1000)

        written = self._orbax.wait_until_finished
        try:
            commit(path, record, *arrays, written=written, barrier=barrier)
            self._metrics[record["step"]] = record["metrics"]
            self._shared_seconds = time.monotonic() - self._shared_since
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
        """Waits until the last shared save is committed; raises CheckpointSaveError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except CheckpointSaveError as error:
                self._raise_unless_local(error)

    def _raise_unless_local(self, error: CheckpointSaveError) -> None:
        """Raises the error of a shared save, unless a signal has saved the state in the local tier."""
        if self._rescued is None:
            raise error
        _log.warning("%s Step %d is in the local tier.", error, self._rescued)

    def check(self) -> None:
        """Raises the error of a failed background save; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def restore_latest(
        self, abstract_state: Any, *, expected_meta: Mapping[str, Any] | None = None
    ) -> Restored | None:
        """Returns the latest good step, see `restore_state`; None if no step is saved.

        Newer, damaged steps are renamed to `<step>.aside`, with one warning; local ones are deleted, with another. Of equal
        steps the local one is read.

        Raises:
          DamagedCheckpointError: steps are saved, but none is good.
          RunMismatchError, CheckpointMismatchError: see `restore_state`.
        """
        self.wait()
        local = self._local_steps()
        damaged: dict[int, DamagedCheckpointError] = {}
        unusable: dict[int, str] = {}  # local steps
        restored = None
        for step in sorted({*self._metrics, *local}, reverse=True):
            if self._local is not None and step in local:
                restored, problem = self._local.restore(step, abstract_state, expected_meta)
                unusable |= {step: problem} if problem else {}
            if restored is None and step in self._metrics:
                try:
                    restored = restore_state(
                        self.step_path(step), abstract_state, expected_meta=expected_meta
                    )
                except DamagedCheckpointError as error:
                    damaged[step] = error
            if restored is not None:
                break
        if restored is None:
            if damaged:
                raise damaged[max(damaged)]
            return None
        if self._local is not None:
            self._start_locally(self._local, restored, unusable)
        if damaged:
            self._set_aside(
                list(damaged), f"{damaged[max(damaged)]} Continuing from step {restored.step}"
            )
        skipped = [(step, str(error)) for step, error in damaged.items()]
        return dataclasses.replace(restored, skipped=[*unusable.items(), *skipped])

    def _local_steps(self) -> list[int]:
        """Returns the local steps that may be used: none unless a shared one records where the run begins."""
        if self._local is None:
            return []
        if not any(agreement.gather(agreement.is_primary() and self._has_record())):
            return []
        return self._local.steps()

    def _has_record(self) -> bool:
        for step in self.all_steps():
            with contextlib.suppress(DamagedCheckpointError):
                step_dir.read_record(self.step_path(step))
                return True
        return False

    def _start_locally(
        self, local: LocalSteps, restored: Restored, unusable: Mapping[int, str]
    ) -> None:
        """Tells why newer local steps are not used, and continues in the local tier from the restored step."""
        reasons = list(unusable.values())[:1] or list(filter(None, [local.in_part(restored.step)]))
        if reasons and agreement.is_primary():
            _log.warning(
                "%s Continuing from step %d of %s.",
                *(f"{reasons[0].rstrip('.')}.", restored.step, restored.path),
            )
        local.begin(restored.step)
        self._anchored = bool(self._metrics)

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
            if self._local is not None:
                self._local.close()
            try:
                self._orbax.close()
            except Exception as error:
                # An Orbax error here belongs to a save whose failure has already been raised.
                _log.warning("%s: %s: %s", self._directory, type(error).__name__, error)

    def __exit__(self, *exc_info: object) -> None:
        self.close()
