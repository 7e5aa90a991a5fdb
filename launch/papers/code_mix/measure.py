"""Code in pre-training at small scale: runs the sweeps that are not done, and reads their results."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.shared import sweeps

TITLE = "To Code, or Not To Code?, 2408.10914"
SEEDS = 3
PARTS = {"skills": "generated text and code", "packages": "installed packages"}
_SWEEPS = {"skills": "code_mix/sweep", "packages": "code_mix/packages_sweep"}


def add_flags(parser: Any) -> None:
    """Adds the flags of this paper alone."""
    parser.add_argument(
        "--package_seeds",
        type=int,
        default=3,
        metavar="N",
        help="of the arms of packages, which --seeds leaves alone (default: 3)",
    )


def run(
    *,
    model_dir: str,
    seeds: int,
    package_seeds: int,
    parts: Sequence[str] = tuple(PARTS),
    **options: Any,
) -> dict[str, Any]:
    """Returns the rows of both sweeps, by part; other arguments as of `sweeps.rows`.

    Args:
      model_dir: parent of the sweeps' folders.
      seeds: of the generated text and code.
      package_seeds: of the installed packages.
      parts: of PARTS.
      **options: workers and minutes.
    """
    counts = {"skills": seeds, "packages": package_seeds}
    folder = pathlib.Path(model_dir)
    return {
        part: sweeps.measured(folder / part, _SWEEPS[part], counts[part], with_data, **options)
        for part in parts
    }


def with_data(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns a row of results with the data and the schedule of its run.

    Adds 'asked' and 'read', the shares of its tokens by source as configured and as read, and
    'learning_rates', [(step, rate)].
    """
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
        for metrics in sweeps.metrics(directory)
        if "learning_rate" in metrics
    ]
    return {**row, "asked": _shares(asked), "read": _shares(read), "learning_rates": rates}


def _shares(tokens: Mapping[str, float]) -> dict[str, float]:
    total = sum(tokens.values())
    return {source: value / total for source, value in tokens.items()}
