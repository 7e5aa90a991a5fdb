"""Functions that the task files in this folder name: their data and their scores.

lm-evaluation-harness loads this file by its path. The suite averages the metric `score`, which every task has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch.evaluate.suites import local_data
from espalier.launch.papers.snapkv import suite
from espalier.launch.papers.snapkv.harness_tasks import scores


def load(*, benchmark: str, data_dir: str | None = None, **others: Any) -> dict[str, Any]:
    """Returns the rows of a task as the harness's split `test`.

    Args:
      benchmark: a name in suite.TASKS.
      data_dir: see launch/evaluate/suites/local_data.py, also for the errors raised.
      **others: further arguments of the harness, which concern models.
    """
    del others
    import datasets

    rows = local_data.rows(suite.source(benchmark), data_dir)
    documents = [
        {
            "benchmark": benchmark,
            "query": suite.query(benchmark, row),
            "answers": list(row["answers"]),
            "classes": list(row.get("all_classes") or ()),
        }
        for row in rows
    ]
    return {"test": datasets.Dataset.from_list(documents)}


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns the best score of an answer over its references."""
    task, text = suite.TASKS[doc["benchmark"]], results[0]
    if task.first_line:
        text = text.lstrip("\n").split("\n")[0]
    of = getattr(scores, task.score)
    return {"score": max((of(text, a, doc["classes"]) for a in doc["answers"]), default=0.0)}
