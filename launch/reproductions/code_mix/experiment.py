"""Code in pre-training at small scale: runs the sweeps that are not done, and reads what they found."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

PARTS = ("skills", "packages")
_SWEEPS = pathlib.Path(__file__).parents[2] / "sweeps"


class StoppedError(Exception):
    """A sweep was stopped and goes on when it is started again."""


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
    return {
        part: _rows(folder / part, f"{_SWEEPS}/code_mix_{part}.py:{counts[part]}", workers, minutes)
        for part in parts
    }


def _rows(
    folder: pathlib.Path, sweep_file: str, workers: int, minutes: float | None
) -> list[dict[str, Any]]:
    from launch import cli, sweep

    words = [f"--sweep={sweep_file}", f"--out={folder}", f"--workers={workers}"]
    status = sweep.main([*words, *([] if minutes is None else [f"--minutes={minutes}"])])
    if status == cli.INTERRUPTED:
        raise StoppedError(f"The sweep in {folder} was stopped; the same command goes on.")
    if status == 2:
        raise ValueError(f"The sweep {sweep_file} was not run; see above.")
    # With status 1 some runs have failed: the others are reported.
    return [with_data(row, folder / row["directory"]) for row in sweep.read_results(folder)]


def with_data(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """A row of results with what its run's directory says of its data and schedule.

    Adds 'asked' and 'read', the shares of its tokens by source as configured and as read, and
    'learning_rates', [(step, rate)].
    """
    from trainers.metric_writers import rows_in_force

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
