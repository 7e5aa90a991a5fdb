"""Results of the sweeps by arm, group of skills and seed, paired where arms are compared."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GROUPS = ("reasoning", "knowledge", "code")
MAIN = "width64"


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows of a sweep.

    Attributes:
      rows: as `experiment.run` returns them for a part.
    """

    rows: Sequence[Mapping[str, Any]]

    def find(self, arm: str, size: str | None = None) -> dict[int, Mapping[str, Any]]:
        """The rows of an arm by seed."""
        return {
            row["seed"]: row
            for row in self.rows
            if row["arm"] == arm and row["size"] in (None, size or MAIN)
        }

    def has(self, *arms: str) -> bool:
        return all(self.find(arm) for arm in arms)

    def scores(self, arm: str, group: str, size: str | None = None) -> dict[int, float]:
        """By seed: exact match of a group, or bits per byte of a task."""
        return {seed: _score(row, group) for seed, row in self.find(arm, size).items()}

    def paired(self, group: str, *cases: str | tuple[str, str]) -> list[np.ndarray]:
        """Scores of arms, or of (arm, size), of the seeds that all of them have, in one order."""
        arms = [(case, MAIN) if isinstance(case, str) else case for case in cases]
        found = [self.scores(arm, group, size) for arm, size in arms]
        seeds = sorted(set.intersection(*map(set, found)))
        return [np.array([scores[seed] for seed in seeds]) for scores in found]


def _score(row: Mapping[str, Any], group: str) -> float:
    if group in GROUPS:
        return float(row["evaluations"]["skills"][group]["exact"])
    return float(row["held_out"][group]["bits_per_byte"])
