"""BAM at small scale: runs what is left of the sweep's parts, and reads what they found."""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.bam import caches
from launch.papers.shared import domains

PARTS = (*domains.PARTS, "caches")


def run(*, parts: Sequence[str] = PARTS, **settings: Any) -> dict[str, Any]:
    """What `domain_runs.run` finds, its rows with FLOPs; and under 'caches' what caches.py measures.

    Args:
      parts: of PARTS.
      **settings: the others of `domain_runs.run`, which says what is raised too.
    """
    swept = [part for part in parts if part in domains.PARTS]
    found = domains.run("bam", parts=swept, **settings)
    for name, part in found.items():
        part["rows"] = with_flops(part["rows"], name)
    return found | ({"caches": caches.measure()} if "caches" in parts else {})


def with_flops(rows: Sequence[Mapping[str, Any]], part: str) -> list[dict[str, Any]]:
    """Rows with 'flops': of their own training, analytic; 0 where a run was made and not trained."""
    sweep = domains.sweep("bam")
    trained = dict.fromkeys(row["arm"] for row in rows if row["tokens"])
    per_token = {arm: sweep.train_flops_per_token(arm, part) for arm in trained}
    return [{**row, "flops": row["tokens"] * per_token.get(row["arm"], 0.0)} for row in rows]
