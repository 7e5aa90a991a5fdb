"""Measurements without any effect, made of real ones: a claim that holds on them decides nothing."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np


def shuffle_arms(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the parts of an experiment with arms exchanged at random within each seed and size.

    Arms are exchanged with others that have the same evaluations. Parts without rows of runs stay as they are.
    """
    return {
        part: {**value, "rows": _shuffled(value["rows"], rng)}
        if isinstance(value, Mapping) and "rows" in value
        else _shuffled(value, rng)
        if isinstance(value, list) and all("arm" in row for row in value)
        else value
        for part, value in measured.items()
    }


def _shuffled(rows: list[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    groups = collections.defaultdict(list)
    for at, row in enumerate(rows):
        evaluations = tuple(
            sorted(name for name, one in (row.get("evaluations") or {}).items() if one)
        )
        key = row["seed"], row.get("size"), bool(row.get("held_out")), evaluations
        groups[key].append(at)
    out = list(rows)
    for places in groups.values():
        for at, source in zip(places, rng.permutation(places), strict=True):
            out[at] = {**rows[source], "arm": rows[at]["arm"]}
    return out
