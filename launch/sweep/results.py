"""A sweep's results.jsonl: a row per finished run, for reports."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from espalier.launch.inference import row_files
from espalier.launch.sweep.folder import Planned, SweepFolder
from espalier.trainers.telemetry.metric_writers import jsonable, read_jsonl


def write_results(folder: SweepFolder, plan: Sequence[Planned]) -> None:
    """Rewrites the file atomically with one row for each finished run.

    A run whose parent is being repeated has no row until the parent is done.
    """
    rows = [result_row(folder, planned, plan) for planned in plan if folder.done(planned)]
    row_files.write(str(folder.results), map(jsonable, filter(None, rows)))


def read_results(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a sweep's results.jsonl, in the order of the sweep.

    Args:
      path: the sweep's folder (--out), or the file.

    Raises:
      FileNotFoundError: there is no results.jsonl.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "results.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: give the folder (--out) of a sweep.")
    return read_jsonl(str(file))


def result_row(folder: SweepFolder, planned: Planned, plan: Sequence[Planned]) -> dict[str, Any]:
    """Returns the row of a finished run in results.jsonl; empty if a run that it descends from is missing.

    `tokens` (positions of its batches), `loss_tokens` (without padding) and `epochs` (of each
    source) are those of this run alone, and 0 if it is `made`. With the suffix `_total`
    they include all `parents`, the runs that it descends from, nearest first: for a mixture, the seed and all branches,
    each counted once. `made_of` has the runs in a made run's command. `held_out` has the last evaluation's metrics by
    task.
    """
    by_name = {other.name: other for other in plan}
    line = [planned.name]
    for name in line:  # the loop appends to `line`
        line += [above for above in by_name[name].run.above if above not in line]
    outcomes = [one for name in line if (one := folder.outcome(by_name[name])) is not None]
    if len(outcomes) < len(line):
        return {}
    record = folder.record(planned.name)
    attempts = folder.attempts(planned.name)
    peaks = [attempt["memory_gb"] for attempt in attempts if attempt["memory_gb"]]
    epochs_total: dict[str, float] = {}
    for outcome in outcomes:
        for source, count in outcome["epochs"].items():
            epochs_total[source] = round(epochs_total.get(source, 0.0) + count, 6)
    return {
        "run": planned.name,
        "arm": planned.run.arm,
        "size": planned.run.size,
        "seed": planned.run.seed,
        "parents": line[1:],
        "made": bool(planned.run.made),
        "made_of": list(planned.run.made_of.values()) if planned.run.made else [],
        "directory": str(folder.model_dir(planned.run).relative_to(folder.path)),
        **outcomes[0],
        "start": dict(planned.start),
        "tokens_total": sum(outcome["tokens"] for outcome in outcomes),
        "epochs_total": epochs_total,
        "evaluations": {name: e["result"] for name, e in record["evaluations"].items()},
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 1),
        "memory_gb": max(peaks, default=None),
        "attempts": len(attempts),
        "digest": planned.digest,
    }
