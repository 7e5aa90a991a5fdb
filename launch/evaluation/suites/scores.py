"""Scores of a suite of benchmarks: means by group, and their mean.

A group's score is the unweighted mean of its benchmarks, whatever their sizes, and the total the mean of
the groups, so that eleven benchmarks of one kind count as much as two of another. A mean of which a part
is missing is missing too: it would not compare with others.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Benchmarks of one kind, under the names of their tasks."""

    name: str
    benchmarks: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Groups of benchmarks.

    Attributes:
      name: of the suite.
      groups: in the order of the table.
    """

    name: str
    groups: Sequence[Group]

    @property
    def benchmarks(self) -> list[str]:
        """All of them, group by group."""
        return [benchmark for group in self.groups for benchmark in group.benchmarks]


# "To Code, or Not To Code?" (arXiv 2408.10914), section 2.3.
CODE_MIX = Suite(
    name="code_mix",
    groups=(
        Group(
            name="reasoning",
            benchmarks=(
                *("boolq", "piqa", "sciq", "social_iqa", "quac", "cb", "copa", "story_cloze"),
                *("hellaswag", "winogrande", "arc_easy"),
            ),
        ),
        Group(name="knowledge", benchmarks=("trivia_qa", "nq_open")),
        Group(name="code", benchmarks=("humaneval", "mbpp")),
    ),
)
SUITES = {suite.name: suite for suite in (CODE_MIX,)}


def means(
    suite: Suite, scores: Mapping[str, float]
) -> tuple[dict[str, float | None], float | None]:
    """(score by group, total); None where a benchmark has none.

    Args:
      suite: what to average.
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
