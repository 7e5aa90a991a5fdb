"""Code in pre-training at small scale: runs the sweeps that are not done, and reads their results."""

import collections
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.shared import sweeps

TITLE = "To Code, or Not To Code?, 2408.10914"
SEEDS = 3
PARTS = {"skills": "generated text and code", "packages": "installed packages"}


def add_flags(parser: Any) -> None:
    """Adds the flags of this paper alone."""
    parser.add_argument(
        "--package_seeds",
        type=int,
        default=3,
        metavar="N",
        help="seeds of the arms of packages, to which --seeds does not apply (default: 3)",
    )


def run(
    *,
    model_dir: str,
    seeds: int,
    package_seeds: int,
    parts: Sequence[str] = tuple(PARTS),
    **options: Any,
) -> dict[str, Any]:
    """Returns the rows of both sweeps, by part.

    Args:
      model_dir: parent of the sweeps' folders.
      seeds: of the generated text and code.
      package_seeds: of the installed packages.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    files = {
        "skills": ("code_mix/sweep", seeds),
        "packages": ("code_mix/packages_sweep", package_seeds),
    }
    return sweeps.parts(model_dir, {part: files[part] for part in parts}, with_data, **options)


def with_data(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns a row of results with the data and the schedule of its run.

    Adds 'asked' and 'read', the shares of its tokens by source as configured and as read, and
    'learning_rates', [(step, rate)].
    """
    data = json.loads((directory / "run.json").read_text())["data"]
    starts = [phase["first_step"] for phase in data["phases"]] + [row["step"]]
    asked: dict[str, float] = collections.Counter()
    for phase, (first, last) in zip(data["phases"], itertools.pairwise(starts), strict=True):
        for source, share in phase["token_shares"].items():
            asked[source] += (last - first) * phase["tokens_per_step"] * share
    sources = data["sources"]
    read = {source: epochs * sources[source]["tokens"] for source, epochs in row["epochs"].items()}
    lines = (line for line in sweeps.metrics(directory) if "learning_rate" in line)
    return {
        **row,
        "asked": _shares(asked),
        "read": _shares(read),
        "learning_rates": [(line["step"], line["learning_rate"]) for line in lines],
    }


def _shares(tokens: Mapping[str, float]) -> dict[str, float]:
    total = sum(tokens.values())
    return {source: value / total for source, value in tokens.items()}
