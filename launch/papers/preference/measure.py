"""Preferences followed too far, at small scale: runs what is left of the sweep, and reads what it found."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data.preference import topic_language
from launch.papers.shared import sweeps

PARTS = ("language",)
# Of an evaluation, as PreferenceIndicators names them.
INDICATORS = (
    "llh_chosen",
    "llh_rejected",
    "llh_gap",
    "entropy",
    "mass",
    "ead",
    "length",
    "kl",
    "reward",
    "p_win",
)


def run(
    *,
    model_dir: str,
    seeds: int,
    workers: int = 1,
    minutes: float | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """The rows of the sweep by part; what has been trained before is not trained again.

    Args:
      model_dir: parent of the sweep's folder.
      seeds: of the sweep.
      workers: runs at once.
      minutes: after which it stops; the same command goes on.
      parts: of PARTS.

    Raises:
      ValueError: the sweep could not be run.
      sweeps.StoppedError: it was stopped, by a signal or the time.
    """
    folder = pathlib.Path(model_dir)
    found = {}
    for part in parts:
        rows = sweeps.rows(
            folder / part, "preference/sweep", seeds, workers=workers, minutes=minutes
        )
        found[part] = [with_course(row, folder / part / row["directory"]) for row in rows]
    return found


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """A row of results with the 'course' of its run, by evaluation; empty for a run that has no indicators.

    An evaluation is {'step', each of INDICATORS, 'facts', 'outside'}: the share of facts that are still known, and
    that of symbols outside language A in its samples. What is not a number was not there.
    """
    from trainers.preference.indicators import samples
    from trainers.preference.indicators.alarm import PREFIX
    from trainers.telemetry.metric_writers import rows_in_force

    path = directory / "metrics.jsonl"
    lines = rows_in_force(str(path)) if path.exists() else []
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
    """Share of the symbols of a file of samples that are not of language A; NaN where there are none."""
    if not path.exists():
        return math.nan
    rows = path.read_text(encoding="utf-8").splitlines()
    symbols = "".join(json.loads(row)["text"] for row in rows)
    strange = sum(symbol not in topic_language.LANGUAGE_A for symbol in symbols)
    return strange / len(symbols) if symbols else math.nan
