"""The sums of a run's metrics since its last row, which each checkpoint holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.telemetry.metrics import Pairs, add, divide


class Window:
    """Sums of metrics over the updates since the last row that ended a window.

    A checkpoint stores `state()` as JSON. Restored, the sums go on with the same bits: decimal text holds every
    float exactly.

    Attributes:
      newest: the averages of the newest row.
    """

    def __init__(self):
        self._sums: dict[str, tuple[Any, Any]] = {}
        self.newest: dict[str, float] = {}

    def add(self, metrics: Pairs) -> None:
        """Adds the metrics of one update, on the host."""
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
        """Sets what `state` returned; an empty window for None, of a checkpoint without one."""
        state = state or {"sums": {}, "newest": {}}
        self._sums = {
            name: (_from_json(total), _from_json(weight))
            for name, (total, weight) in state["sums"].items()
        }
        self.newest = dict(state["newest"])


def _to_json(value: Any) -> list[Any]:
    array = np.asarray(value)
    return [array.dtype.name, array.tolist()]


def _from_json(entry: Sequence[Any]) -> np.ndarray:
    dtype, values = entry
    return np.asarray(values, np.dtype(dtype))
