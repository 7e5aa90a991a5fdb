"""Metrics: sums on the device, quotients on the host, and the sums of a run since its last row.

On the device every metric is a pair (sum, weight) of scalars or vectors: the quotient does not depend on how a batch
is split over microbatches, steps or hosts. Metrics are fetched one step late: the next step does not wait for them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from espalier.trainers.telemetry.marks import is_number

# name -> (sum, weight), arrays of one shape.
Pairs = Mapping[str, tuple[Any, Any]]
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64", "uint32", "bool")


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


class Window:
    """Sums of metrics over the updates since the last row that ended a window.

    A checkpoint stores `state()` as JSON. Restored, the sums continue with the same bits: decimal text holds every
    float exactly.

    Attributes:
      newest: the averages of the newest row.
    """

    def __init__(self):
        self._sums: dict[str, tuple[Any, Any]] = {}
        self.newest: dict[str, float] = {}

    def add(self, metrics: Pairs) -> None:
        """Adds the metrics of one update, on the host.

        Raises:
          ValueError: a metric has another shape than in the checkpoint that the window was restored from.
        """
        for name, (total, _) in metrics.items():
            if name in self._sums and np.shape(self._sums[name][0]) != np.shape(total):
                raise ValueError(
                    f"the checkpoint that the run continues from has sums of {name!r} in the shape "
                    f"{list(np.shape(self._sums[name][0]))}, this run in {list(np.shape(total))}: start again from "
                    "an earlier checkpoint."
                )
        self._sums = add(self._sums, metrics)

    def average(self, names: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Returns the averages, see `divide`, and stores them as the newest."""
        self.newest = divide(self._sums, names)
        return self.newest

    def clear(self) -> None:
        """Begins the next window."""
        self._sums = {}

    def state(self) -> dict[str, Any]:
        """Returns sums and newest averages as JSON values."""
        sums = {name: [_to_json(x) for x in pair] for name, pair in self._sums.items()}
        return {"sums": sums, "newest": dict(self.newest)}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Sets what `state` returned; an empty window for None, of a checkpoint without one.

        Raises:
          ValueError: `state` cannot have returned it.
        """
        state = state or {"sums": {}, "newest": {}}
        try:
            sums, newest = dict(state["sums"]), dict(state["newest"])
            self._sums = {name: _pair(*pair) for name, pair in sums.items()}
            if not all(map(is_number, newest.values())):
                raise ValueError("a newest average is not a number")
            self.newest = newest
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"is not a window of metrics ({error})") from None


def _pair(total: Sequence[Any], weight: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    pair = _from_json(total), _from_json(weight)
    if pair[0].shape != pair[1].shape or pair[0].ndim > 1:
        raise ValueError("a sum and its weight are not scalars or vectors of one shape")
    return pair


def _to_json(value: Any) -> list[Any]:
    array = np.asarray(value)
    return [array.dtype.name, array.tolist()]


def _from_json(entry: Sequence[Any]) -> np.ndarray:
    dtype, values = entry
    numbers = values if isinstance(values, list) else [values]
    if dtype not in _DTYPES or not all(map(is_number, numbers)):
        raise ValueError("a sum is not of numbers of a numeric dtype")
    try:
        return np.asarray(values, np.dtype(dtype))
    except OverflowError as error:
        raise ValueError(str(error)) from None
