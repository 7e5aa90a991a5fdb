"""Rank classification: the answer choice with the greatest log-likelihood is the model's answer.

Tasks for it have an example for each choice of a row. `launch.evaluate ranks` scores them, and so does
`launch.evaluate seqio`.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from espalier.data.instructions.sources import RIGHT

METRICS = ("accuracy", "accuracy_per_token")
BASE_RATE = "base_rate"


class Option(NamedTuple):
    """One answer choice: the id of its row, whether it is right, and its number of tokens with EOS."""

    row: str
    is_right: bool
    tokens: int


def option(text: str, example: Mapping[str, Any], is_target: bool) -> Option:
    """Returns the answer choice of an example; SeqIO's `postprocess_fn`."""
    del text, is_target
    return Option(example["document_id"].decode(), bool(example[RIGHT][0]), len(example["targets"]))


def accuracies(targets: Sequence[Option], scores: Sequence[float]) -> dict[str, float]:
    """Returns METRICS: the share of rows whose best choice is right, by score and by score per token.

    The first of equal choices is the best. A row may have several right choices, if their texts are equal.

    Args:
      targets: answer choices; the choices of one row are adjacent.
      scores: log-probabilities, summed over tokens.
    """
    rows: dict[str, list[tuple[float, float, bool]]] = {}
    for each, score in zip(targets, scores, strict=True):
        rows.setdefault(each.row, []).append((score, score / each.tokens, each.is_right))
    return {
        metric: sum(max(row, key=lambda choice: choice[at])[2] for row in rows.values()) / len(rows)  # noqa: B023
        for at, metric in enumerate(METRICS)
    }


def base(targets: Sequence[Option]) -> dict[str, float]:
    """Returns 'rows', their number, and BASE_RATE: the accuracy of whoever always gives the best single choice, by its number.

    Args:
      targets: the choices of all rows.
    """
    rows: dict[str, list[bool]] = {}
    for each in targets:
        rows.setdefault(each.row, []).append(each.is_right)
    most = max(map(len, rows.values()))
    right = (sum(at < len(row) and row[at] for row in rows.values()) for at in range(most))
    return {"rows": len(rows), BASE_RATE: max(right) / len(rows)}


def summary(
    templates: Mapping[str, Mapping[str, Mapping[str, float]]], metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """Returns metrics of a task: for each of its sets the median over templates, then the mean over sets.

    Args:
      templates: set -> template -> metrics.
      metrics: names of those that are summed up.
    """
    return {
        metric: statistics.fmean(
            statistics.median(values[metric] for values in each.values())
            for each in templates.values()
        )
        for metric in metrics
    }
