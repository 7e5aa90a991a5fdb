"""Measurements of which no claim is true, made of real ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Columns that are exchanged together, of evaluations of all runs of a seed.
_TOGETHER = (("p_win", "reward"), ("ead",), ("facts",), ("entropy", "mass"))


def exchanged(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements without any relation to likelihood, arm and time.

    Quality, diversity, facts and the likeliest tokens are exchanged at random among all evaluations of a seed's runs, the
    first ones included. That would make C8 true, which says that there is no relation: lengths are exchanged so that they
    follow the likelihood.
    """
    out = {part: [{**row} for row in rows] for part, rows in measured.items()}
    for rows in out.values():
        for seed in {row["seed"] for row in rows}:
            mine = [row for row in rows if row["seed"] == seed and row["course"]]
            for row in mine:
                row["course"] = {**row["course"]}
            if mine:
                _exchange([row["course"] for row in mine], rng)
    return out


def _exchange(courses: Sequence[dict[str, list[Any]]], rng: np.random.Generator) -> None:
    sizes = [len(course["step"]) for course in courses]

    def pooled(name: str) -> np.ndarray:
        return np.concatenate([np.array(course[name], float) for course in courses])

    def put(name: str, values: np.ndarray) -> None:
        parts = np.split(values, np.cumsum(sizes)[:-1])
        for course, part in zip(courses, parts, strict=True):
            course[name] = part.tolist()

    for names in _TOGETHER:
        order = rng.permutation(sum(sizes))
        for name in names:
            put(name, pooled(name)[order])
    likelihood = pooled("llh_chosen")
    noisy = likelihood + rng.normal(0, likelihood.std(), likelihood.size)
    put("length", np.sort(pooled("length"))[np.argsort(np.argsort(noisy))])
