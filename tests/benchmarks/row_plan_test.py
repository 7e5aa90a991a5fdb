"""The sparse plan of the benchmark is, at the rows that are read, the plan of its cache."""

import pathlib
import shutil

import numpy as np

from espalier.data.cache import pool
from espalier.data.stream import order, rows, stored_plan
from tests.benchmarks import row_plan


def test_the_sparse_plan_has_the_rows_of_the_real_one(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_plan, "IN_MEMORY", 1)
    monkeypatch.setattr(pool, "_limit", 1)
    cache = row_plan.make_cache(tmp_path / "a", 6, 200)
    assert cache.num_records == 1200
    row_plan._sparse_plan(cache, [0, 10**9])

    def read() -> tuple[int, list[np.ndarray]]:
        plan = rows.plan_source("whole", cache, {"targets": row_plan.LENGTH}).plan
        positions = np.array([0, 10**9])[:, None] * row_plan.BATCH + np.arange(row_plan.BATCH)
        read_B = order.shuffled_rows(positions.reshape(-1), plan.num_rows, 0, "whole")[1]
        segment_S = rows.segments(plan, read_B)[2]
        fields = (plan.records, plan.offsets, plan.lengths["targets"], plan.begins["targets"])
        return plan.num_rows, [field[segment_S] for field in fields]

    num_rows, sparse = read()
    shutil.rmtree(pathlib.Path(f"{cache.directory}.plans"))
    again, real = read()
    assert num_rows == again
    for one, other in zip(sparse, real, strict=True):
        np.testing.assert_array_equal(one, other)
