"""How claims on runs over several domains are judged: in each part of the experiment, by pairs of arms."""

from collections.abc import Callable, Mapping
from typing import Any

from launch.papers.shared.claim import Evidence
from launch.papers.shared.domains import MEAN, DomainRuns, lower

# What one part's runs say of a claim, given them and the part's name; then of all parts together.
Measure = Callable[[Any, str], list[Evidence]]
Judge = Callable[..., list[Evidence]]


def judge(runs: Mapping[str, DomainRuns]) -> Judge:
    """Collects the evidence that any number of `Measure`s find in all parts."""

    def found(*measures: Measure) -> list[Evidence]:
        return [e for name, results in runs.items() for one in measures for e in one(results, name)]

    return found


def pairs(
    *arms: tuple[str, str], score: str = MEAN, step: int | None = None, no_worse: bool = False
) -> Measure:
    """Whether the first arm of each pair has the lower loss.

    Args:
      arms: pairs of them.
      score: of the runs.
      step: at which they are compared; at the end if None.
      no_worse: whether it counts as well if the second is not significantly better.
    """

    def measure(results: DomainRuns, where: str) -> list[Evidence]:
        at = results if step is None else results.at(step)
        place = where if step is None else f"{where}, {step} updates"
        return [e for pair in arms for e in lower(at, place, *pair, score, no_worse=no_worse)]

    return measure
