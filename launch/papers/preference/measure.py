"""Likelihood over-optimisation at small scale: runs the unfinished part of the sweep, and reads its results."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data.preference import topic_language
from launch.papers.shared import sweeps

TITLE = "likelihood over-optimisation, 2410.11677"
SEEDS = 3
PARTS = {"language": "preferences in a generated language"}
# Of an evaluation, as PreferenceIndicators names them.
INDICATORS = (
    *("llh_chosen", "llh_rejected", "llh_gap", "entropy", "mass"),
    *("ead", "length", "kl", "reward", "p_win"),
)


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep by part.

    Args:
      model_dir: parent of the sweep's folder.
      seeds: of the sweep.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    files = {part: ("preference/sweep", seeds) for part in parts}
    return sweeps.parts(model_dir, files, with_course, **options)


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns a row of results with the 'course' of its run, by evaluation; empty for a run without indicators.

    An evaluation is {'step', each of INDICATORS, 'facts', 'outside'}: the share of facts that are still known, and
    the share of symbols outside language A in its samples. Missing numbers are NaN.
    """
    from trainers.preference.indicators import samples
    from trainers.preference.indicators.alarm import PREFIX

    lines = sweeps.metrics(directory)
    facts = {line["step"]: line["facts/accuracy"] for line in lines if "facts/accuracy" in line}
    course = [
        {
            "step": line["step"],
            **{name: line.get(PREFIX + name, math.nan) for name in INDICATORS},
            "facts": facts.get(line["step"], math.nan),
            "outside": outside(samples.path_of(directory, line["step"])),
        }
        for line in lines
        if f"{PREFIX}entropy" in line
    ]
    return {**row, "course": course}


def outside(path: pathlib.Path) -> float:
    """Returns the share of the symbols of a file of samples that are not of language A; NaN where there are none."""
    if not path.exists():
        return math.nan
    rows = path.read_text(encoding="utf-8").splitlines()
    symbols = "".join(json.loads(row)["text"] for row in rows)
    strange = sum(symbol not in topic_language.LANGUAGE_A for symbol in symbols)
    return strange / len(symbols) if symbols else math.nan
