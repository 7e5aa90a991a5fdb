"""Scores of a suite of benchmarks: means by group, and their mean.

A group's score is the unweighted mean of its benchmarks, and the total the unweighted mean of the groups. If a benchmark
is missing, so are the means that contain it, because they would not be comparable.
"""

import dataclasses
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence

from launch import cli, environment
from launch.evaluation.suites.local_data import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Benchmarks of one kind, under the names of their tasks."""

    name: str
    benchmarks: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Groups of benchmarks.

    Attributes:
      name: a folder of launch/papers; lm-evaluation-harness runs a benchmark by the task NAME_BENCHMARK in its folder
        harness_tasks.
      groups: the groups, in the order of the table.
      sources: data sets of the benchmarks that lm-evaluation-harness runs.
      programs: instructions for measuring the benchmarks of code.
    """

    name: str
    groups: Sequence[Group]
    sources: Mapping[str, Source]
    programs: Mapping[str, str]

    @property
    def tasks(self) -> str:
        """Returns the folder of the task files."""
        return os.path.join(environment.ROOT, "launch", "papers", self.name, "harness_tasks")

    @property
    def benchmarks(self) -> list[str]:
        """Returns all benchmarks, group by group."""
        return [benchmark for group in self.groups for benchmark in group.benchmarks]


def names() -> list[str]:
    """Returns the names of the papers that have a suite."""
    return cli.papers_with("suite")


def find(name: str) -> Suite:
    """Returns the suite of a paper: SUITE in launch/papers/NAME/suite.py."""
    return importlib.import_module(f"launch.papers.{name}.suite").SUITE


def means(
    suite: Suite, scores: Mapping[str, float]
) -> tuple[dict[str, float | None], float | None]:
    """Returns (score by group, total) from scores by benchmark; None for a mean with a missing benchmark."""
    groups = {
        group.name: mean([scores.get(benchmark) for benchmark in group.benchmarks])
        for group in suite.groups
    }
    return groups, mean(list(groups.values()))


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean, or None if a value is missing."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None


def table(
    suite: Suite, scores: Mapping[str, float], details: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    """Yields rows (group, benchmark, score in %, detail), then the means; a missing value is a dash.

    `scores` and `details` are by benchmark; a detail is the number of examples or how to get a missing set.
    """
    groups, total = means(suite, scores)
    for group in suite.groups:
        for benchmark in group.benchmarks:
            detail = details.get(benchmark, "")
            yield group.name, benchmark, percent(scores.get(benchmark)), detail
        num_scores = sum(benchmark in scores for benchmark in group.benchmarks)
        of = f"{num_scores} of {len(group.benchmarks)} benchmarks"
        yield group.name, "mean", percent(groups[group.name]), of
    yield "total", "mean of groups", percent(total), ""


def percent(score: float | None) -> str:
    """Returns a score in % with one decimal, as in the paper."""
    return "-" if score is None else f"{100 * score:.1f}"
