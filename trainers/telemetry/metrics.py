"""Metrics: sums on the device, quotients on the host.

On the device every metric is a pair (sum, weight) of scalars or vectors: the quotient does not depend on how a batch
is split over microbatches, steps or hosts. Metrics are fetched one step late: the next step does not wait for them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

# name -> (sum, weight), arrays of one shape.
Pairs = Mapping[str, tuple[Any, Any]]


def add(total: Pairs | None, new: Pairs) -> dict[str, tuple[Any, Any]]:
    """Returns the sum of two sets of metrics; a name missing in one set counts as zero."""
    summed = dict(total or {})
    for name, (value, weight) in new.items():
        old = summed.get(name)
        summed[name] = (value, weight) if old is None else (old[0] + value, old[1] + weight)
    return summed


def divide(pairs: Pairs, names: Mapping[str, Sequence[str]] | None = None) -> dict[str, float]:
    """Returns the quotients of host metrics as floats, without metrics of weight 0 (a domain without tokens).

    Args:
      pairs: metrics on the host.
      names: labels of vector metrics; 'source_loss' of ['prose', 'code'] becomes
        'source_loss/prose' and 'source_loss/code'.
    """
    values = {}
    for name, (total, weight) in pairs.items():
        total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
        parts = (names or {}).get(name) or range(total.size)
        labels = [f"{name}/{part}" for part in parts] if total.ndim else [name]
        for label, t, w in zip(labels, total.ravel(), weight.ravel(), strict=True):
            if w:
                values[label] = float(t / w)
    return values


class LateFetch:
    """Holds the newest step's device metrics and returns the previous step's metrics.

    Copies to the host start at once, and are awaited only when the next step is running.
    """

    def __init__(self):
        self._waiting: tuple[int, Any] | None = None

    def push(self, step: int, metrics: Any) -> tuple[int, Any] | None:
        """Adds a step's metrics; returns (step, host metrics) of the previous step, if any."""
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        previous = self.flush()
        self._waiting = (step, metrics)
        return previous

    def flush(self) -> tuple[int, Any] | None:
        """Returns (step, host metrics) of the newest step, if any."""
        waiting, self._waiting = self._waiting, None
        return None if waiting is None else (waiting[0], jax.device_get(waiting[1]))
