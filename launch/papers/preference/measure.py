"""Likelihood over-optimisation at small scale: runs the unfinished part of the sweeps, and reads their results."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data.preference import topic_language
from launch.papers.shared import claim, sweeps

TITLE = "likelihood over-optimisation, 2410.11677"
SEEDS = 5
PARTS = {
    "language": "preferences in a generated language",
    "smollm": "SmolLM2-135M on arithmetic, ten minutes a run",
}
# Of an evaluation, as PreferenceIndicators names them.
INDICATORS = (
    *("llh_chosen", "llh_rejected", "llh_gap", "entropy", "mass"),
    *("ead", "length", "kl", "reward", "p_win"),
)
_DIGITS = 4


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweeps by part.

    Args:
      model_dir: parent of the sweeps' folders.
      seeds: of the language; the real model has at most three.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    files = {
        "language": ("preference/sweep", seeds),
        "smollm": ("preference/smollm_sweep", min(seeds, claim.FEW_SEEDS)),
    }
    return sweeps.parts(model_dir, {part: files[part] for part in parts}, with_course, **options)


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns arm, seed and seconds of a row of results, with what the page reads of the run's folder.

    'course' has values by evaluation, empty for a run without indicators: 'step', each of INDICATORS, 'facts' and
    'outside', the share of facts that are still known and the share of symbols outside language A in its samples; None
    where there is none. 'best_of' is of pairs.py.
    """
    from launch.papers.preference import pairs
    from trainers.preference.indicators import samples
    from trainers.preference.indicators.alarm import PREFIX

    lines = sweeps.metrics(directory)
    facts = {line["step"]: line["facts/accuracy"] for line in lines if "facts/accuracy" in line}
    evaluated = [line for line in lines if f"{PREFIX}entropy" in line]
    steps = [line["step"] for line in evaluated]
    course: dict[str, list[Any]] = {}
    if evaluated:
        course = {
            "step": steps,
            **{name: [_rounded(x.get(PREFIX + name)) for x in evaluated] for name in INDICATORS},
            "facts": [_rounded(facts.get(step)) for step in steps],
            "outside": [_rounded(outside(samples.path_of(directory, step))) for step in steps],
        }
    out = {key: row.get(key) for key in ("arm", "seed", "seconds")} | {"course": course}
    best_of = directory / pairs.BEST_OF
    return {**out, "best_of": json.loads(best_of.read_text())} if best_of.exists() else out


def _rounded(value: float | None) -> float | None:
    return round(value, _DIGITS) if value is not None and math.isfinite(value) else None


def outside(path: pathlib.Path) -> float:
    """Returns the share of the symbols of a file of samples that are not of language A; NaN where there are none."""
    if not path.exists():
        return math.nan
    rows = path.read_text(encoding="utf-8").splitlines()
    symbols = "".join(json.loads(row)["text"] for row in rows)
    strange = sum(symbol not in topic_language.LANGUAGE_A for symbol in symbols)
    return strange / len(symbols) if symbols else math.nan
