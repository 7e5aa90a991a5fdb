"""This project's side of the benchmark `influence`: factors and scores of the library behind `launch.influence`."""

import functools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np


def rows_of(ids_NT: np.ndarray, prompt: int = 1) -> list[Any]:
    """Returns texts as rows, of which the first `prompt` tokens are not predicted."""
    from espalier.trainers.scoring.scoring import Row

    return [Row(context=row[:prompt], targets=row[prompt:]) for row in ids_NT.tolist()]


def batch_of(ids_NT: np.ndarray, prompt: int = 1) -> dict[str, np.ndarray]:
    """Returns texts as one batch."""
    from espalier.trainers.influence import documents

    rows: Sequence[Any] = rows_of(ids_NT, prompt)
    return documents.columns(rows, range(len(rows)), len(rows), ids_NT.shape[1] - 1)


class Ours:
    """The operations; programs are compiled at the first call."""

    def __init__(self, folder: str):
        from espalier.model.hf.load import load
        from espalier.trainers.influence import fit, sites

        self._folder = folder
        self._sizes = json.loads(pathlib.Path(folder, "case.json").read_bytes())
        model, params = load(os.path.join(folder, "model"))
        self._reader = fit.Reader(model=model, params=params, batch_size=self._sizes["batch_size"])
        self._sites = sites.select(model, params)
        self._documents = rows_of(np.load(os.path.join(folder, "documents.npy")))
        queries = np.load(os.path.join(folder, "queries.npy"))
        self._queries = rows_of(queries, self._sizes["prompt"])

    @functools.cached_property
    def _factors(self) -> pathlib.Path:
        return pathlib.Path(self._folder, "factors")

    def fit(self) -> dict[str, Any]:
        """Fits factors anew; returns the seconds."""
        from espalier.trainers.influence import fit

        shutil.rmtree(self._factors, ignore_errors=True)
        settings = fit.FitSettings(labels="empirical")
        began = time.perf_counter()
        fit.fit(self._reader, self._factors, lambda: self._documents, settings)
        return {"seconds": time.perf_counter() - began}

    def score(self, *, rank: int | None = None) -> dict[str, Any]:
        """Scores all documents for all queries; returns the seconds, and the name of the file of scores [N, Q]."""
        from espalier.trainers.influence import fit, kronecker, queries, scores

        began = time.perf_counter()
        damping = kronecker.Damping(self._sizes["damping"])
        curvature = fit.read_curvature(self._factors, self._sites, "ekfac", damping)
        prepared = queries.prepare(
            self._reader, self._sites, self._queries, curvature, rank=rank, store_dtype="float32"
        )
        scored = scores.score(self._reader, self._sites, prepared, self._documents)
        result = np.array([one.scores for one in scored])
        seconds = time.perf_counter() - began
        name = "ours.npy" if rank is None else "low_rank.npy"
        np.save(os.path.join(self._folder, name), result)
        return {"seconds": seconds, "scores": name}


def side(folder: str) -> None:
    """Answers requests on standard input until it ends; see compare.Side."""
    operations = Ours(folder)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(operations, request.pop("op"))(**request)), flush=True)
