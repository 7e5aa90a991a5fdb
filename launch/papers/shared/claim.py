"""What a reproduction says: claims, what was measured for each, and whether they hold."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One measurement of a claim.

    Attributes:
      where: on which model or data.
      measured: in words, with its interval.
      holds: whether the pass condition is met.
    """

    where: str
    measured: str
    holds: bool


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and its measurements; with none it was not measured.

    Attributes:
      name: short.
      statement: what is claimed.
      condition: when a measurement counts for it.
      evidence: what was measured.
      required: whether it must hold at small scale too.
      places: the parts of the experiment that measure it -> with what the `where` of their evidence begins.
    """

    name: str
    statement: str
    condition: str
    evidence: Sequence[Evidence]
    required: bool = False
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """'holds', 'fails', 'mixed' where only some measurements count for it, or 'not measured'."""
        if not self.evidence:
            return "not measured"
        held = sum(e.holds for e in self.evidence)
        return {len(self.evidence): "holds", 0: "fails"}.get(held, "mixed")

    def unmeasured(self, parts: Sequence[str]) -> list[str]:
        """Those of `parts` that should have measured it and did not."""
        return [
            part
            for part, place in self.places.items()
            if part in parts and not any(e.where.startswith(place) for e in self.evidence)
        ]


def placed(judged: Sequence[Claim], places: Mapping[str, str]) -> list[Claim]:
    """The claims with the same `places`."""
    return [dataclasses.replace(claim, places=places) for claim in judged]


def unmet(judged: Sequence[Claim], parts: Sequence[str]) -> list[str]:
    """What is against a reproduction of the parts that were asked for, in words; nothing if it stands.

    A claim that must hold and does not is, and one that must hold and that one of the parts has not measured.
    """
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
    """As results.json has them."""
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
    """Verdicts, as lines of a page; what must hold is bold."""
    out = ["| claim | pass condition | verdict |", "|---|---|---|"]
    for claim in judged:
        statement = f"{claim.name} {claim.statement}"
        shown = f"**{statement}**" if claim.required else statement
        out.append(f"| {shown} | {claim.condition} | **{claim.verdict}** |")
    return out


def measurements(judged: Sequence[Claim]) -> list[str]:
    """What each claim was judged by, as lines of a page."""
    out = []
    for claim in judged:
        out += [f"### {claim.name}: {claim.statement}", ""]
        out += [
            f"- {one.where}: {one.measured}. **{'Holds' if one.holds else 'Fails'}.**"
            for one in claim.evidence
        ] or ["- Not measured."]
        out.append("")
    return out
