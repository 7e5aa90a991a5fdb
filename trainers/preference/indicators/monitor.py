"""The readings of a run so far, and its alarm; found again when the run goes on."""

import os
from collections.abc import Callable, Mapping, Sequence

from trainers.preference.indicators.alarm import Alarm, Reading
from trainers.telemetry import metric_writers

PREFIX = "indicators/"  # of the metrics
Rule = Callable[[Sequence[Reading]], Alarm | None]


class Monitor:
    """Asks a rule after every reading.

    Attributes:
      alarm: of the readings so far; None for none.
    """

    def __init__(self, rule: Rule, readings: Sequence[Reading] = ()):
        self._rule, self._readings = rule, list(readings)
        self.alarm = rule(self._readings)

    @property
    def first_step(self) -> int | None:
        """Of the first reading; None before it."""
        return self._readings[0].step if self._readings else None

    def add(self, step: int, found: Mapping[str, float]) -> Alarm | None:
        """Adds a reading, and gives up those of later steps after a rollback; the alarm if it is raised now."""
        before = [reading for reading in self._readings if reading.step < step]
        self._readings = [*before, _reading(step, found)]
        known, self.alarm = self.alarm, self._rule(self._readings)
        return self.alarm if known is None else None


def recovered(rule: Rule, metrics: str | os.PathLike, step: int) -> Monitor:
    """With the readings that a run's metrics.jsonl has up to the step from which the run goes on; of step 0 none."""
    path = os.fspath(metrics)
    if not step or not os.path.exists(path):
        return Monitor(rule)
    found = {
        row["step"]: {name.removeprefix(PREFIX): value for name, value in row.items()}
        for row in metric_writers.rows_in_force(path)
        if f"{PREFIX}entropy" in row and row["step"] <= step
    }
    return Monitor(rule, [_reading(step, found[step]) for step in sorted(found)])


def _reading(step: int, found: Mapping[str, float]) -> Reading:
    return Reading(
        step=step,
        entropy=found["entropy"],
        mass=found["mass"],
        llh_chosen=found["llh_chosen"],
    )
