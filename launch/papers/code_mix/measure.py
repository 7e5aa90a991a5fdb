"""Code in pre-training at small scale: runs the sweeps that are not done, and reads what they found."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.shared import sweeps

PARTS = ("skills", "packages")
_SWEEPS = {"skills": "sweep", "packages": "packages_sweep"}


def run(
    *,
    model_dir: str,
    seeds: int,
    package_seeds: int,
    workers: int = 1,
    minutes: float | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """The rows of both sweeps, by part; what has been trained and measured before is read.

    Args:
      model_dir: parent of the sweeps' folders.
      seeds: of the generated text and code.
      package_seeds: of the installed packages.
      workers: runs at once.
      minutes: after which a sweep stops; the same command goes on.
      parts: of PARTS.

    Raises:
      ValueError: a sweep could not be run.
      StoppedError: it was stopped, by a signal or the time.
    """
    counts = {"skills": seeds, "packages": package_seeds}
    folder = pathlib.Path(model_dir)
    found: dict[str, Any] = {}
    for part in parts:
        rows = sweeps.rows(
            folder / part,
            f"code_mix/{_SWEEPS[part]}",
            counts[part],
            workers=workers,
            minutes=minutes,
        )
        found[part] = [with_data(row, folder / part / row["directory"]) for row in rows]
    return found


def with_data(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """A row of results with what its run's directory says of its data and schedule.

    Adds 'asked' and 'read', the shares of its tokens by source as configured and as read, and
    'learning_rates', [(step, rate)].
    """
    from trainers.telemetry.metric_writers import rows_in_force

    data = json.loads((directory / "run.json").read_text())["data"]
    starts = [phase["first_step"] for phase in data["phases"]] + [row["step"]]
    asked: dict[str, float] = {}
    for phase, first, last in zip(data["phases"], starts, starts[1:], strict=False):
        for source, share in phase["token_shares"].items():
            tokens = (last - first) * phase["tokens_per_step"] * share
            asked[source] = asked.get(source, 0.0) + tokens
    read = {
        source: epochs * data["sources"][source]["tokens"]
        for source, epochs in row["epochs"].items()
    }
    rates = [
        (metrics["step"], metrics["learning_rate"])
        for metrics in rows_in_force(str(directory / "metrics.jsonl"))
        if "learning_rate" in metrics
    ]
    return {**row, "asked": _shares(asked), "read": _shares(read), "learning_rates": rates}


def _shares(tokens: Mapping[str, float]) -> dict[str, float]:
    total = sum(tokens.values())
    return {source: value / total for source, value in tokens.items()}
