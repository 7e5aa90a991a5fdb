"""Results of the sweeps by arm and seed, paired where arms are compared."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows of a sweep.

    Attributes:
      rows: as `experiment.run` returns them for a part.
    """

    rows: Sequence[Mapping[str, Any]]

    def find(self, arm: str) -> dict[int, Mapping[str, Any]]:
        """The rows of an arm by seed."""
        return {row["seed"]: row for row in self.rows if row["arm"] == arm}

    def has(self, *arms: str) -> bool:
        return all(self.find(arm) for arm in arms)

    def scores(self, arm: str, name: str) -> dict[int, float]:
        """By seed, of those runs that have it: see `score`."""
        found = {seed: score(row, name) for seed, row in self.find(arm).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def values(self, arm: str, name: str) -> np.ndarray:
        """The scores alone."""
        return np.array(list(self.scores(arm, name).values()))

    def paired(self, name: str, *arms: str) -> list[np.ndarray]:
        """Scores of arms, of the seeds that all of them have, in one order."""
        found = [self.scores(arm, name) for arm in arms]
        seeds = sorted(set.intersection(*map(set, found)))
        return [np.array([scores[seed] for seed in seeds]) for scores in found]

    def missing(self, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """The runs that are not there, as a reader is told: an arm, or some seeds of it."""
        out = []
        for arm in arms:
            left = [seed for seed in seeds if seed not in self.find(arm)]
            if left:
                some = f" (seed {', '.join(map(str, left))})" if len(left) < len(seeds) else ""
                out.append(f"`{arm}`{some}")
        return out


def score(row: Mapping[str, Any], name: str) -> float | None:
    """A number of a run, None if it has none.

    Args:
      row: of results.
      name: 'parameters', 'perplexity', 'accuracy' or another metric of its held-out task after the last
        update, or 'effective_step' and means over its factorised matrices then: 'effective_rank' and
        others of trainers/spectrum.py.
    """
    if name == "parameters":
        return float(row["parameters"])
    for values in row["held_out"].values():
        if name in values:
            return float(values[name])
    value = (row["spectrum"] or [{}])[-1].get(name)
    return None if value is None else float(value)
