"""Which saved steps of a run stay on disk."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which steps to keep: the latest ones, and the best ones by a metric.

    Attributes:
      keep_last: number of latest steps; None for all.
      keep_best: number of best steps, among the steps saved with `metric`.
      metric: a key of the metrics saved with a step.
      mode: 'min' or 'max'; NaN is never best.
    """

    keep_last: int | None = 3
    keep_best: int = 0
    metric: str = "loss"
    mode: str = "min"

    def __post_init__(self):
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"keep_last = {self.keep_last}: give 1 or more, or None to keep all.")
        if self.keep_best < 0:
            raise ValueError(f"keep_best = {self.keep_best}: give 0 or more.")
        if self.mode not in ("min", "max"):
            raise ValueError(f"best_mode = {self.mode!r}: use 'min' or 'max'.")

    def check_metric(self, saved: Mapping[str, float]) -> None:
        """Raises ValueError if `metric` is missing among the metrics of its kind that a step was saved with.

        A step may be saved without an evaluation, and a source may be missing in a row of metrics.
        """
        kind = self.metric.split("/")[:-1][:1]  # ["eval"], or [] for the training metrics
        names = [name for name in saved if name.split("/")[:-1][:1] == kind]
        if self.keep_best and names and kind in ([], ["eval"]) and self.metric not in names:
            raise ValueError(
                f"best_metric = {self.metric!r} is not a metric of this run: choose from "
                f"{', '.join(sorted(names))}, or set keep_best = 0."
            )

    def best(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Returns the steps that have the metric, best first; of equal steps, the later first."""
        sign = 1 if self.mode == "min" else -1
        values = {
            step: sign * of_step[self.metric]
            for step, of_step in metrics.items()
            if not math.isnan(of_step.get(self.metric, math.nan))
        }
        return sorted(values, key=lambda step: (values[step], -step))

    def superfluous(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Returns the steps to delete, from the metrics of all saved steps."""
        if self.keep_last is None:
            return []
        keep = {*sorted(metrics)[-self.keep_last :], *self.best(metrics)[: self.keep_best]}
        return sorted(set(metrics) - keep)
