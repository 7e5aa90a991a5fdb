"""Functions that the task files in this folder name: their data and their scores.

lm-evaluation-harness loads this file by its path. The suite averages the metric `score`, which every task has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch.evaluate.suites import local_data
from espalier.launch.papers.code_mix.harness_tasks import answers
from espalier.launch.papers.code_mix.suite import BENCHMARKS


def load(*, benchmark: str, data_dir: str | None = None, **others: Any) -> dict[str, Any]:
    """Returns the documents of a benchmark as the harness's split `test`.

    Args:
      benchmark: a name in BENCHMARKS.
      data_dir: see launch/evaluate/suites/local_data.py, also for the errors raised.
      **others: further arguments of the harness, which concern models.
    """
    del others
    import datasets

    return {"test": datasets.Dataset.from_list(documents(benchmark, data_dir))}


def documents(benchmark: str, data_dir: str | None = None) -> list[dict[str, Any]]:
    source, of_row = BENCHMARKS[benchmark]
    return [document for row in local_data.rows(source, data_dir) for document in of_row(row)]


def by_sum(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Scores whether the right choice has the highest log-likelihood."""
    return _ranked(doc, [log_prob for log_prob, _ in results])


def by_bytes(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Scores whether the right choice has the highest log-likelihood per byte of its UTF-8 text."""
    sizes = [len(choice.encode("utf-8")) for choice in doc["choices"]]
    per_byte = [log_prob / size for (log_prob, _), size in zip(results, sizes, strict=True)]
    return _ranked(doc, per_byte)


def _ranked(doc: Mapping[str, Any], scores: Sequence[float]) -> dict[str, float]:
    best = max(range(len(scores)), key=lambda i: scores[i])  # the first of equals
    return {"score": float(best == doc["gold"])}


def by_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores whether the text is one of the answers; `f1` is the share of words in common."""
    text = results[0]
    return {
        "score": answers.exact_match(text, doc["answers"]),
        "f1": answers.f1(text, doc["answers"]),
    }
