"""The one training loop: batch, step, metrics one step late, hooks, checkpoints, and what goes wrong.

The loop counts two things: `step`, updates attempted, and `data_step`, batches drawn from the stream.
They differ only after a rollback has skipped a window of data; a checkpoint records both.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from trainers.anomaly import Anomaly
from trainers.batches import Prefetcher, Stream
from trainers.checkpoint import Checkpointer
from trainers.goodput import Goodput
from trainers.hooks import Hook
from trainers.metrics import MetricWriter, reduce_metrics
from trainers.step import TrainStep
from trainers.train_state import TrainState

_log = logging.getLogger(__name__)


class AnomalousStepError(RuntimeError):
    """A non-finite or spiking loss ended the run; its batch and step are saved."""


@dataclasses.dataclass(kw_only=True)
class Loop:
    """Trains from (step, data_step) to `total_steps`.

    Attributes:
      state: the state to continue from; consumed.
      step: updates made so far.
      data_step: batches drawn so far.
      total_steps: updates at which to stop.
      train_step: compiled (state, batch) -> (state, metrics).
      stream: where batches come from.
      prefetcher: prepares them.
      run_dir: where an anomaly is recorded.
      writer: receives metrics by step.
      goodput: splits the time.
      checkpointer: saves and restores; None trains without checkpoints.
      checkpoint_period: updates between saves; the last update is always saved.
      meta: recorded with each checkpoint.
      log_period: updates between written metrics, which average over the period.
      host_metrics: step -> values known on the host, such as the learning rate.
      hooks: see trainers/hooks.py.
      anomaly: the policy the compiled step was built with.
      should_stop: polled after each update; True saves and returns (SIGTERM).
      abstract_state: shapes and shardings, for a rollback.
    """

    state: TrainState
    step: int
    data_step: int
    total_steps: int
    train_step: TrainStep
    stream: Stream
    prefetcher: Prefetcher
    run_dir: pathlib.Path
    writer: MetricWriter
    goodput: Goodput
    checkpointer: Checkpointer | None
    checkpoint_period: int
    meta: Mapping[str, Any]
    log_period: int
    host_metrics: Callable[[int], Mapping[str, float]]
    hooks: Sequence[Hook]
    anomaly: Anomaly | None
    should_stop: Callable[[int], bool]
    abstract_state: TrainState

    def __post_init__(self):
        self._late: tuple[int, int, Any] | None = None  # (step, data_step, metrics) not yet fetched
        self._window: list[Any] = []  # fetched since the last written row
        self._seen: dict[str, float] = {}
        self._bad_in_a_row = 0
        self._rollbacks = 0
        self.interrupted = False

    def run(self) -> TrainState:
        """Trains to the end or to a requested stop; returns the last state.

        Raises:
          AnomalousStepError: the policy ended the run.
        """
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step")
        try:
            while self.step < self.total_steps and not self.interrupted:
                self._advance()
                bar.n = self.step
                bar.set_postfix(self._postfix(), refresh=False)
                bar.update(0)
        finally:
            bar.close()
            self.prefetcher.close()
        if self.checkpointer is not None:
            with self.goodput.track("checkpoint"):
                self.checkpointer.wait()
        return self.state

    def _advance(self) -> None:
        """One update and everything due after it."""
        with self.goodput.track("data"):
            batch = self.prefetcher.get(self.data_step)
        with self.goodput.track("compile" if not self._seen and self._late is None else "step"):
            self.state, metrics = self.train_step(self.state, batch)
            if not self._seen and self._late is None:
                jax.block_until_ready(metrics)
        self.step += 1
        self.data_step += 1
        previous, self._late = self._late, (self.step, self.data_step - 1, metrics)
        if previous is not None and not self._observe(previous):
            return
        last = self.step == self.total_steps
        self.interrupted = self.should_stop(self.step)
        due = [hook for hook in self.hooks if last or self.step % hook.every == 0]
        save = self.checkpointer is not None and (
            last or self.interrupted or self.step % self.checkpoint_period == 0
        )
        if (due or save or last) and not self._settle():
            return
        for hook in due:
            with self.goodput.track("evaluation"):
                self.writer.write(self.step, hook(self.step, self.state, self._seen) or {})
        if save:
            self._save()

    def _settle(self) -> bool:
        """Observes the newest step too, before its state is used; False if it was rolled back."""
        late, self._late = self._late, None
        return late is None or self._observe(late)

    def _observe(self, late: tuple[int, int, Any]) -> bool:
        """Fetches a step's metrics and acts on them; False if the loop was rolled back."""
        step, data_step, device_metrics = late
        with self.goodput.track("step"):
            fetched = jax.device_get(device_metrics)
        bad = bool(fetched.get("anomaly", (0.0, 1.0))[0])
        if bad:
            return self._handle_anomaly(step, data_step, fetched)
        self._bad_in_a_row = 0
        self._window.append(fetched)
        if step % self.log_period == 0 or step == self.total_steps or len(self._seen) == 0:
            self._seen = reduce_metrics(
                self._window, vectors={"source_loss": self.stream.source_names}
            )
            self._window = []
            self.writer.write(
                step, {**self._seen, **self.host_metrics(step), **self.goodput.report(step)}
            )
        return True

    def _handle_anomaly(self, step: int, data_step: int, fetched: Any) -> bool:
        assert self.anomaly is not None
        record = self._record_anomaly(step, data_step, fetched)
        self._bad_in_a_row += 1
        if self.anomaly.action == "skip" and self._bad_in_a_row <= self.anomaly.max_skips:
            _log.warning("step %d: loss %s; its update was dropped.", step, record["loss"])
            return True
        restored = None
        if self.anomaly.action == "rollback" and self._rollbacks < self.anomaly.max_skips:
            assert self.checkpointer is not None
            self._late = None
            restored = self.checkpointer.restore_latest(self.abstract_state, expected_meta=None)
        if restored is None:
            raise AnomalousStepError(
                f"Step {step} (batch {data_step}) had loss {record['loss']} and gradient norm "
                f"{record['grad_norm']}. Its update was not applied; the batch and the documents in it "
                f"are in {record['path']}. Resume as it is to try again, lower the learning rate, or "
                "bind anomaly.Anomaly.action = 'skip' or 'rollback'."
            )
        self._rollbacks += 1
        skipped = (restored.meta["data_step"], data_step)
        _log.warning(
            "step %d: loss %s; back to step %d, skipping batches %d to %d.",
            step,
            record["loss"],
            restored.step,
            *skipped,
        )
        self.state, self.step, self.data_step = restored.state, restored.step, data_step + 1
        self._window = []
        self.writer.write(
            step, {"rollback_to": restored.step, "skipped_batches": skipped[1] - skipped[0] + 1}
        )
        return False

    def _record_anomaly(self, step: int, data_step: int, fetched: Any) -> dict[str, Any]:
        """Writes the batch (npz) and its documents (JSON), so that the step can be replayed."""
        folder = self.run_dir / "anomalies"
        folder.mkdir(parents=True, exist_ok=True)
        size = self.stream.batch_size
        path = folder / f"step_{step}.json"
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
            np.savez(folder / f"step_{step}.npz", **self.stream.batch(data_step, 0, size))
            path.write_text(json.dumps(record, indent=1, default=str))
        self.writer.write(step, {"anomaly": 1.0})
        return {**record, "path": str(path)}

    def _save(self) -> None:
        assert self.checkpointer is not None
        with self.goodput.track("checkpoint"):
            self.checkpointer.save(
                self.step,
                self.state,
                meta={**self.meta, "data_step": self.data_step},
                metrics={k: v for k, v in self._seen.items() if np.isscalar(v)},
            )

    def _postfix(self) -> dict[str, str]:
        shown = {}
        if "loss" in self._seen:
            shown["loss"] = f"{self._seen['loss']:.3f}"
        rate = self.goodput.tokens_per_second()
        if rate:
            shown["tok/s"] = f"{rate:,.0f}"
        return shown
