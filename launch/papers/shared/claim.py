"""Claims of a paper, the evidence measured for each, and their verdicts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One measurement of a claim.

    Attributes:
      where: the model or data it was measured on.
      measured: the numbers in words, with their intervals.
      holds: whether the pass condition is met.
    """

    where: str
    measured: str
    holds: bool


# (results of a part, name of that part in the report) -> evidence; none where the runs are missing.
Measure = Callable[[Any, str], Sequence[Evidence]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and how it is measured.

    Attributes:
      name: short, such as 'B3'.
      statement: the claim in one sentence.
      condition: when a measurement supports it.
      measures: part of the experiment -> functions that measure the claim there.
      required: whether it must hold at small scale too.
      by_part: part with results -> its evidence; set by `judge`.
    """

    name: str
    statement: str
    condition: str
    measures: Mapping[str, Sequence[Measure]]
    required: bool = False
    by_part: Mapping[str, Sequence[Evidence]] = dataclasses.field(default_factory=dict)

    @property
    def evidence(self) -> list[Evidence]:
        return [one for part in self.by_part.values() for one in part]

    @property
    def verdict(self) -> str:
        """'holds', 'fails', 'mixed' where only some of the evidence supports it, or 'not measured'."""
        supports = {one.holds for one in self.evidence}
        if not supports:
            return "not measured"
        return "mixed" if len(supports) == 2 else "holds" if supports == {True} else "fails"


RequiredClaim = functools.partial(Claim, required=True)


def judge(
    claims: Sequence[Claim], results: Mapping[str, Any], places: Mapping[str, str]
) -> list[Claim]:
    """Returns the claims with the evidence of all parts that have results; `places` are the parts' names in the report."""
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
    """Returns why the reproduction of `parts` fails: required claims that do not hold or were not measured."""
    out = []
    for claim in judged:
        if claim.required and claim.verdict in ("fails", "mixed"):
            out.append(f"{claim.name} must hold, and its verdict is: {claim.verdict}")
        elif claim.required:
            out += [
                f"{claim.name} must hold, and part {part} has not measured it"
                for part in claim.measures
                if part in parts and not claim.by_part.get(part)
            ]
    return out


def record(judged: Sequence[Claim]) -> list[dict[str, Any]]:
    """Returns the claims as results.json has them."""
    return [
        {
            "claim": claim.name,
            "statement": claim.statement,
            "condition": claim.condition,
            "required": claim.required,
            "verdict": claim.verdict,
            "evidence": [vars(one) for one in claim.evidence],
        }
        for claim in judged
    ]
