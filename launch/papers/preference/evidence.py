"""A condition on numbers of the runs: judged in each seed, and on their means over seeds."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from launch.papers.preference.results import Course, by_seed
from launch.papers.shared.claim import Evidence
from launch.plots import intervals

WHERE = "seed"  # with what the `where` of all evidence begins
Numbers = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Part:
    """One condition of a claim.

    Attributes:
      of: on what runs, for the reader; empty for all of them.
      words: with the numbers' names in braces and their digits, as in "drop {drop:.1} %".
      numbers: of the runs of one seed; None where they are not there.
      holds: whether numbers meet the condition.
    """

    of: str
    words: str
    numbers: Callable[[Sequence[Course]], Numbers | None]
    holds: Callable[[Numbers], bool]


def judge(every: Sequence[Course], parts: Sequence[Part]) -> list[Evidence]:
    """Of each part, that of every seed and, of more than one, that of the means."""
    return [one for part in parts for one in _judge(every, part)]


def _judge(every: Sequence[Course], part: Part) -> list[Evidence]:
    found = {seed: part.numbers(mine) for seed, mine in by_seed(every).items()}
    there = {seed: numbers for seed, numbers in found.items() if numbers is not None}
    out = [_said(f"{WHERE} {seed}", part, [numbers]) for seed, numbers in there.items()]
    if len(there) > 1:
        out.append(_said(f"{WHERE}s {', '.join(map(str, there))}", part, list(there.values())))
    return out


def _said(where: str, part: Part, found: Sequence[Numbers]) -> Evidence:
    values = {name: [one[name] for one in found] for name in found[0]}
    words = part.words.format(**{name: _Shown(of) for name, of in values.items()})
    means = {name: float(np.mean(of)) for name, of in values.items()}
    return Evidence(f"{where}, {part.of}" if part.of else where, words, part.holds(means))


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A number of one seed, or the mean of several with its interval; its format is `.digits`, 'n' for no interval."""

    values: Sequence[float]

    def __format__(self, spec: str) -> str:
        if spec == "n":  # counts and steps
            return f"{np.mean(self.values):.0f}"
        digits = int(spec.removeprefix("."))
        if len(self.values) == 1:
            return f"{self.values[0]:.{digits}f}"
        return intervals.text(intervals.over_seeds(self.values), digits)
