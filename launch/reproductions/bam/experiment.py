"""BAM at small scale: runs what is left of the sweep's parts, and reads what they found."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.reproductions import domain_runs
from launch.reproductions.bam import caches

PARTS = (*domain_runs.PARTS, "caches")


def run(
    *,
    model_dir: str,
    seeds: int,
    workers: int = 1,
    minutes: float | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """What `domain_runs.part` returns of each part, with FLOPs; and under 'caches' those of caches.py.

    Args:
      model_dir: parent of the parts' folders.
      seeds: of each arm.
      workers: runs at once.
      minutes: after which a sweep stops; the same command goes on.
      parts: of PARTS.

    Raises:
      ValueError: a sweep could not be run.
      sweeps.StoppedError: it was stopped, by a signal or the time.
    """
    found: dict[str, Any] = {}
    for part in parts:
        if part == "caches":
            found[part] = caches.measure()
            continue
        folder = pathlib.Path(model_dir, part)
        one = domain_runs.part("bam", part, folder, seeds, workers=workers, minutes=minutes)
        found[part] = {**one, "rows": with_flops(one["rows"], part)}
    return found


def with_flops(rows: Sequence[Mapping[str, Any]], part: str) -> list[dict[str, Any]]:
    """Rows with 'flops': of their own training, analytic; 0 where a run was made and not trained."""
    sweep = domain_runs.sweep("bam")
    trained = dict.fromkeys(row["arm"] for row in rows if row["tokens"])
    per_token = {arm: sweep.train_flops_per_token(arm, part) for arm in trained}
    return [{**row, "flops": row["tokens"] * per_token.get(row["arm"], 0.0)} for row in rows]
