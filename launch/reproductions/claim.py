"""What a reproduction says: claims, what was measured for each, and whether they hold."""

import dataclasses
from collections.abc import Sequence
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
    """

    name: str
    statement: str
    condition: str
    evidence: Sequence[Evidence]
    required: bool = False

    @property
    def verdict(self) -> str:
        """'holds', 'fails', 'mixed' where only some measurements count for it, or 'not measured'."""
        if not self.evidence:
            return "not measured"
        held = sum(e.holds for e in self.evidence)
        return {len(self.evidence): "holds", 0: "fails"}.get(held, "mixed")


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
