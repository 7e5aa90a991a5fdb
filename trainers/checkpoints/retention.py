"""Which saved steps stay."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Retention:
    """Keeps the latest steps and, beyond them, the best by a metric.

    Attributes:
      keep_last: how many of the latest steps are kept; None keeps all.
      keep_best: how many steps are kept by `metric`, among those saved with it.
      metric: a key of the metrics given with a step.
      mode: whether 'min' or 'max' is best; NaN never is.
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

    def best(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps that have the metric, best first; of equals the later."""
        sign = 1 if self.mode == "min" else -1
        values = {
            step: sign * found[self.metric]
            for step, found in metrics.items()
            if not math.isnan(found.get(self.metric, math.nan))
        }
        return sorted(values, key=lambda step: (values[step], -step))

    def superfluous(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps to delete, given the metrics of all saved steps."""
        if self.keep_last is None:
            return []
        kept = {*sorted(metrics)[-self.keep_last :], *self.best(metrics)[: self.keep_best]}
        return sorted(set(metrics) - kept)
