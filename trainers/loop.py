"""The one training loop: batch, step, metrics one step late, hooks, checkpoints, and bad steps.

The loop counts three things: `step`, updates attempted, `skipped`, attempted updates that were dropped,
and `data_step`, batches drawn from the stream. Step and data step differ only after a rollback has
skipped a window of data; a checkpoint records all three, and the sums of the metrics since the last row.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from espalier.common import stages
from espalier.trainers.anomaly import Anomaly, AnomalyRecords
from espalier.trainers.batches import Feed, Stream
from espalier.trainers.checkpoints.checkpoint import Checkpointer, Occasion
from espalier.trainers.checkpoints.restore import Restored
from espalier.trainers.hooks import Hook, HookInterruptedError
from espalier.trainers.signals import StopRequest
from espalier.trainers.step import TrainStep
from espalier.trainers.telemetry.goodput import Goodput
from espalier.trainers.telemetry.lifetime import Unrecorded
from espalier.trainers.telemetry.metric_writers import MetricWriter
from espalier.trainers.telemetry.metrics import LateFetch, Window
from espalier.trainers.telemetry.profiler import ProfilerWindow
from espalier.trainers.telemetry.progress import Progress, watching
from espalier.trainers.train_state import TrainState

_log = logging.getLogger(__name__)


class AnomalousStepError(RuntimeError):
    """A bad step ended the run (see `Anomaly`); its batch and step are saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the loop stops, logs and saves.

    Attributes:
      total_steps: updates at which to stop.
      log_period: updates between written metrics, which are averages over the period.
      checkpoint_period: updates between saves; the last update is always saved.
      step_timeout: seconds without progress after which Python's stacks are written to standard error; None for never.
    """

    total_steps: int
    log_period: int
    checkpoint_period: int
    step_timeout: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the loop writes to, and what it adds to its own metrics and records there.

    Attributes:
      folder: the run's directory, where anomalies are recorded.
      writer: receives metrics by step.
      checkpointer: saves and restores; None trains without checkpoints.
      goodput: splits the time.
      profiler: a window of steps to trace, or None.
      row_metrics: (updates applied, batches drawn, units per second) -> metrics known on the host.
      checkpoint_meta: (updates applied, batches drawn) -> facts to record with a checkpoint.
      unit: unit of rates, 'tokens' or 'images'.
      life: records steps and saves, for the time of the run over all its starts.
    """

    folder: str | os.PathLike
    writer: MetricWriter
    checkpointer: Checkpointer | None
    goodput: Goodput
    profiler: ProfilerWindow | None = None
    row_metrics: Callable[[int, int, float], Mapping[str, float]] = lambda *counts: {}
    checkpoint_meta: Callable[[int, int], Mapping[str, Any]] = lambda *counts: {}
    unit: str = "tokens"
    life: Unrecorded = Unrecorded()


@dataclasses.dataclass(kw_only=True)
class Loop:
    """Trains from (step, data_step) to `schedule.total_steps`.

    Attributes:
      start: the state to continue from, and its counts; consumed.
      train_step: compiled (state, batch) -> (state, metrics).
      abstract_state: shapes and shardings, for a rollback.
      stream: where batches come from.
      feed: prepares batches of the stream, or makes them from the state.
      schedule: when to stop, log and save.
      outputs: writer, checkpointer and the like.
      hooks: see trainers/hooks.py; a stop skips those due at its step, which the next start runs first.
      anomaly: the policy the compiled step was built with.
      stop: polled after each update; a signal saves and returns.
      written: names of metrics already written for the first step: their hooks do not run again.
    """

    start: dataclasses.InitVar[Restored]
    train_step: TrainStep
    abstract_state: TrainState
    stream: Stream
    feed: Feed
    schedule: Schedule
    outputs: Outputs
    hooks: Sequence[Hook]
    anomaly: Anomaly | None
    stop: StopRequest
    written: Collection[str] = ()

    def __post_init__(self, start: Restored):
        self.state, self.step = start.state, start.step
        # A state of step 0 has read no batch of this run's data, even if its checkpoint records counts.
        counts = start.meta if start.step else {}
        self.data_step = counts.get("data_step", start.step)
        self.skipped = counts.get("skipped", 0)
        self.interrupted = False
        self._is_new = start.source != "run"
        self._hooks_skipped = not self._is_new and bool(start.meta.get("hooks_left_out"))
        self._anomalies = AnomalyRecords(self.outputs.folder, self.stream)
        self._late = LateFetch()
        self._data_steps: dict[int, int] = {}  # step -> data_step of steps not yet observed
        self._warm = False
        self._window = Window()
        self._window.restore(counts.get("window"))
        self._window_start = (self.step, 0.0)
        self._rate = 0.0
        self._bad_in_a_row = counts.get("bad_in_a_row", 0)
        self._rollbacks = counts.get("rollbacks", 0)
        if self._rolls_back and self.outputs.checkpointer is None:
            raise ValueError("Anomaly.action = 'rollback' needs a checkpointer.")

    def run(self) -> TrainState:
        """Trains to the end or to a requested stop; returns the last state.

        Raises:
          AnomalousStepError: the policy ended the run.
          CheckpointSaveError: a save failed, raised at the first step after that.
        """
        self._progress = Progress(
            first_step=self.step,
            total_steps=self.schedule.total_steps,
            unit=self.outputs.unit,
            shown=jax.process_index() == 0,
        )
        saver = self.outputs.checkpointer
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            progressed = stack.enter_context(watching(self.schedule.step_timeout))
            values = self._run_due(first) if (first := self._first_hooks()) else {}
            self.written = ()
            if saver is not None:
                saver.note(self.step, values)
            if self._rolls_back and not (self.interrupted or (saver and saver.all_steps())):
                self._save(values, "period")  # to go back to before the first checkpoint is due
            total = f"{self.schedule.total_steps:,} updates made"
            stack.enter_context(stages.stage(lambda: f"training, {self.step:,} of {total}"))
            while self.step < self.schedule.total_steps and not (self.interrupted or self.ended):
                self._advance()
                progressed()
                self.outputs.life.reached(self.step)
                self._progress.update(self.step, self.loss, self._rate)
        if saver is not None:
            with self.outputs.goodput.measure("checkpoint"):
                if saver.lacks(self.step) and not self.interrupted:
                    self._save({}, "period")  # nothing was left to do from a local step
                saver.wait()
        return self.state

    def _close(self) -> None:
        self._progress.close()
        self.feed.close()
        if self.outputs.profiler is not None:
            self.outputs.profiler.close()

    def _advance(self) -> None:
        """Makes one update and everything due after it."""
        if self.outputs.checkpointer is not None:
            self.outputs.checkpointer.check()
        if self.feed.of_state:  # the rest of the update under way is not the feed's time
            with self.outputs.goodput.measure("step"):
                jax.block_until_ready(self.state)
        with self.outputs.goodput.measure(self.feed.part):
            batch = self.feed.get(self.data_step, self.state)
        if not self._step(batch):
            return  # rolled back: nothing is due any more
        self.step += 1
        self.data_step += 1
        self.interrupted = self.stop.reached(self.step)
        due = [] if self.interrupted else self._due()  # the remaining time is for the save
        last = self.step == self.schedule.total_steps
        if due or self._occasion() or last or self.interrupted:
            with self.outputs.goodput.measure("step"):  # it waits for the update
                late = self._late.flush()
            if not self._observe(late):
                return
        values = self._run_due(due)
        if occasion := self._occasion():
            self._save(values, occasion)
        if self.interrupted and not (last or self._ends_window(self.step)):
            # A last look, written after the save: the run that goes on writes the whole window's row in its place.
            self._write_row(self.step, self.data_step)

    def _occasion(self) -> Occasion | None:
        """Returns why the state is saved at this step; None if it is not."""
        if (saver := self.outputs.checkpointer) is None:
            return None
        period = self.step % self.schedule.checkpoint_period == 0 and not self.interrupted
        if period or self.ended or self.step == self.schedule.total_steps:
            return "period"
        local: Occasion | None = "local" if saver.is_due_locally(self.step) else None
        return "signal" if self.interrupted else local

    @property
    def ended(self) -> bool:
        """Whether a hook has ended the run."""
        return bool(self.ended_by)

    @property
    def ended_by(self) -> str:
        """What has ended the run, as its hook says it; '' as long as none has."""
        return next((hook.ended_by for hook in self.hooks if hook.ended), "")

    @property
    def loss(self) -> float | None:
        """The mean training loss of the newest row; None before the first."""
        return self._window.newest.get("loss")

    def _due(self) -> list[Hook]:
        last = self.step == self.schedule.total_steps
        return [
            hook
            for hook in self.hooks
            if last or self.step % hook.every == 0 or self.step in hook.also_at
        ]

    def _first_hooks(self) -> list[Hook]:
        if self._is_new:
            return [hook for hook in self.hooks if hook.at_start]
        return [h for h in self._due() if not self._has_written(h)] if self._hooks_skipped else []

    def _has_written(self, hook: Hook) -> bool:
        return bool(hook.prefix) and any(x.startswith(hook.prefix) for x in self.written)

    def _run_due(self, due: Sequence[Hook]) -> dict[str, float]:
        """Runs hooks, and if the run ends with them, the others too."""
        values = self._run_hooks(due)
        if self.ended and not self.interrupted:
            others = [hook for hook in self.hooks if hook not in due]
            values |= self._run_hooks([hook for hook in others if not self._has_written(hook)])
        return values

    def _run_hooks(self, due: Sequence[Hook]) -> dict[str, float]:
        """Runs hooks at this step and writes their metrics; a stop may cut them short."""
        metrics: dict[str, float] = {}
        for hook in due:
            try:
                with self.outputs.goodput.measure("evaluation"):
                    values = hook(self.step, self.state, self._window.newest) or {}
            except HookInterruptedError:
                self.interrupted = True
                break
            if values:
                self.outputs.writer.write(self.step, values)
                self._progress.evaluated(self.step, values)
                metrics.update(values)
        return metrics

    def _step(self, batch: Any) -> bool:
        """Dispatches an update and observes the one before it; False if that led to a rollback."""
        with self.outputs.goodput.measure("step"):
            with (
                self.outputs.profiler.step(self.step)
                if self.outputs.profiler
                else contextlib.nullcontext()
            ):
                self.state, metrics = self.train_step(self.state, batch)
            if not self._warm:  # compilation is not counted in the rate
                jax.block_until_ready(metrics)
            self._data_steps[self.step + 1] = self.data_step
            previous = self._late.push(self.step + 1, metrics)
            if self.outputs.profiler is not None:
                self.outputs.profiler.finished(metrics)
        if not self._warm:
            self._warm = True
            self._window_start = (self.step + 1, self._busy())
        return self._observe(previous)

    def _observe(self, late: tuple[int, Any] | None) -> bool:
        """Acts on a step's fetched metrics; False if the loop was rolled back."""
        if late is None:
            return True
        step, fetched = late
        data_step = self._data_steps.pop(step)
        dropped = bool(fetched.get("anomaly", (0.0, 1.0))[0])
        # Only the optimiser can make such an update of a finite gradient. It is in the state already, since a step that
        # waited for this norm would need a copy of the parameters; but no such state is saved.
        finite = np.isfinite(fetched.get("update_norm", (0.0, 1.0))[0])
        if dropped or not (finite or self.anomaly is None):
            self.skipped += dropped
            if not self._handle_anomaly(step, data_step, fetched, dropped):
                return False
        else:
            self._bad_in_a_row = 0
            self._window.add(fetched)
        if self._ends_window(step) or step == self.schedule.total_steps:
            self._write_row(step, data_step + 1)
        if self._ends_window(step):
            self._window.clear()
        return True

    def _ends_window(self, step: int) -> bool:
        # Not the first or last step of a start: rows must not depend on where a run was cut.
        return step == 1 or step % self.schedule.log_period == 0

    def _write_row(self, step: int, batches: int) -> None:
        """Writes the averages of the window so far."""
        averages = self._window.average({"source_loss": self.stream.source_names})
        (since, before), now = self._window_start, self._busy()
        if step > since and now > before:
            self._rate = (step - since) * self.feed.units / (now - before)
        self._window_start = (step, now)
        host = dict(self.outputs.row_metrics(step - self.skipped, batches, self._rate))
        if self.skipped:
            host["skipped_updates"] = self.skipped
        self.outputs.writer.write(step, {**averages, **host, **self.outputs.goodput.metrics()})
        self._progress.row(step, averages.get("loss"), self._rate)

    def _busy(self) -> float:
        """Seconds spent training so far: steps, and waiting for batches or making them."""
        self.outputs.goodput.metrics()  # counts up to now
        return self.outputs.goodput.seconds["step"] + self.outputs.goodput.seconds[self.feed.part]

    @property
    def _rolls_back(self) -> bool:
        return self.anomaly is not None and self.anomaly.action == "rollback"

    def _handle_anomaly(self, step: int, data_step: int, fetched: Any, dropped: bool) -> bool:
        """Applies the policy; False if the loop was rolled back.

        Args:
          step: the bad step.
          data_step: its batch.
          fetched: its metrics.
          dropped: whether its update was dropped; if not, skipping would come too late.
        """
        assert self.anomaly is not None
        record = self._anomalies.record(step, data_step, fetched, self.anomaly.action)
        self.outputs.writer.write(step, {"anomaly": 1.0})
        self._bad_in_a_row += 1
        if (
            dropped
            and self.anomaly.action == "skip"
            and self._bad_in_a_row <= self.anomaly.max_skips
        ):
            _log.warning("step %d: loss %s; its update was dropped.", step, record["loss"])
            return True
        if self._rolls_back and self._rollbacks < self.anomaly.max_skips:
            self._roll_back(step, data_step, record["loss"])
            return False
        raise AnomalousStepError(
            f"Step {step} (batch {data_step}) had loss {record['loss']}, gradient norm {record['grad_norm']} "
            f"and update norm {record['update_norm']}, and Anomaly.action = {self.anomaly.action!r} ends the run "
            f"({self._bad_in_a_row} bad steps in a row, {self._rollbacks} rollbacks). Its update was "
            f"{'not applied' if dropped else 'not finite, and no later state is saved'}; its batch and documents are in {record['path']}. To continue, bind "
            "anomaly.Anomaly.action = 'skip' or 'rollback' (or a larger max_skips), or start in another "
            "MODEL_DIR from the last checkpoint with a lower learning rate."
        )

    def _roll_back(self, step: int, data_step: int, loss: Any) -> None:
        """Returns to the last good checkpoint, and on to the batch after the bad one."""
        assert self.outputs.checkpointer is not None
        self._late.flush()  # the step already under way is dropped too
        self._data_steps.clear()
        self.state = None  # makes room for the restored one
        restored = self.outputs.checkpointer.restore_latest(self.abstract_state)
        assert restored is not None  # `run` saved one
        first = restored.meta["data_step"]
        self._anomalies.record_skipped(first, data_step)
        text = "step %d: loss %s; back to step %d, skipping batches %d to %d."
        _log.warning(text, step, loss, restored.step, first, data_step)
        skipped = {"rollback_to": restored.step, "skipped_batches": data_step + 1 - first}
        self.outputs.writer.write(step, skipped)
        self._rollbacks += 1
        self.state, self.step, self.data_step = restored.state, restored.step, data_step + 1
        self.skipped = restored.meta.get("skipped", 0)
        self._window.restore(restored.meta.get("window"))
        self._window_start = (self.step, self._busy())

    def _save(self, hook_metrics: Mapping[str, float], occasion: Occasion) -> None:
        """Saves the state with the newest metrics and those of the hooks that ran at this step."""
        assert self.outputs.checkpointer is not None
        self.outputs.life.saved(self.step)
        with self.outputs.goodput.measure("checkpoint"):
            self.outputs.checkpointer.save(
                self.step,
                self.state,
                meta={
                    **self.outputs.checkpoint_meta(self.step - self.skipped, self.data_step),
                    "data_step": self.data_step,
                    "skipped": self.skipped,
                    "bad_in_a_row": self._bad_in_a_row,
                    "rollbacks": self._rollbacks,
                    "window": self._window.state(),
                    "hooks_left_out": self.interrupted and bool(self._due()),
                },
                metrics={**self._window.newest, **hook_metrics},
                later=[hook.prefix for hook in self.hooks],
                occasion=occasion,
            )
