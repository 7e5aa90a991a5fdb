"""Results of the low-rank sweeps by arm and seed."""

from collections.abc import Mapping
from typing import Any

from launch.papers.shared import results


class Results(results.Results):
    """Rows as `experiment.run` returns them for a part."""

    def score(self, row: Mapping[str, Any], name: str) -> float | None:
        """A number of a run, None if it has none.

        Args:
          row: of results.
          name: 'parameters', 'perplexity', 'accuracy' or another metric of its held-out task after the last
            update, or 'effective_step' and means over its factorised matrices then: 'effective_rank' and
            others of trainers/low_rank/spectrum.py.
        """
        if name == "parameters":
            return float(row["parameters"])
        for values in row["held_out"].values():
            if name in values:
                return float(values[name])
        value = (row["spectrum"] or [{}])[-1].get(name)
        return None if value is None else float(value)

    def digits(self, name: str) -> int:
        return 3 if name == "accuracy" else 2

    def label(self, arm: str) -> str:
        return arm_name(arm)


def arm_name(name: str) -> str:
    """As a reader sees it."""
    words = name.split("_")
    return " ".join(["He", *words[1:]] if words[0] == "he" else words)
