"""Measurements of SnapKV without any effect, made of real ones: a claim that holds on them decides nothing."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns what `measure.run` returns with methods, windows and questions exchanged at random within each model.

    Hit rates of the two positions of a question, which S6 says are similar, are made to differ.
    """
    out = copy.deepcopy(dict(measured))
    for model in out.get("retrieval", {}).get("models", {}).values():
        for name, one in model.items():
            if name.startswith("accuracy"):
                one["right"] = _exchanged(one["right"], rng)
        _swap(model["agnostic"], "before", "after", rng)
        _swap(model["overlaps"], "same", "different", rng)
        model["hits"]["hits"] = _moved(model["hits"]["hits"], rng)
        model["kept_first"] = [[rng.uniform() * hits, all_] for hits, all_ in model["kept_first"]]
    for haystack in out.get("needles", {}).get("haystacks", []):
        haystack["digits"] = _exchanged(haystack["digits"], rng)
        if "overlap" in haystack:  # of those that judge
            _swap(haystack["overlap"], "same", "different", rng)
            haystack["hits"] = _moved(haystack["hits"], rng)
    for batch in out.get("latency", {}).get("batches", {}).values():
        one, other = batch.values()
        repeats = len(next(iter(one.values()))["ms"])
        for at in np.flatnonzero(rng.integers(2, size=repeats)):
            for length in one:
                mine, yours = one[length]["ms"], other[length]["ms"]
                mine[at], yours[at] = yours[at], mine[at]
    return out


def _exchanged(cells: Mapping[str, Mapping[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """Returns method -> capacity -> cell with the methods exchanged; the full cache's cell is of any capacity."""
    names = list(cells)
    taken = dict(zip(names, rng.permutation(names), strict=True))

    def cell(name: str, capacity: str) -> Any:
        theirs = cells[taken[name]]
        return theirs.get(capacity) or next(iter(theirs.values()))

    return {
        name: {capacity: cell(name, capacity) for capacity in mine} for name, mine in cells.items()
    }


def _swap(cells: dict[str, Any], one: str, other: str, rng: np.random.Generator) -> None:
    if rng.integers(2):
        cells[one], cells[other] = cells[other], cells[one]


def _moved(hits_LW2: Any, rng: np.random.Generator) -> list[Any]:
    """Returns the hits with windows exchanged, alike in all layers."""
    hits = np.asarray(hits_LW2)
    return hits[:, rng.permutation(hits.shape[1])].tolist()
