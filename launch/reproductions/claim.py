"""What a reproduction says: claims, what was measured for each, and whether they hold."""

import dataclasses
from collections.abc import Sequence


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
