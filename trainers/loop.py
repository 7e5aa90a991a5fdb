"""The one training loop: batch, step, metrics one step late, hooks, checkpoints, and what goes wrong.

The loop counts three things: `step`, updates attempted, `skipped`, those of them that were dropped, and
`data_step`, batches drawn from the stream. Step and data step differ only after a rollback has skipped a
window of data; a checkpoint records all.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from trainers.anomaly import Anomaly
from trainers.batches import Feed, Stream
from trainers.checkpoints.checkpoint import Checkpointer
from trainers.hooks import GivenUpError, Hook
from trainers.signals import StopRequest
from trainers.step import TrainStep
from trainers.telemetry.goodput import Goodput
from trainers.telemetry.metric_writers import MetricWriter
from trainers.telemetry.metrics import LateFetch, add, divide
from trainers.telemetry.profiler import ProfilerWindow
from trainers.train_state import TrainState

_log = logging.getLogger(__name__)


class AnomalousStepError(RuntimeError):
    """A non-finite or spiking loss ended the run; its batch and step are saved."""


@dataclasses.dataclass(kw_only=True)
class Loop:
    """Trains from (step, data_step) to `total_steps`.

    Attributes:
      state: the state to continue from; consumed, and None while another one is read.
      step: updates made so far.
      data_step: batches drawn so far.
      total_steps: updates at which to stop.
      train_step: compiled (state, batch) -> (state, metrics).
      stream: where batches come from.
      feed: prepares them, or makes them of the state.
      run_dir: where an anomaly is recorded.
      writer: receives metrics by step.
      goodput: splits the time.
      checkpointer: saves and restores; None trains without checkpoints.
      checkpoint_period: updates between saves; the last update is always saved.
      meta: recorded with each checkpoint.
      log_period: updates between written metrics, which average over the period.
      unit: what rates count, 'tokens' or 'images'.
      host_metrics: (updates applied, units per second) -> values known on the host, such as the
        learning rate, which the optimiser reads at its own count.
      data_metrics: batches drawn -> values known of the data, such as how often they were repeated.
      position: (updates applied, batches drawn) -> more to record with a checkpoint.
      hooks: see trainers/hooks.py; a stop leaves out those due at its step.
      hooks_left_out: a stop has left out hooks due at the step to continue from: they run first.
      written: names of metrics that are written for that step, by those that it has not left out.
      begins: no update of this run was made before, so that hooks with `at_start` run first.
      anomaly: the policy the compiled step was built with.
      stop: polled after each update; a signal saves and returns.
      abstract_state: shapes and shardings, for a rollback.
      skipped: updates dropped so far.
      profiler: a window of steps to trace, or None.
    """

    state: Any
    step: int
    data_step: int
    total_steps: int
    train_step: TrainStep
    stream: Stream
    feed: Feed
    run_dir: pathlib.Path
    writer: MetricWriter
    goodput: Goodput
    checkpointer: Checkpointer | None
    checkpoint_period: int
    meta: Mapping[str, Any]
    log_period: int
    host_metrics: Callable[[int, float], Mapping[str, float]]
    hooks: Sequence[Hook]
    anomaly: Anomaly | None
    stop: StopRequest
    abstract_state: TrainState
    unit: str = "tokens"
    data_metrics: Callable[[int], Mapping[str, float]] = lambda batches: {}
    position: Callable[[int, int], Mapping[str, Any]] = lambda updates, batches: {}
    skipped: int = 0
    hooks_left_out: bool = False
    written: Collection[str] = ()
    begins: bool = False
    profiler: ProfilerWindow | None = None

    def __post_init__(self):
        self._late = LateFetch()
        self._data_steps: dict[int, int] = {}  # step -> data_step of steps not yet observed
        self._warm = False
        self._window: Any = None  # metrics summed since the last written row
        self._window_start = (self.step, 0.0)
        self._seen: dict[str, float] = {}
        self._rate = 0.0
        self._bad_in_a_row = 0
        self._rollbacks = 0
        self.interrupted = False
        if self._rolls_back and self.checkpointer is None:
            raise ValueError("Anomaly.action = 'rollback' needs a checkpointer to go back with.")

    def run(self) -> TrainState:
        """Trains to the end or to a requested stop; returns the last state.

        Raises:
          AnomalousStepError: the policy ended the run.
          CheckpointSaveError: a save failed, found at the first step after that.
        """
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=jax.process_index() != 0,
        )
        if self._rolls_back and self.checkpointer and not self.checkpointer.all_steps():
            self._save({})  # somewhere to go back to before the first checkpoint is due
        try:
            if self.hooks_left_out:
                self._run_hooks([hook for hook in self._due() if not self._wrote(hook)])
            elif self.begins:
                self._run_hooks([hook for hook in self.hooks if getattr(hook, "at_start", False)])
            while self.step < self.total_steps and not (self.interrupted or self.ended):
                self._advance()
                bar.set_postfix(self._postfix(), refresh=False)
                bar.update(self.step - bar.n)
        finally:
            bar.close()
            self.feed.close()
            if self.profiler is not None:
                self.profiler.close()
        if self.checkpointer is not None:
            with self.goodput.measure("checkpoint"):
                self.checkpointer.wait()
        return self.state

    def _advance(self) -> None:
        """One update and everything due after it."""
        if self.checkpointer is not None:
            self.checkpointer.check()
        if self.feed.of_state:  # what the update under way still takes is not the feed's time
            with self.goodput.measure("step"):
                jax.block_until_ready(self.state)
        with self.goodput.measure(self.feed.part):
            batch = self.feed.get(self.data_step, self.state)
        if not self._step(batch):
            return  # rolled back: nothing is due any more
        self.step += 1
        self.data_step += 1
        self.interrupted = self.stop.reached(self.step)
        due = [] if self.interrupted else self._due()  # the time left to stop in is for the save
        save = self.checkpointer is not None and (
            self._last or self.interrupted or self.step % self.checkpoint_period == 0
        )
        if due or save or self._last:
            with self.goodput.measure("step"):  # it waits for the update
                late = self._late.flush()
            if not self._observe(late):
                return
        found = self._run_hooks(due)
        if self.ended and not self.interrupted:
            found |= self._run_hooks([hook for hook in self.hooks if hook not in due])
        if self.checkpointer is not None and (save or self.interrupted or self.ended):
            self._save(found)

    @property
    def ended(self) -> bool:
        """Whether a hook has ended the run."""
        return any(getattr(hook, "ended", False) for hook in self.hooks)

    @property
    def _last(self) -> bool:
        return self.step == self.total_steps

    def _due(self) -> list[Hook]:
        return [hook for hook in self.hooks if self._last or self.step % hook.every == 0]

    def _wrote(self, hook: Hook) -> bool:
        prefix = getattr(hook, "prefix", "")
        return bool(prefix) and any(name.startswith(prefix) for name in self.written)

    def _run_hooks(self, due: Sequence[Hook]) -> dict[str, float]:
        """Runs hooks at this step and writes what they found; a stop may cut them short."""
        found: dict[str, float] = {}
        for hook in due:
            try:
                with self.goodput.measure("evaluation"):
                    values = hook(self.step, self.state, self._seen) or {}
            except GivenUpError:
                self.interrupted = True
                break
            if values:
                self.writer.write(self.step, values)
                found.update(values)
        return found

    def _step(self, batch: Any) -> bool:
        """Dispatches an update and observes the one before it; False if that led to a rollback."""
        with self.goodput.measure("step"):
            mark = (
                contextlib.nullcontext() if self.profiler is None else self.profiler.step(self.step)
            )
            with mark:
                self.state, metrics = self.train_step(self.state, batch)
            if not self._warm:  # what is slow the first time is not counted in the rate
                jax.block_until_ready(metrics)
            self._data_steps[self.step + 1] = self.data_step
            previous = self._late.push(self.step + 1, metrics)
            if self.profiler is not None:
                self.profiler.finished(metrics)
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
        if float(fetched.get("anomaly", (0.0, 1.0))[0]):
            self.skipped += 1
            if not self._handle_anomaly(step, data_step, fetched):
                return False
        else:
            self._bad_in_a_row = 0
            self._window = add(self._window, fetched)
        # Not the first step of a continued run: its rows are those of a run never interrupted.
        stopping = self.interrupted and step == self.step
        if step % self.log_period == 0 or step in (1, self.total_steps) or stopping:
            self._write_row(step, data_step + 1)
        return True

    def _write_row(self, step: int, batches: int) -> None:
        """Writes the averages of the window that ends with `step`, and begins the next."""
        self._seen = divide(self._window or {}, {"source_loss": self.stream.source_names})
        self._window = None
        (since, before), now = self._window_start, self._busy()
        if step > since and now > before:
            self._rate = (step - since) * self.feed.units / (now - before)
        self._window_start = (step, now)
        known = {
            **self.host_metrics(step - self.skipped, self._rate),
            **self.data_metrics(batches),
        }
        if self.skipped:
            known["skipped_updates"] = self.skipped
        self.writer.write(step, {**self._seen, **known, **self.goodput.metrics()})

    def _busy(self) -> float:
        """Seconds spent training so far: steps, and waiting for batches or making them."""
        self.goodput.metrics()  # counts up to now
        return self.goodput.seconds["step"] + self.goodput.seconds[self.feed.part]

    @property
    def _rolls_back(self) -> bool:
        return self.anomaly is not None and self.anomaly.action == "rollback"

    def _handle_anomaly(self, step: int, data_step: int, fetched: Any) -> bool:
        """Applies the policy; False if the loop was rolled back."""
        assert self.anomaly is not None
        record = self._record_anomaly(step, data_step, fetched)
        self._bad_in_a_row += 1
        if self.anomaly.action == "skip" and self._bad_in_a_row <= self.anomaly.max_skips:
            _log.warning("step %d: loss %s; its update was dropped.", step, record["loss"])
            return True
        if self._rolls_back and self._rollbacks < self.anomaly.max_skips:
            self._roll_back(step, data_step, record["loss"])
            return False
        raise AnomalousStepError(
            f"Step {step} (batch {data_step}) had loss {record['loss']} and gradient norm "
            f"{record['grad_norm']}, and Anomaly.action = {self.anomaly.action!r} ends the run "
            f"({self._bad_in_a_row} bad steps in a row, {self._rollbacks} rollbacks). Its update was "
            f"not applied; the batch and the documents in it are in {record['path']}. Bind "
            "anomaly.Anomaly.action = 'skip' or 'rollback' (or a larger max_skips) to go on, or start "
            "in another MODEL_DIR from the last checkpoint with a lower learning rate."
        )

    def _roll_back(self, step: int, data_step: int, loss: Any) -> None:
        """Returns to the last good checkpoint, and on to the batch after the bad one."""
        assert self.checkpointer is not None
        self._late.flush()  # the step already under way is given up too
        self._data_steps.clear()
        self.state = None  # makes room for the other
        restored = self.checkpointer.restore_latest(self.abstract_state)
        assert restored is not None  # `run` saved one
        first = restored.meta["data_step"]
        self._record_skipped(first, data_step)
        _log.warning(
            "step %d: loss %s; back to step %d, skipping batches %d to %d.",
            step,
            loss,
            restored.step,
            first,
            data_step,
        )
        self.writer.write(
            step, {"rollback_to": restored.step, "skipped_batches": data_step + 1 - first}
        )
        self._rollbacks += 1
        self.state, self.step, self.data_step = restored.state, restored.step, data_step + 1
        self.skipped = restored.meta.get("skipped", 0)
        self._window = None
        self._window_start = (self.step, self._busy())

    def _record_skipped(self, first: int, last: int) -> None:
        """Writes which documents are left out, a line for each batch from `first` to `last`."""
        if jax.process_index() == 0:
            path = self.run_dir / "anomalies" / f"batch_{last}_skipped.jsonl"
            with open(path, "w", encoding="utf-8") as file:
                for batch in range(first, last + 1):
                    documents = self.stream.documents(batch, 0, self.stream.batch_size)
                    line = {"data_step": batch, "documents": documents}
                    file.write(json.dumps(line, default=str) + "\n")

    def _record_anomaly(self, step: int, data_step: int, fetched: Any) -> dict[str, Any]:
        """Writes the batch (npz) and its documents (JSON), so that the step can be replayed."""
        folder = self.run_dir / "anomalies"
        folder.mkdir(parents=True, exist_ok=True)
        size = self.stream.batch_size
        path = folder / f"batch_{data_step}.json"  # steps come twice after a rollback
        values = {
            name: np.asarray(total / weight).tolist() for name, (total, weight) in fetched.items()
        }
        record = {
            "step": step,
            "data_step": data_step,
            "loss": values.get("loss"),
            "grad_norm": values.get("grad_norm"),
            "action": self.anomaly.action if self.anomaly else None,
            "documents": self.stream.documents(data_step, 0, size),
        }
        if jax.process_index() == 0:
            batch: dict[str, Any] = self.stream.batch(data_step, 0, size)
            np.savez(folder / f"batch_{data_step}.npz", **batch)
            path.write_text(json.dumps(record, indent=1, default=str))
        self.writer.write(step, {"anomaly": 1.0})
        return {**record, "path": str(path)}

    def _save(self, found: Mapping[str, float]) -> None:
        """Saves with the newest metrics, and what hooks found at this very step."""
        assert self.checkpointer is not None
        with self.goodput.measure("checkpoint"):
            self.checkpointer.save(
                self.step,
                self.state,
                meta={
                    **self.meta,
                    **self.position(self.step - self.skipped, self.data_step),
                    "data_step": self.data_step,
                    "skipped": self.skipped,
                    "hooks_left_out": self.interrupted and bool(self._due()),
                },
                metrics={**self._seen, **found},
            )

    def _postfix(self) -> dict[str, str]:
        shown = {}
        if "loss" in self._seen:
            shown["loss"] = f"{self._seen['loss']:.3f}"
        if self._rate:
            shown[f"{self.unit}/s"] = f"{self._rate:,.0f}"
        return shown
