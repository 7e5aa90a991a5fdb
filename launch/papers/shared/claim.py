"""Claims of a paper, the effects that judge them, and their verdicts.

An effect is a number by seed, such as the difference of two arms of the same seed. One effect of a claim is primary and
judges it, by bounds and numbers of seeds that are written down before the runs: the claim holds where the whole interval of
the mean lies between the bounds, fails where the whole interval lies outside of them, and is undecided otherwise. Secondary
effects are shown and judge nothing. A claim that holds on measurements with exchanged arms decides nothing.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.shared import sequential
from espalier.launch.plots import intervals

VERDICTS = ("holds", "fails", "undecided", "not measured")
HOLDS, FAILS, UNDECIDED, NOT_MEASURED = VERDICTS
DRAWS = 100  # exchanges of measurements
DIFFERENT = 20  # exchanges: of fewer, no share of one in twenty can be seen
PAPER, CONTROL = GROUPS = ("of the paper", "controls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """A number by seed that bears on a claim.

    Attributes:
      where: the model or data it was measured on.
      what: the number in words, such as 'mean loss, BTX minus BAM'.
      by_seed: its value in each seed.
      unit: of the values, such as 'nats per token'.
      digits: decimals that are shown.
      note: further numbers, as text.
      unmet: why it gives no verdict, such as a collapsed router; empty if nothing speaks against one.
      absent: seed -> why it has no value, such as a missing run, of the seeds that it should have.
    """

    where: str
    what: str
    by_seed: Mapping[int, float] = dataclasses.field(default_factory=dict)
    unit: str = ""
    digits: int = 3
    note: str = ""
    unmet: str = ""
    absent: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> list[float]:
        """The values in the order of their seeds."""
        return [float(self.by_seed[seed]) for seed in sorted(self.by_seed)]

    def range(self, seeds: int | None = None, level: float = sequential.ERROR) -> dict[str, float]:
        """Returns {'value', 'low', 'high'} of the first `seeds` (default: all), unbounded for one and NaN for none."""
        values = self.values[:seeds]
        if len(values) < 2:
            value = values[0] if values else math.nan
            infinite = math.inf if values else math.nan
            return {"value": value, "low": -infinite, "high": infinite}
        return intervals.student(values, level)

    def text(self, seen: Mapping[str, float] | None = None) -> str:
        """Returns the mean of all seeds, or that `seen`, with its interval and unit; a dash where there is none."""
        seen = self.range() if seen is None else seen
        if math.isnan(seen["value"]):
            return "–"
        return f"{intervals.text(dict(seen), self.digits)} {self.unit}".rstrip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What the number of seeds of a claim was chosen by.

    Attributes:
      sd: deviation of the primary effect over the seeds of a pilot, which judge nothing.
      expected: the effect that is to be shown with a power of 80 %; for 'no worse than' usually 0.
      source: of the numbers, such as 'seeds 10 to 14'.
    """

    sd: float
    expected: float
    source: str


# (results of a part, name of that part in the report) -> effects; none where the runs are missing.
Measure = Callable[[Any, str], Sequence[Effect]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and how it is measured.

    Attributes:
      name: short, such as 'B3'.
      statement: the claim in one sentence.
      condition: when it is supported, with all margins.
      part: of the experiment, whose results have the primary effect.
      measure: of the primary effect, at most one.
      above, below: the bounds between which the primary effect supports the claim.
      planned: what the number of seeds was chosen by.
      looks: numbers of seeds at which it is judged, until it is decided.
      required: whether it must hold at small scale too.
      group: of GROUPS: whether the paper says so, or it is a control.
      paper: the paper's figure for it; empty where the paper has none.
      secondary: part -> measures of further effects.
      primary: the primary effect; set by `judge`.
      others: the secondary effects; set by `judge`.
    """

    name: str
    statement: str
    condition: str
    part: str
    measure: Measure
    above: float = -math.inf
    below: float = math.inf
    planned: Planned
    looks: tuple[int, ...]
    required: bool = False
    group: str = PAPER
    paper: str = ""
    secondary: Mapping[str, Sequence[Measure]] = dataclasses.field(default_factory=dict)
    primary: Effect | None = None
    others: Sequence[Effect] = ()

    def distance(self, value: float) -> float:
        """Returns how far a value lies from the nearer bound, negative outside."""
        return min(value - self.above, self.below - value)

    @functools.cached_property
    def _look(self) -> tuple[int, str]:
        """The number of seeds that judge it, and the verdict without regard to `why`."""
        verdict, seeds = NOT_MEASURED, 0
        if self.primary is None:
            return seeds, verdict
        for look, level in zip(self.looks, sequential.levels(self.looks), strict=True):
            if len(self.primary.by_seed) < look:
                break
            seen, seeds = self.primary.range(look, level), look
            if self.above < seen["low"] and seen["high"] < self.below:
                return seeds, HOLDS
            if seen["high"] <= self.above or seen["low"] >= self.below:
                return seeds, FAILS
            verdict = UNDECIDED
        return seeds, verdict

    @property
    def seeds(self) -> int:
        """The number of seeds that judge it, the first of the primary effect; all of them if they are too few."""
        return self._look[0] or (len(self.primary.by_seed) if self.primary else 0)

    @property
    def level(self) -> float:
        """The level of its interval."""
        every = dict(zip(self.looks, sequential.levels(self.looks), strict=True))
        return every.get(self.seeds, every[self.looks[0]])

    @property
    def range(self) -> dict[str, float]:
        """The primary effect's mean with the interval that judges it: {'value', 'low', 'high'}; NaN without values."""
        effect = self.primary or Effect(where="", what="")
        return effect.range(self.seeds or None, self.level)

    @property
    def why(self) -> str:
        """Why there is no verdict; empty if there is one."""
        if self.primary is None or not self.primary.by_seed:
            return "no runs"
        if self.primary.unmet:
            return self.primary.unmet
        if not all(map(math.isfinite, self.primary.values[: self.seeds])):
            return "a value is not a number"
        if self.too_few:
            return f"{len(self.primary.by_seed)} of {self.looks[0]} seeds"
        return ""

    @property
    def too_few(self) -> bool:
        """Whether the primary effect has fewer seeds than the first look."""
        return self.primary is not None and len(self.primary.by_seed) < self.looks[0]

    @property
    def verdict(self) -> str:
        """One of VERDICTS."""
        return NOT_MEASURED if self.why else self._look[1]

    @property
    def open(self) -> bool:
        """Whether more seeds may decide it."""
        undecided = self.verdict == UNDECIDED or (self.too_few and not self.primary.unmet)
        return undecided and self.seeds < self.looks[-1]

    @property
    def power(self) -> float:
        """The chance that its looks show the planned effect."""
        distance = self.distance(self.planned.expected)
        return sequential.planned_power(distance, self.planned.sd, self.looks)

    @property
    def smallest(self) -> float:
        """The distance from its bound that its seeds show with a power of 80 %; NaN with fewer than two."""
        if self.seeds < 2 or self.primary is None:
            return math.nan
        sd = float(np.std(self.primary.values[: self.seeds], ddof=1))
        return sequential.smallest(sd, self.seeds, self.level)

    def bounds(self) -> str:
        """Returns the bounds in words."""
        low, high = (f"{bound:.4g}" for bound in (self.above, self.below))
        if math.isfinite(self.above) and math.isfinite(self.below):
            return f"between {low} and {high}"
        return f"above {low}" if math.isfinite(self.above) else f"below {high}"


def judge(
    claims: Sequence[Claim],
    results: Mapping[str, Any],
    places: Mapping[str, str],
    *,
    secondary: bool = True,
) -> list[Claim]:
    """Returns the claims with the effects of all parts that have results; `places` are the parts' names in the report.

    A primary effect is measured as of the look that decides: seeds that ran later, for other claims, are only shown.

    Args:
      claims: to be judged.
      results: part -> its results.
      places: part -> its name.
      secondary: whether the secondary effects are measured too.

    Raises:
      ValueError: the measure of a primary effect returns more than one.
    """

    def effects(part: str, measures: Sequence[Measure]) -> list[Effect]:
        if part not in results:
            return []
        return [one for m in measures for one in _effects(m, results[part], places[part], 1)]

    out = []
    for one in claims:
        if one.part in results:
            one = _decided(one, results[one.part], places[one.part])
        more = [
            effect
            for part, measures in (one.secondary if secondary else {}).items()
            for effect in effects(part, measures)
        ]
        out.append(dataclasses.replace(one, others=more))
    return out


def _effects(measure: Measure, results: Any, place: str, first: int) -> Sequence[Effect]:
    """Returns the effects of a measure, with the seeds that they lack, of at least the `first` ones."""
    if hasattr(results, "effects"):
        return results.effects(measure, place, first)
    return measure(results, place)


def _decided(one: Claim, results: Any, place: str) -> Claim:
    """Returns a claim with its primary effect as of the look that decides it, or the last one, and the values of later seeds."""

    def measured(some: Any) -> Claim:
        primary = _effects(one.measure, some, place, one.looks[0])
        if len(primary) > 1:
            raise ValueError(f"{one.name} has {len(primary)} primary effects: one judges a claim.")
        return dataclasses.replace(one, primary=primary[0] if primary else None)

    last = measured(results)
    seeds = sorted(last.primary.by_seed) if last.primary else []
    # Results of another kind have all of their seeds at one look.
    for look in one.looks if hasattr(results, "until") else ():
        if look >= len(seeds):
            break
        early = measured(results.until(seeds[look - 1]))
        if early.primary and not early.open:
            by_seed = {**last.primary.by_seed, **early.primary.by_seed}
            return dataclasses.replace(
                early, primary=dataclasses.replace(early.primary, by_seed=by_seed)
            )
    return last


def unmet(judged: Sequence[Claim], parts: Sequence[str]) -> list[str]:
    """Returns why the reproduction of `parts` fails: required claims of them that do not hold."""
    return [
        f"{one.name} must hold, and its verdict is: {one.verdict}"
        + (f" ({one.why})" * bool(one.why))
        for one in judged
        if one.required and one.part in parts and one.verdict != HOLDS
    ]


def exchanges(
    judge_them: Callable[[Mapping[str, Any]], Sequence[Claim]],
    shuffle: Callable[[Mapping[str, Any], np.random.Generator], Mapping[str, Any]],
    measured: Mapping[str, Any],
    draws: int = DRAWS,
) -> dict[str, dict[str, Any]]:
    """Returns what the claims would be if no arm differed from another, from exchanged measurements.

    Args:
      judge_them: returns the judged claims of measurements.
      shuffle: returns measurements of a part that are exchanged at random.
      measured: the measurements, by part.
      draws: how often they are exchanged.

    Returns:
      Name -> {'draws': those with a verdict that change the primary effect, 'different': how many different means they have,
      'holds': how many of the draws hold, 'low', 'high': between which nine tenths of the means lie}; without claims that have
      fewer than DIFFERENT different means.
    """
    means, verdicts = collections.defaultdict(list), collections.defaultdict(list)
    effects = {one.name: one.primary for one in judge_them(measured)}
    for draw in range(draws):
        # Each part has draws of its own: one that is measured later changes nothing of the others.
        drawn = {
            part: shuffle({part: value}, np.random.default_rng([draw, *part.encode()]))[part]
            for part, value in measured.items()
        }
        for one in judge_them(drawn):
            # Of two arms and three seeds, one exchange in eight leaves each of them where it was.
            if one.verdict != NOT_MEASURED and one.primary != effects[one.name]:
                verdicts[one.name].append(one.verdict)
                means[one.name].append(one.range["value"])
    return {
        name: {
            "draws": len(every),
            "different": different,
            "holds": every.count(HOLDS),
            **dict(
                zip(
                    ("low", "high"),
                    map(finite, np.quantile(means[name], (0.05, 0.95))),
                    strict=True,
                )
            ),
        }
        for name, every in verdicts.items()
        if (different := len(set(map(finite, means[name])))) >= DIFFERENT
    }


def record(
    judged: Sequence[Claim], exchanged_: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the claims as results.json has them, with what `exchanges` returns."""
    return [
        {
            **{"claim": one.name, "statement": one.statement, "condition": one.condition},
            **{"paper": one.paper, "required": one.required, "group": one.group},
            **{"verdict": one.verdict, "why": one.why},
            **_primary(one),
            "planned": {
                **dataclasses.asdict(one.planned),
                "power": round(one.power, 2),
            },
            "looks": list(one.looks),
            "smallest": finite(one.smallest),
            "exchanged": exchanged_.get(one.name),
            "secondary": [_recorded(effect) for effect in one.others],
        }
        for one in judged
    ]


def _primary(one: Claim) -> dict[str, Any]:
    seen = one.range
    effect = one.primary or Effect(where="", what="")
    return {
        "effect": finite(seen["value"]),
        "interval": [finite(seen["low"]), finite(seen["high"])],
        "seeds": sorted(effect.by_seed)[: one.seeds],
        "level": finite(one.level),
        "above": finite(one.above),
        "below": finite(one.below),
        **_recorded(effect),
    }


def _recorded(effect: Effect) -> dict[str, Any]:
    return {
        **{"where": effect.where, "what": effect.what, "unit": effect.unit, "note": effect.note},
        **(
            {"absent": {str(seed): why for seed, why in effect.absent.items()}}
            if effect.absent
            else {}
        ),
        "by_seed": {str(seed): finite(value) for seed, value in effect.by_seed.items()},
    }


def finite(value: float) -> float | None:
    """Returns a number to six digits as JSON has it: None for one that is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


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
