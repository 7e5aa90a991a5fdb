"""Claims of a paper, the effects that judge them, and their verdicts.

An effect is a number by seed, such as the difference of two arms of the same seed, with a 95 % interval over seeds and
bounds that are written down before the runs. It holds where the whole interval lies between its bounds, fails where
the whole interval lies outside of them, and is undecided otherwise. Criteria are fixed before the first run; a claim that
holds on measurements with exchanged arms decides nothing.
"""

import collections
import dataclasses
import datetime
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files
from espalier.launch import environment
from espalier.launch.plots import intervals

VERDICTS = ("holds", "fails", "mixed", "undecided", "not measured")
HOLDS, FAILS, MIXED, UNDECIDED, NOT_MEASURED = VERDICTS
SEEDS = 5  # of an effect, where a run takes less than two minutes
FEW_SEEDS = 3  # where it takes longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """One number that judges a claim.

    Attributes:
      where: the model or data it was measured on.
      what: the number in words, such as 'mean loss, BTX less BAM'.
      by_seed: its value in each seed.
      above, below: the claim is supported by values between these bounds.
      unit: of the values, such as 'nats per token'.
      digits: decimals that are shown.
      note: further numbers, as text.
      unmet: why it gives no verdict, such as a collapsed router; empty if nothing speaks against one.
      interval: {'value', 'low', 'high'} where it is not Student's over seeds, such as a bootstrap over prompts.
      exact: whether the number is without noise, such as a count of bytes; its interval is the range of its values.
      seeds: the least number of seeds for a verdict, where the interval is Student's.
    """

    where: str
    what: str
    by_seed: Mapping[int, float] = dataclasses.field(default_factory=dict)
    above: float = -math.inf
    below: float = math.inf
    unit: str = ""
    digits: int = 3
    note: str = ""
    unmet: str = ""
    interval: Mapping[str, float] | None = None
    exact: bool = False
    seeds: int = SEEDS

    @functools.cached_property
    def range(self) -> Mapping[str, float]:
        """The mean with its interval: {'value', 'low', 'high'}; NaN without values, unbounded for one seed."""
        if self.interval is not None:
            return self.interval
        values = [float(value) for value in self.by_seed.values()]
        if not values:
            return dict.fromkeys(("value", "low", "high"), math.nan)
        if self.exact:
            return {"value": sum(values) / len(values), "low": min(values), "high": max(values)}
        if len(values) == 1:
            return {"value": values[0], "low": -math.inf, "high": math.inf}
        return intervals.student(values)

    @property
    def why(self) -> str:
        """Why it gives no verdict; empty if it gives one."""
        if self.unmet:
            return self.unmet
        if math.isnan(self.range["value"]):
            return "a value is not a number" if self.by_seed else "no runs"
        if self.interval is None and not self.exact and len(self.by_seed) < self.seeds:
            return f"{len(self.by_seed)} of {self.seeds} seeds"
        return ""

    @property
    def verdict(self) -> str:
        if self.why:
            return NOT_MEASURED
        if self.above < self.range["low"] and self.range["high"] < self.below:
            return HOLDS
        if self.range["high"] <= self.above or self.range["low"] >= self.below:
            return FAILS
        return UNDECIDED

    @property
    def slack(self) -> float:
        """How far the interval lies inside the bounds, in widths of the interval; negative outside."""
        room = min(self.range["low"] - self.above, self.below - self.range["high"])
        width = self.range["high"] - self.range["low"]
        return room / width if width > 0 else math.copysign(math.inf, room)

    def text(self) -> str:
        """Returns the value with its interval and unit; a dash where there is none."""
        if math.isnan(self.range["value"]):
            return "–"
        if self.exact and self.range["low"] == self.range["high"]:
            shown = f"{self.range['value']:,.{self.digits}f}"
        else:
            shown = intervals.text(self.range, self.digits)
        return f"{shown} {self.unit}".rstrip()

    def bounds(self) -> str:
        """Returns the bounds in words."""
        low, high = (f"{bound:.4g}" for bound in (self.above, self.below))
        if math.isfinite(self.above) and math.isfinite(self.below):
            return f"between {low} and {high}"
        return f"above {low}" if math.isfinite(self.above) else f"below {high}"


# (results of a part, name of that part in the report) -> effects; none where the runs are missing.
Measure = Callable[[Any, str], Sequence[Effect]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and how it is measured.

    Attributes:
      name: short, such as 'B3'.
      statement: the claim in one sentence.
      condition: when it is supported, with all margins.
      measures: part of the experiment -> functions that measure the claim there.
      required: whether it must hold at small scale too.
      paper: the paper's figure for it; empty where the paper has none.
      by_part: part with results -> its effects; set by `judge`.
    """

    name: str
    statement: str
    condition: str
    measures: Mapping[str, Sequence[Measure]]
    required: bool = False
    paper: str = ""
    by_part: Mapping[str, Sequence[Effect]] = dataclasses.field(default_factory=dict)

    @property
    def effects(self) -> list[Effect]:
        return [one for part in self.by_part.values() for one in part]

    @property
    def verdict(self) -> str:
        """One of VERDICTS: 'mixed' where some effects hold and some fail, else the worst of the effects' verdicts."""
        verdicts = {one.verdict for one in self.effects}
        if verdicts >= {HOLDS, FAILS}:
            return MIXED
        worst = (FAILS, UNDECIDED, NOT_MEASURED, HOLDS)
        return next((one for one in worst if one in verdicts), NOT_MEASURED)

    @property
    def deciding(self) -> Effect | None:
        """The effect that decides the verdict: of the worst verdict, the one that lies least inside its bounds."""
        verdict = FAILS if self.verdict == MIXED else self.verdict
        worst = [one for one in self.effects if one.verdict == verdict]
        return min(worst, key=lambda one: one.slack, default=None)


def judge(
    claims: Sequence[Claim], results: Mapping[str, Any], places: Mapping[str, str]
) -> list[Claim]:
    """Returns the claims with the effects of all parts that have results; `places` are the parts' names in the report."""
    return [
        dataclasses.replace(
            claim,
            by_part={
                part: [one for measure in measures for one in measure(results[part], places[part])]
                for part, measures in claim.measures.items()
                if part in results
            },
        )
        for claim in claims
    ]


def unmet(judged: Sequence[Claim], parts: Sequence[str]) -> list[str]:
    """Returns why the reproduction of `parts` fails: required claims that do not hold in them."""
    out = []
    for claim in judged:
        if not claim.required:
            continue
        missing = [part for part in claim.measures if part in parts and not claim.by_part.get(part)]
        if claim.effects and claim.verdict != HOLDS:
            out.append(f"{claim.name} must hold, and its verdict is: {claim.verdict}")
        else:
            out += [
                f"{claim.name} must hold, and part {part} has not measured it" for part in missing
            ]
    return out


def record(judged: Sequence[Claim]) -> list[dict[str, Any]]:
    """Returns the claims as results.json has them; effect, interval and seeds are those of the deciding effect."""
    out = []
    for claim in judged:
        decides = claim.deciding
        seen = _numbers(decides) if decides else {"effect": None, "interval": None, "seeds": []}
        out.append(
            {
                **{"claim": claim.name, "statement": claim.statement, "condition": claim.condition},
                **{"paper": claim.paper, "required": claim.required, "verdict": claim.verdict},
                **seen,
                "effects": [_recorded(one) for one in claim.effects],
            }
        )
    return out


def _recorded(effect: Effect) -> dict[str, Any]:
    return {
        **{"where": effect.where, "what": effect.what, "verdict": effect.verdict},
        **_numbers(effect),
        **{"unit": effect.unit, "above": _finite(effect.above), "below": _finite(effect.below)},
        "by_seed": {str(seed): _finite(value) for seed, value in effect.by_seed.items()},
        **{"why": effect.why, "note": effect.note},
    }


def _numbers(effect: Effect) -> dict[str, Any]:
    value, *interval = (_finite(effect.range[key]) for key in ("value", "low", "high"))
    return {"effect": value, "interval": interval, "seeds": list(effect.by_seed)}


def _finite(value: float) -> float | None:
    """Returns a number to six digits as JSON has it: None for one that is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


_CRITERIA = "criteria.json"


def fix_criteria(folder: pathlib.Path, claims: Sequence[Claim]) -> dict[str, Any]:
    """Writes the criteria into the folder of an experiment before its first run, and returns those in force.

    Returns:
      {'date', 'commit', 'dirty', 'claims': name -> statement, condition and whether it must hold}: those of the first
      call after which the folder got runs.
    """
    path = folder / _CRITERIA
    started = folder.is_dir() and any(one.name != _CRITERIA for one in folder.iterdir())
    if started and path.exists():
        return json.loads(path.read_bytes())
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    fixed = {"date": date, **environment.commit(), "late": started, "claims": criteria_of(claims)}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, fixed, synced=True)  # its date is before the runs
    return fixed


def criteria_of(claims: Sequence[Claim]) -> dict[str, list[Any]]:
    """Returns what a claim may not change after its runs, by name."""
    return {one.name: [one.statement, one.condition, one.required] for one in claims}


def criteria_in_words(fixed: Mapping[str, Any] | None, claims: Sequence[Claim]) -> str:
    """Returns when the criteria were fixed and which of them have changed since, as a sentence."""
    if fixed is None:
        return "No record says when the criteria were fixed."
    commit = f" at commit {fixed['commit'][:10]}" if fixed["commit"] else ""
    dirty = " with uncommitted changes" if fixed["dirty"] else ""
    when = "after the first runs" if fixed["late"] else "before the first run"
    now = criteria_of(claims)
    changed = [name for name in now if fixed["claims"].get(name) != now[name]]
    since = f"changed since: {', '.join(changed)}" if changed else "none has changed since"
    return f"Criteria were fixed {when}, on {fixed['date']}{commit}{dirty}; {since}."


def exchanged(values: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns a table with its values under other names of it, at random."""
    listed = list(values.values())
    return {name: listed[i] for name, i in zip(values, rng.permutation(len(listed)), strict=True)}


def shuffle_arms(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the parts of an experiment with arms exchanged at random within each seed and size.

    Arms are exchanged with others that have the same evaluations. Parts without rows of runs stay as they are.
    """
    return {
        part: {**value, "rows": _shuffled(value["rows"], rng)}
        if isinstance(value, Mapping) and "rows" in value
        else _shuffled(value, rng)
        if isinstance(value, list) and all("arm" in row for row in value)
        else value
        for part, value in measured.items()
    }


def _shuffled(rows: list[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    groups = collections.defaultdict(list)
    for at, row in enumerate(rows):
        evaluations = tuple(
            sorted(name for name, one in (row.get("evaluations") or {}).items() if one)
        )
        key = row["seed"], row.get("size"), bool(row.get("held_out")), evaluations
        groups[key].append(at)
    out = list(rows)
    for places in groups.values():
        for at, source in zip(places, rng.permutation(places), strict=True):
            out[at] = {**rows[source], "arm": rows[at]["arm"]}
    return out
