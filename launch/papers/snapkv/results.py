"""The measurements as tables: a row for each prompt of a retrieval model, and for each question on a haystack."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from launch.papers.snapkv import measure
from launch.papers.snapkv.needles import DIGITS, GRIDS, Grid

SMALL, CHAT = "retrieval model", "SmolLM2-135M"
_LINES = {"accuracy": measure.LINES, "accuracy_12": 12, "accuracy_24": 24}


@dataclasses.dataclass(frozen=True)
class Results:
    """The parts that `measure.run` returns; empty if not measured."""

    retrieval: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needles: Sequence[Mapping[str, Any]] = ()
    latency: Mapping[str, Any] | None = None

    @property
    def runs(self) -> list[Mapping[str, Any]]:
        """The measurements of the retrieval models, one per seed."""
        return list(self.retrieval.values())

    @property
    def length(self) -> int:
        """Tokens of a prompt of the retrieval models."""
        return self.runs[0]["accuracy"]["length"]

    @functools.cached_property
    def prompts(self) -> pd.DataFrame:
        """Whether answers are right: all tokens ('exact') and those after the first ('later'). `depth` is in fifths."""
        rows = [
            (seed, lines, line * 5 // lines, method, int(capacity), all(right), all(right[1:]))
            for seed, run in self.retrieval.items()
            for key, lines in _LINES.items()
            if key in run
            for method, capacities in run[key]["correct"].items()
            for capacity, answers in capacities.items()
            for line, right in zip(run[key]["line"], answers, strict=True)
        ]
        columns = ["seed", "lines", "depth", "method", "capacity", "exact", "later"]
        return pd.DataFrame(rows, columns=columns)

    @functools.cached_property
    def questions(self) -> pd.DataFrame:
        """Which digits of answers on haystacks are right, and whether all are ('exact')."""
        rows = [
            (haystack["tokens"], method, int(capacity), all(digits), digits)
            for haystack in self.needles
            for method, capacities in haystack["digits"].items()
            for capacity, answers in capacities.items()
            for digits in answers
        ]
        frame = pd.DataFrame(rows, columns=["tokens", "method", "capacity", "exact", "digits"])
        return frame.sort_values("tokens", kind="stable")

    def answers(self, method: str, capacity: int) -> pd.DataFrame:
        """Returns the rows of `prompts` of a method; the full cache has no capacity."""
        return _of(self.prompts, method, capacity)

    def exact(self, method: str, capacity: int) -> np.ndarray:
        """Returns whether each of the longest prompts of all seeds is answered."""
        mine = self.answers(method, capacity)
        return mine[mine["lines"] == measure.LINES]["exact"].to_numpy(bool)

    def digits(self, method: str, capacity: int, tokens: int) -> np.ndarray:
        """Returns the right digits [needles, 5] of the haystacks of a length."""
        mine = _of(self.questions[self.questions["tokens"] == tokens], method, capacity)
        return np.array(mine["digits"].tolist()).reshape(-1, DIGITS)

    @property
    def grids(self) -> list[Grid]:
        """The grids of needles that were measured."""
        return [grid for grid in GRIDS if grid.tokens in set(self.questions["tokens"])]

    @functools.cached_property
    def window_rates(self) -> np.ndarray | None:
        """Hit rates [layers, windows] over all seeds."""
        if not self.runs:
            return None
        hits = [np.asarray(run["hits"]["hits"]) for run in self.runs]
        total_LW2 = np.concatenate(hits, axis=2).sum(2)
        return total_LW2[..., 0] / np.maximum(total_LW2[..., 1], 1)


def _of(answers: pd.DataFrame, method: str, capacity: int) -> pd.DataFrame:
    mine = answers[answers["method"] == method]
    return mine if method == "full" else mine[mine["capacity"] == capacity]
