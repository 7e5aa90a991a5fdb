"""Bad steps: how the compiled step detects them, so that no bad update is applied, and their records.

Detection costs no synchronisation: a bad step leaves parameters, moments and averages unchanged and
reports `anomaly` = 1; the loop reads that one step late and stops, counts or rolls back.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import Positive, Size
from espalier.trainers.batches import Stream
from espalier.trainers.extensions import StepExtension, Update

Action = Literal["stop", "skip", "rollback"]
ACTIONS = get_args(Action)
STATISTICS = "loss_statistics"  # key in TrainState.variables
GATHERED = "gathered"  # key in the statistics: the losses of the first window, NaN where unknown

_BATCHES = 32  # newest bad batches whose arrays stay in the run's directory: 'skip' may drop thousands of updates

# The standard deviation of normal numbers is so many times their median absolute deviation (Hampel, "The influence
# curve and its role in robust estimation", 1974).
_SIGMAS_PER_MAD = 1.4826


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anomaly(StepExtension):
    """Policy for bad steps: a non-finite loss, gradient or update, or a spiking loss.

    Mean and variance of the losses are averages, plain ones over the first `window` good steps and exponential ones from
    then on. In the first window nothing is judged yet, so a spike may be among its losses and raise both, which would
    hide later ones. Once it is full, losses more than `spike_sigmas` robust standard deviations (1.4826 times the
    median absolute deviation) above its median are left out of both. This works while they are fewer than half.

    Attributes:
      action: 'stop' saves batch and step and ends the run; 'skip' drops the update and counts it (but ends the run after a
        non-finite update of a finite gradient, which is in the state already);
        'rollback' returns to the last good checkpoint and skips the data window since.
      spike_sigmas: a loss this many standard deviations above its running mean is a spike; None
        judges only finiteness.
      window: steps over which mean and variance are averaged (exponentially), and the number of
        good steps before spikes are judged.
      max_skips: consecutive bad steps after which 'skip' stops, and rollbacks after which 'rollback' stops.
    """

    name = STATISTICS
    of_data = True

    action: Action = "stop"
    spike_sigmas: Positive | None = None
    window: Size = 64
    max_skips: Size = 10

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise ValueError(f"Anomaly.action = {self.action!r}: choose from {ACTIONS}.")
        if self.window < 2 or self.max_skips < 1:
            raise ValueError("Anomaly: window must be at least 2 and max_skips at least 1.")

    def init(self, params: Any = None, mask: Any = None) -> dict[str, jax.Array]:
        """Returns the statistics of no steps."""
        del params, mask
        dtypes = {"mean": jnp.float32, "variance": jnp.float32, "count": jnp.int32}
        statistics = {name: jnp.zeros((), dtype) for name, dtype in dtypes.items()}
        if self.spike_sigmas is not None:
            statistics[GATHERED] = jnp.full(self.window, jnp.nan, jnp.float32)
        return statistics

    def gate(self, part: Any, update: Update) -> tuple[jax.Array, Any]:
        return self.judge(part, update.loss, update.grad_norm)

    def judge(
        self, statistics: dict[str, jax.Array], loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (whether the step is good, statistics after it); bad steps do not change the statistics."""
        mean, variance, count = (statistics[k] for k in ("mean", "variance", "count"))
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if self.spike_sigmas is not None:
            limit = mean + self.spike_sigmas * jnp.sqrt(variance)
            good &= (count < self.window) | (loss <= limit)
        # A plain average at first, exponential once the window is full.
        rate = 1.0 / jnp.minimum(count + 1, self.window).astype(jnp.float32)
        delta = loss - mean
        updated = {
            "mean": mean + rate * delta,
            "variance": (1 - rate) * (variance + rate * delta * delta),
            "count": count + 1,
        }
        if self.spike_sigmas is not None:
            losses = statistics[GATHERED].at[count].set(loss, mode="drop")  # of later steps none
            ordinary = ~self._spikes(losses)
            replace = (count + 1 == self.window) & ~ordinary.all()
            updated |= {
                "mean": jnp.where(replace, losses.mean(where=ordinary), updated["mean"]),
                "variance": jnp.where(replace, losses.var(where=ordinary), updated["variance"]),
                GATHERED: losses,
            }
        return good, jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, statistics)

    def _spikes(self, losses: jax.Array) -> jax.Array:
        """Returns which losses of a full window are spikes; none if not all losses are known."""
        assert self.spike_sigmas is not None
        median = jnp.median(losses)  # NaN if one is
        deviation = _SIGMAS_PER_MAD * jnp.median(jnp.abs(losses - median))
        return losses > median + self.spike_sigmas * deviation


class AnomalyRecords:
    """Files in a run's directory with the batches and documents of bad steps."""

    def __init__(self, folder: str | os.PathLike, stream: Stream):
        self._folder, self._stream = pathlib.Path(folder, "anomalies"), stream

    def record(
        self, step: int, data_step: int, fetched: Mapping[str, tuple[Any, Any]], action: Action
    ) -> dict[str, Any]:
        """Writes a batch (npz) and its documents (JSON), so that the step can be replayed; deletes older npz files.

        Args:
          data_step: its batch.
          fetched: its metrics as (sum, weight).
          action: the policy's reaction.

        Returns:
          The record, with 'loss', 'grad_norm', 'update_norm' and the 'path' of the JSON file.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        size = self._stream.batch_size
        path = self._folder / f"batch_{data_step}.json"  # steps come twice after a rollback
        values = {
            name: np.asarray(total / weight).tolist() for name, (total, weight) in fetched.items()
        }
        record = {
            "step": step,
            "data_step": data_step,
            "loss": values.get("loss"),
            "grad_norm": values.get("grad_norm"),
            "update_norm": values.get("update_norm"),
            "action": action,
            "documents": self._stream.documents(data_step, 0, size),
        }
        if jax.process_index() == 0:
            batch: dict[str, Any] = self._stream.batch(data_step, 0, size)
            np.savez(path.with_suffix(".npz"), **batch)
            saved = self._folder.glob("batch_*.npz")
            for old in sorted(saved, key=lambda x: (x.stat().st_mtime_ns, len(x.name), x))[
                :-_BATCHES
            ]:
                old.unlink()
            path.write_text(json.dumps(record, indent=1, default=str))
        return {**record, "path": str(path)}

    def record_skipped(self, first: int, last: int) -> None:
        """Writes the documents of the skipped batches `first` to `last`, a line for each batch."""
        if jax.process_index() == 0:
            path = self._folder / f"batch_{last}_skipped.jsonl"
            size = self._stream.batch_size
            with open(path, "w", encoding="utf-8") as file:
                for batch in range(first, last + 1):
                    line = {"data_step": batch, "documents": self._stream.documents(batch, 0, size)}
                    file.write(json.dumps(line, default=str) + "\n")
