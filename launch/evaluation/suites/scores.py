"""Scores of a suite of benchmarks: means by group, and their mean.

A group's score is the unweighted mean of its benchmarks, whatever their sizes, and the total the mean of
the groups, so that eleven benchmarks of one kind count as much as two of another. A mean of which a part
is missing is missing too: it would not compare with others.
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
      name: of the suite, a folder of launch/papers; lm-evaluation-harness runs a benchmark by the task NAME_BENCHMARK of
        launch/papers/NAME/harness_tasks.
      groups: in the order of the table.
      sources: data sets of the benchmarks that lm-evaluation-harness runs.
      programs: how to measure the others, whose answers are programs.
    """

    name: str
    groups: Sequence[Group]
    sources: Mapping[str, Source]
    programs: Mapping[str, str]

    @property
    def tasks(self) -> str:
        """The folder of the task files."""
        return os.path.join(environment.ROOT, "launch", "papers", self.name, "harness_tasks")

    @property
    def benchmarks(self) -> list[str]:
        """All of them, group by group."""
        return [benchmark for group in self.groups for benchmark in group.benchmarks]


def names() -> list[str]:
    """Names of the suites, which are those of the papers that have one."""
    return cli.papers_with("suite")


def find(name: str) -> Suite:
    """The suite of a paper: SUITE in launch/papers/NAME/suite.py."""
    return importlib.import_module(f"launch.papers.{name}.suite").SUITE


def means(
    suite: Suite, scores: Mapping[str, float]
) -> tuple[dict[str, float | None], float | None]:
    """(score by group, total); None where a benchmark has none.

    Args:
      suite: whose benchmarks to average.
      scores: by benchmark, those that were measured.
    """
    groups = {
        group.name: mean([scores.get(benchmark) for benchmark in group.benchmarks])
        for group in suite.groups
    }
    return groups, mean(list(groups.values()))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, None if a value is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def table(
    suite: Suite, scores: Mapping[str, float], details: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    """Rows (group, benchmark, score in %, detail) with the means below; what is missing as a dash.

    Args:
      suite: of the scores.
      scores: by benchmark.
      details: by benchmark, such as the number of examples or what is missing.
    """
    groups, total = means(suite, scores)
    for group in suite.groups:
        for benchmark in group.benchmarks:
            detail = details.get(benchmark, "")
            yield group.name, benchmark, percent(scores.get(benchmark)), detail
        known = sum(benchmark in scores for benchmark in group.benchmarks)
        of = f"{known} of {len(group.benchmarks)} benchmarks"
        yield group.name, "mean", percent(groups[group.name]), of
    yield "total", "mean of groups", percent(total), ""


def percent(score: float | None) -> str:
    """With one digit, as the paper has them."""
    return "-" if score is None else f"{100 * score:.1f}"
