"""The results of a part of an experiment: one table of scores by arm, size and seed, and effects from pairs of arms."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd

from espalier.launch.papers.shared.claim import Effect, Measure
from espalier.launch.plots import intervals

Case = str | tuple[str, str | None]  # an arm at the main size, or (arm, size)
# The arms that measures have read, while `reading` lasts.
_READ: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("read", default=None)


@contextlib.contextmanager
def reading() -> Iterator[set[str]]:
    """Yields the names of the arms that are read from `Results` within the context; an outer context has them too."""
    arms: set[str] = set()
    outer, token = _READ.get(), _READ.set(arms)
    try:
        yield arms
    finally:
        _READ.reset(token)
        if outer is not None:
            outer |= arms


def _read(arm: str) -> None:
    if (arms := _READ.get()) is not None:
        arms.add(arm)


@dataclasses.dataclass(frozen=True)
class Results:
    """Runs of a sweep. A paper's subclass defines the scores of a run.

    Attributes:
      rows: one per run, with 'arm', 'seed' and, in sweeps over sizes, 'size'.
    """

    rows: Sequence[Mapping[str, Any]]
    main = None  # the size at which arms are compared, in sweeps over sizes

    def row_scores(self, row: Mapping[str, Any]) -> Mapping[str, float | None]:
        """Returns all scores of a run by name."""
        raise NotImplementedError

    def lower_is_better(self, score: str) -> bool:
        del score
        return True

    def digits(self, score: str) -> int:
        """Returns the number of decimals that a score is shown with."""
        del score
        return 2

    def label(self, arm: str) -> str:
        """Returns the name of an arm in the report."""
        return arm.replace("_", " ")

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """The columns arm, size and seed, and one for each score; NaN where a run lacks a score."""
        keys = [{key: row.get(key) for key in ("arm", "size", "seed")} for row in self.rows]
        scores = [self.row_scores(row) for row in self.rows]
        frame = pd.DataFrame(keys, columns=["arm", "size", "seed"], dtype=object)
        return frame.join(pd.DataFrame(scores, dtype=float))

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(row["arm"] for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})

    def find(self, arm: str, size: str | None = None) -> dict[int, Mapping[str, Any]]:
        """Returns the rows of an arm by seed, at a size or else at the main one."""
        _read(arm)
        return {
            row["seed"]: row
            for row in self.rows
            if row["arm"] == arm and row.get("size") in (None, size or self.main)
        }

    def has(self, *arms: str) -> bool:
        return all(self.find(arm) for arm in arms)

    def until(self, seed: int) -> Self:
        """Returns the results of the seeds up to one."""
        if seed not in self._until:
            rows = [row for row in self.rows if row["seed"] <= seed]
            self._until[seed] = dataclasses.replace(self, rows=rows)
        return self._until[seed]

    @functools.cached_property
    def _until(self) -> dict[int, Self]:
        """What `until` has returned, which all claims share."""
        return {}

    def shared(self, *arms: str) -> Self:
        """Returns the results of the seeds that all of these arms have, of those that any run has: for means side by side."""
        seeds = [set(rows) for arm in arms if (rows := self.find(arm))]
        both = set.intersection(*seeds) if seeds else set()
        return dataclasses.replace(self, rows=[row for row in self.rows if row["seed"] in both])

    def effects(self, measure: Measure, where: str, first: int = 1) -> list[Effect]:
        """Returns the effects of a measure, each with the seeds it lacks up to its last one, and of the `first` ones."""
        with reading() as arms:
            effects = measure(self, where)
        rows = {
            arm: {row["seed"] for row in self.rows if row["arm"] == arm} for arm in sorted(arms)
        }
        return [
            dataclasses.replace(one, absent=_absent(one.by_seed, rows, first)) for one in effects
        ]

    def scores(self, arm: str, score: str, size: str | None = None) -> pd.Series:
        """Returns a score of an arm by seed, of the runs that have it: the same series each time, not to be changed."""
        _read(arm)
        if (key := (arm, score, size)) not in self._series:
            sizes = (None, size or self.main)
            values = {
                row["seed"]: scores.get(score)
                for row, scores in self._scored.get(arm, ())
                if self.main is None or row.get("size") in sizes
            }
            self._series[key] = pd.Series(values, dtype=float).dropna()
        return self._series[key]

    @functools.cached_property
    def _series(self) -> dict[tuple[str, str, str | None], pd.Series]:
        """What `scores` has returned, which a judgement asks for several times."""
        return {}

    @functools.cached_property
    def _scored(self) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, float | None]]]]:
        """The rows of each arm with their scores: without tables, since exchanges of arms ask for them again and again."""
        by_arm: dict[str, list] = {}
        for row in self.rows:
            by_arm.setdefault(row["arm"], []).append((row, self.row_scores(row)))
        return by_arm

    def values(self, arm: str, score: str, size: str | None = None) -> np.ndarray:
        """Returns a score of an arm, one value per seed."""
        return self.scores(arm, score, size).to_numpy()

    def paired(self, score: str, *cases: Case) -> list[np.ndarray]:
        """Returns a score of arms at the seeds that all of them have, in one order."""
        return aligned(*(self.scores(arm, score, size) for arm, size in map(_split, cases)))

    def mean(self, values: np.ndarray, score: str) -> str:
        """Returns the mean over seeds with its interval, as text."""
        return intervals.text(intervals.over_seeds(values), self.digits(score))

    def title(self, arm: str) -> str:
        """Returns the name of an arm in tables, with that in the sweep."""
        return f"{self.label(arm)} (`{arm}`)"

    def cells(self, arm: str, scores: Sequence[str]) -> list[str]:
        """Returns the means of an arm's scores over seeds as cells of a table; empty ones where no run has a score."""
        values = [self.values(arm, score) for score in scores]
        return [self.mean(x, s) if x.size else "" for x, s in zip(values, scores, strict=True)]

    def amount(self) -> str:
        """Returns the number of runs, their seeds and the minutes they took, as text."""
        minutes = sum(row["seconds"] for row in self.rows) / 60
        return f"{len(self.rows)} runs, seeds {', '.join(map(str, self.seeds))}; {minutes:.0f} minutes of runs"

    def missing(self, arms: Sequence[str], first: int) -> list[str]:
        """Returns the names of arms without a run for some of the first seeds, with these; only some arms have further ones."""
        seeds = self.seeds[:first]
        return [
            text
            for arm in arms
            for text in named(f"`{arm}`", [s for s in seeds if s not in self.find(arm)], seeds)
        ]

    def degenerate(self, row: Mapping[str, Any]) -> str:
        """Returns why a run gives no verdict, such as a collapsed router; empty if it is sound."""
        del row
        return ""

    def limits(self, score: str) -> tuple[float, float] | None:
        """Returns what a score is without learning, and what is attainable; None if it cannot be at an end.

        Arms that are all at most at the first, or all at least at the second, are not compared.
        """
        del score
        return None

    def parts(self, score: str) -> Sequence[str]:
        """Returns the scores of which a score is the mean; each has its own `limits`."""
        del score
        return ()

    def unmet(self, score: str, *cases: Case) -> str:
        """Returns why a comparison gives no verdict; empty if nothing speaks against one."""
        every = [self.find(*_split(case)) for case in cases]
        reasons = [
            f"{self._name(case)}, seed {seed}: {reason}"
            for case, rows in zip(cases, every, strict=True)
            for seed, row in rows.items()
            if all(seed in others for others in every) and (reason := self.degenerate(row))
        ]
        if reasons:
            return "; ".join(reasons)
        for part in (score, *self.parts(score)):
            means = [values.mean() for values in self.paired(part, *cases) if values.size]
            if not means or (limits := self.limits(part)) is None:
                continue
            floor, ceiling = limits
            for dead, end in ((max(means) <= floor, "floor"), (min(means) >= ceiling, "ceiling")):
                if dead:
                    return f"all arms are at the {end} of {part.replace('_', ' ')}"
        return ""

    def gain(
        self,
        where: str,
        score: str,
        one: Case,
        other: Case,
        *,
        relative: bool = False,
        **settings: Any,
    ) -> list[Effect]:
        """Returns the effect of an arm being better than another; nothing where one is missing.

        Args:
          where: the model or data.
          score: of `row_scores`.
          one: the arm that is said to be better: the effect is positive where it is.
          other: the arm it is compared with.
          relative: whether differences are in per cent of the other arm's score.
          **settings: further fields of Effect.
        """
        cases = one, other
        scores = [self.scores(arm, score, size) for arm, size in map(_split, cases)]
        both = pd.concat(scores, axis=1, join="inner").sort_index()
        if both.empty:
            return []
        gaps = both.iloc[:, 0] - both.iloc[:, 1]
        if self.lower_is_better(score):
            gaps = -gaps
        if relative:
            gaps = 100 * gaps / both.iloc[:, 1]
        labels = [self._name(case) for case in cases]
        means = [
            f"{label} {mean:.{self.digits(score)}f}"
            for label, mean in zip(labels, both.mean(), strict=True)
        ]
        defaults = {
            "unit": "%" if relative else "",
            "digits": self.digits(score),
            "unmet": self.unmet(score, *cases),
        }
        what = f"{score.replace('_', ' ')}, gain of {labels[0]} over {labels[1]}"
        by_seed = {int(seed): float(gap) for seed, gap in gaps.items()}
        note = ", ".join(means)
        return [
            Effect(where=where, what=what, by_seed=by_seed, note=note, **{**defaults, **settings})
        ]

    def _name(self, case: Case) -> str:
        arm, size = _split(case)
        return self.label(arm) + (f", {size}" if size else "")


def _absent(
    by_seed: Mapping[int, float], rows: Mapping[str, set[int]], first: int
) -> dict[int, str]:
    """Returns seed -> why an effect has no value of it, from the seeds of the arms that it was measured on."""
    seeds = sorted(set().union(*rows.values()))
    wanted = {*seeds[:first], *(seed for seed in seeds if seed <= max(by_seed, default=-1))}
    gone = {
        seed: ", ".join(f"`{arm}`" for arm, known in rows.items() if known and seed not in known)
        for seed in sorted(wanted - set(by_seed))
    }
    return {seed: f"no run of {arms}" if arms else "no value" for seed, arms in gone.items()}


def _split(case: Case) -> tuple[str, str | None]:
    return (case, None) if isinstance(case, str) else case


def compare(score: str, *pairs: tuple[Case, Case], **settings: Any) -> Measure:
    """Returns a measure of whether the first arm of each pair has the better score; `settings` are for `Results.gain`."""

    def measure(runs: Results, where: str) -> list[Effect]:
        return [effect for pair in pairs for effect in runs.gain(where, score, *pair, **settings)]

    return measure


def average(what: str, *measures: Measure, **settings: Any) -> Measure:
    """Returns a measure of one effect: by seed the mean of the effects of others, at the seeds that all of them have.

    Args:
      what: the mean in words.
      *measures: each of which must return effects.
      **settings: further fields of Effect.
    """

    def measure(runs: Any, where: str) -> list[Effect]:
        every = [list(one(runs, where)) for one in measures]
        if not all(every):
            return []
        effects = [effect for some in every for effect in some]
        seeds = sorted(set.intersection(*(set(effect.by_seed) for effect in effects)))
        mean = {s: float(np.mean([effect.by_seed[s] for effect in effects])) for s in seeds}
        shared = {
            "unit": effects[0].unit,
            "digits": effects[0].digits,
            "note": "; ".join(filter(None, (effect.note for effect in effects))),
            "unmet": "; ".join(dict.fromkeys(filter(None, (effect.unmet for effect in effects)))),
        }
        return [Effect(where=where, what=what, by_seed=mean, **{**shared, **settings})]

    return measure


def aligned(*scores: pd.Series) -> list[np.ndarray]:
    """Returns scores by seed at the seeds that all of them have, in one order."""
    return list(pd.concat(scores, axis=1, join="inner").sort_index().to_numpy().T)


def named(what: str, missing: Sequence[int], planned: Collection[int]) -> list[str]:
    """Returns `what` with the seeds it lacks, its name alone if it lacks all, and nothing if it lacks none."""
    if not missing:
        return []
    some = f" (seed {', '.join(map(str, missing))})" if len(missing) < len(planned) else ""
    return [what + some]
