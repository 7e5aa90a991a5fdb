"""What counts as a bad step, decided inside the compiled step so that no bad update is ever applied.

The verdict costs no synchronisation: a bad step leaves parameters, moments and averages as they were
and reports `anomaly` = 1; the loop reads that one step late and stops, counts or rolls back.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Action = Literal["stop", "skip", "rollback"]
ACTIONS = get_args(Action)
STATISTICS = "loss_statistics"  # key in TrainState.variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anomaly:
    """Policy for non-finite or spiking losses.

    Attributes:
      action: 'stop' saves batch and step and ends the run; 'skip' drops the update and counts it;
        'rollback' returns to the last good checkpoint and skips the data window since.
      spike_sigmas: a loss this many standard deviations above its running mean is a spike; None
        judges only finiteness.
      window: steps over which mean and variance are averaged (exponentially), and the number of
        good steps before spikes are judged.
      max_skips: consecutive bad steps after which 'skip' stops, and rollbacks after which
        'rollback' stops.

    Raises:
      ValueError: unknown action or a window too short to estimate a variance.
    """

    action: Action = "stop"
    spike_sigmas: float | None = None
    window: int = 64
    max_skips: int = 10

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise ValueError(f"Anomaly.action = {self.action!r}: choose from {ACTIONS}.")
        if self.window < 2 or self.max_skips < 1:
            raise ValueError("Anomaly: window must be at least 2 and max_skips at least 1.")

    def init(self) -> dict[str, jax.Array]:
        """Statistics of no steps."""
        return {
            "mean": jnp.zeros((), jnp.float32),
            "variance": jnp.zeros((), jnp.float32),
            "count": jnp.zeros((), jnp.int32),
        }

    def judge(
        self, statistics: dict[str, jax.Array], loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(whether the step is good, statistics after it); bad steps leave the statistics alone."""
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
        return good, jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, statistics)
