"""What the task files beside this one name: their data, and their scores.

lm-evaluation-harness loads this file by its path. Every task has a metric `score`, which is the one the
suite averages.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.evaluation.suites import local_data
from launch.papers.code_mix.harness_tasks import answers
from launch.papers.code_mix.suite import BENCHMARKS


def load(*, benchmark: str, data_dir: str | None = None, **others: Any) -> dict[str, Any]:
    """The documents of a benchmark as the harness's split `test`.

    Args:
      benchmark: a name in BENCHMARKS.
      data_dir: see launch/evaluation/suites/local_data.py.
      **others: what else the harness passes, which concerns models.

    Raises:
      MissingDataError, WrongDataError, DataError: as local_data.rows.
    """
    del others
    import datasets

    return {"test": datasets.Dataset.from_list(documents(benchmark, data_dir))}


def documents(benchmark: str, data_dir: str | None = None) -> list[dict[str, Any]]:
    """The documents of a benchmark; errors as of `load`."""
    found = BENCHMARKS[benchmark]
    return [
        document
        for row in local_data.rows(found.source, data_dir)
        for document in found.documents(row)
    ]


def by_sum(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the right choice has the highest log-likelihood."""
    return _ranked(doc, [log_prob for log_prob, _ in results])


def by_bytes(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the right choice has the highest log-likelihood per byte of its UTF-8 text."""
    sizes = [len(choice.encode("utf-8")) for choice in doc["choices"]]
    per_byte = [log_prob / size for (log_prob, _), size in zip(results, sizes, strict=True)]
    return _ranked(doc, per_byte)


def _ranked(doc: Mapping[str, Any], scores: Sequence[float]) -> dict[str, float]:
    best = max(range(len(scores)), key=lambda i: scores[i])  # the first of equals
    return {"score": float(best == doc["gold"])}


def by_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the text is one of the answers; `f1` says how many of its words are."""
    text = results[0]
    return {
        "score": answers.exact_match(text, doc["answers"]),
        "f1": answers.f1(text, doc["answers"]),
    }
