"""Weights of a mixture's sources: from SeqIO rates, from token counts, or by phases.

All weights here are shares of *tokens*. SeqIO samples examples by rate, so that long documents
weigh more. This module treats a mixture's rates as shares of training tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from espalier.common import spelling
from espalier.data import tasks

Weights = Literal["rates", "tokens", "unimax"]


def find_tasks(mixture_or_task_name: str) -> tuple[list, dict[str, float]]:
    """Returns the tasks of a registered mixture (or the one task), and {task: rate}.

    Raises:
        ValueError: no such mixture or task is registered.
    """
    rates = tasks.members(mixture_or_task_name)
    return [tasks.find(name) for name in rates], rates


def tempered(
    weights: Mapping[str, float], temperature: float, cap: float | None = None
) -> dict[str, float]:
    """Returns min(weight, cap)^(1 / temperature) of every weight.

    Args:
      weights: weight of each source, such as its number of documents.
      temperature: 1 preserves the proportions; larger temperatures make the weights more equal.
      cap: larger weights count as this one; None for no cap.

    Raises:
      ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    return {
        name: float(min(weight, cap) if cap is not None else weight) ** (1 / temperature)
        for name, weight in weights.items()
    }


def unimax(sizes: Mapping[str, float], budget: float, max_epochs: float) -> dict[str, float]:
    """Returns the part of a budget that each source gets by UniMax (arXiv 2304.09151): even parts, within a cap of epochs.

    The smallest source comes first: it gets an even part of what is left, or all of its epochs if these are fewer. So
    no source is read more often than `max_epochs`, and all others get the same.

    Args:
        sizes: tokens of each source.
        budget: tokens to read in all.
        max_epochs: the most that a source is read.

    Raises:
        ValueError: a number is not positive, or the sources' epochs do not fill the budget.
    """
    if not max_epochs > 0 or not budget > 0 or any(not size > 0 for size in sizes.values()):
        raise ValueError(
            f"UniMax needs positive numbers: budget {budget}, max_epochs {max_epochs}, sizes {dict(sizes)}."
        )
    most = max_epochs * sum(sizes.values())
    if budget > most * (1 + 1e-9):
        raise ValueError(
            f"UniMax: {max_epochs:g} epochs of all sources are {most:,.0f} tokens, fewer than the budget of "
            f"{budget:,.0f}. Raise unimax_epochs, or lower unimax_tokens."
        )
    parts, left = {}, float(budget)
    ascending = sorted(sizes, key=lambda name: (sizes[name], name))
    for place, name in enumerate(ascending):
        parts[name] = min(left / (len(ascending) - place), max_epochs * sizes[name])
        left -= parts[name]
    return {name: parts[name] for name in sizes}


def normalised(weights: Mapping[str, float], known: Sequence[str], where: str) -> dict[str, float]:
    """Returns the positive weights divided by their sum, in the order of `known`.

    Raises:
        ValueError: a name is unknown, a weight is negative or not finite, or no weight is positive.
    """
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"{where}: unknown source {name!r}; {spelling.nearest(name, known)}")
        if not np.isfinite(weight) or weight < 0:
            raise ValueError(
                f"{where}: the weight of {name!r} is {weight}; it must be >= 0 and finite."
            )
    total = float(sum(weights.values()))
    if not 0 < total < float("inf"):
        raise ValueError(
            f"{where}: the weights {dict(weights)} sum to {total} and cannot be normalised; at least "
            "one source needs a positive weight."
        )
    return {name: weights[name] / total for name in known if weights.get(name, 0) > 0}


def checked_phases(
    phases: Sequence[tuple[int, Mapping[str, float]]], known: Sequence[str]
) -> list[tuple[int, dict[str, float]]]:
    """Returns phases, such as ((0, {'a': 1}), (100, {'a': 1, 'b': 3})), with normalised weights.

    Raises:
        ValueError: a phase is malformed, the first does not start at step 0, steps do not increase,
            or weights cannot be normalised.
    """
    out: list[tuple[int, dict[str, float]]] = []
    for j, phase in enumerate(phases):
        where = f"phases[{j}]"
        try:
            start, weights = phase
            items = dict(weights)
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: expected (first step, {{source: weight}}), got {phase!r}."
            ) from None
        if not isinstance(start, int) or isinstance(start, bool):
            raise ValueError(f"{where}: the first step must be an integer, got {start!r}.")
        if not out and start != 0:
            raise ValueError(f"{where}: the first phase must start at step 0, not {start}.")
        if out and start <= out[-1][0]:
            raise ValueError(
                f"{where}: starts at step {start}, not after step {out[-1][0]} before it."
            )
        out.append((start, normalised(items, known, where)))
    if not out:
        raise ValueError("phases is empty; set it to None to use the mixture's own rates.")
    return out
