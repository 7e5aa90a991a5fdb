"""Nexus at small scale: runs what is left of the sweep's parts, and reads what they found."""

import pathlib
from collections.abc import Sequence
from typing import Any

from launch.reproductions import domain_runs


def run(
    *,
    model_dir: str,
    seeds: int,
    workers: int = 1,
    minutes: float | None = None,
    parts: Sequence[str] = domain_runs.PARTS,
) -> dict[str, Any]:
    """What `domain_runs.part` returns, by part.

    Args:
      model_dir: parent of the parts' folders.
      seeds: of each arm.
      workers: runs at once.
      minutes: after which a sweep stops; the same command goes on.
      parts: of domain_runs.PARTS.

    Raises:
      ValueError: a sweep could not be run.
      sweeps.StoppedError: it was stopped, by a signal or the time.
    """
    return {
        part: domain_runs.part(
            "nexus", part, pathlib.Path(model_dir, part), seeds, workers=workers, minutes=minutes
        )
        for part in parts
    }
