"""Claims of a paper, the evidence measured for each, and their verdicts."""

import dataclasses
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
    """A claim and how it is measured; without evidence its verdict is 'not measured'.

    Attributes:
      name: short, such as 'B3'.
      statement: the claim in one sentence.
      condition: when a measurement supports it.
      measures: part of the experiment -> functions that measure the claim there.
      required: whether it must hold at small scale too.
      evidence: filled in by `judge`.
      places: part -> how the `where` of its evidence begins; filled in by `judge`.
    """

    name: str
    statement: str
    condition: str
    measures: Mapping[str, Sequence[Measure]] = dataclasses.field(default_factory=dict)
    required: bool = False
    evidence: Sequence[Evidence] = ()
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """'holds', 'fails', 'mixed' where only some of the evidence supports it, or 'not measured'."""
        if not self.evidence:
            return "not measured"
        supporting = sum(e.holds for e in self.evidence)
        return {len(self.evidence): "holds", 0: "fails"}.get(supporting, "mixed")

    def unmeasured(self, parts: Sequence[str]) -> list[str]:
        """Returns those of `parts` that should have measured the claim and did not."""
        return [
            part
            for part, place in self.places.items()
            if part in parts and not any(e.where.startswith(place) for e in self.evidence)
        ]


def judge(
    claims: Sequence[Claim], results: Mapping[str, Any], places: Mapping[str, str]
) -> list[Claim]:
    """Returns the claims with the evidence of all parts that have results.

    Args:
      claims: of a paper.
      results: by part.
      places: part -> its name in the report.
    """
    return [
        dataclasses.replace(
            claim,
            evidence=[
                evidence
                for part, measures in claim.measures.items()
                if part in results
                for measure in measures
                for evidence in measure(results[part], places[part])
            ],
            places={part: places[part] for part in claim.measures},
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
                for part in claim.unmeasured(parts)
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


def table(judged: Sequence[Claim]) -> list[str]:
    """Returns the Markdown table of verdicts; required claims are bold."""
    out = ["| claim | pass condition | verdict |", "|---|---|---|"]
    for claim in judged:
        statement = f"{claim.name} {claim.statement}"
        shown = f"**{statement}**" if claim.required else statement
        out.append(f"| {shown} | {claim.condition} | **{claim.verdict}** |")
    return out


def measurements(judged: Sequence[Claim]) -> list[str]:
    """Returns the Markdown list of evidence for each claim."""
    out = []
    for claim in judged:
        out += [f"### {claim.name}: {claim.statement}", ""]
        out += [
            f"- {one.where}: {one.measured}. **{'Holds' if one.holds else 'Fails'}.**"
            for one in claim.evidence
        ] or ["- Not measured."]
        out.append("")
    return out
