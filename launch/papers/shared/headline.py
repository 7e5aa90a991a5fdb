"""The main effect of a paper beside ours, and the word that says how they compare."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch.papers.shared import claim
from espalier.launch.papers.shared.claim import Claim, Effect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headline:
    """What a reader learns of a paper in one line: its main effect and ours, in one unit.

    Attributes:
      claim: name of the claim whose verdict says whether the effect is reproduced.
      what: the effect in words that stand alone, such as 'perplexity of the mixture against its dense seed'.
      unit: of both numbers.
      paper: the paper's number; None where it has none that can be compared.
      measure: of ours, in `part`.
      part: of the experiment.
      why: one sentence on what was seen and why.
      mind: what would change our mind, with its cost.
      digits: decimals that are shown.
      tie: up to where a difference on either side is a tie, where the paper has no number that can be compared.
    """

    claim: str
    what: str
    unit: str
    paper: float | None
    measure: claim.Measure
    part: str
    why: str
    mind: str
    digits: int = 1
    tie: float | None = None

    def record(
        self, judged: Sequence[Claim], parts: Mapping[str, Any], place: str
    ) -> dict[str, Any]:
        """Returns the headline as results.json has it, with its word: reproduced, tie, contradicted, not shown or not measured.

        It is a tie where the claim does not hold and the interval has zero within and half of the paper's number outside, or
        where it lies within `tie` on either side of zero.
        """
        (one,) = (one for one in judged if one.name == self.claim)
        seeds = one.seeds or None  # those that judge the claim
        effects = list(self.measure(parts[self.part], place)) if self.part in parts else []
        seen = (effects[0] if effects else Effect(where="", what="")).range(seeds, one.level)
        half, largest = abs(self.paper or 0.0) / 2, max(-seen["low"], seen["high"])
        if one.verdict == claim.HOLDS:
            word = "reproduced"
        elif one.verdict == claim.NOT_MEASURED:
            word = "not measured"
        elif largest < (self.tie or 0.0) or (seen["low"] <= 0 <= seen["high"] and largest < half):
            word = "tie"
        else:
            word = "contradicted" if one.verdict == claim.FAILS else "not shown"
        texts = {
            k: getattr(self, k) for k in ("claim", "what", "unit", "paper", "why", "mind", "digits")
        }
        numbers = {key: claim.finite(value) for key, value in seen.items()}
        shown = {"seeds": sorted(effects[0].by_seed)[:seeds] if effects else [], "word": word}
        return {**texts, **numbers, **shown, "required": one.required}
