"""The arms of the small sweep of MoV and MoLORA, and the scores of its runs."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.mov import evaluations, rows
from espalier.launch.papers.shared import domains, results

MOV_EXPERTS = (10, 30)
MOLORA_EXPERTS = 10
LORA_RANKS = (4, 45)  # that of MoLORA's experts, and one with as many parameters as MoLORA-10
NARROW, MAIN = "64", "128"  # widths; all arms run at the second
WIDTHS = {NARROW: 64, MAIN: 128}
BASE, FULL, IA3 = "base", "full", "ia3"
LORA = tuple(f"lora{rank}" for rank in LORA_RANKS)
MOV = tuple(f"mov{n}" for n in MOV_EXPERTS)
MOLORA = f"molora{MOLORA_EXPERTS}"
TOP_1, SENTENCE = VARIANTS = (f"{MOV[0]}_top1", f"{MOV[0]}_sentence")
ROUTED = (*MOV, MOLORA, *VARIANTS)
TUNED = (FULL, IA3, *LORA, *ROUTED)
BY_WIDTH = (FULL, IA3, MOV[0])  # arms of both widths

# Scores, of compositions that no arm was tuned on, and of other strings of those that it was: the share of rows whose right choice is
# the most probable, and the right choice's probability among the four and its logarithm.
METRICS = ("accuracy", "probability", "log_probability")
ACCURACY, PROBABILITY, LOG_PROBABILITY = METRICS
SCORE = PROBABILITY  # that judges
SEEN = "seen_"  # prefix of a score
LOSS = "trained_loss"
PARAMETERS = "trained_parameters"
LABELS = {
    BASE: "frozen model, not tuned",
    FULL: "full tuning",
    IA3: "(IA)3",
    **{arm: f"LoRA, rank {rank}" for arm, rank in zip(LORA, LORA_RANKS, strict=True)},
    **{arm: f"MoV-{n}" for arm, n in zip(MOV, MOV_EXPERTS, strict=True)},
    MOLORA: f"MoLORA-{MOLORA_EXPERTS}",
    TOP_1: "MoV-10, top-1",
    SENTENCE: "MoV-10, routed by sentences",
}
CHANCE = 1 / rows.CHOICES
# Nats for each token of an answer. A model that knows the letters but not their order has 0.9.
LEARNED = 0.4
HEADROOM = 0.9  # (IA)3's score over full tuning's, above which more vectors have nothing to gain
HEADROOM_KEY = "headroom"


@dataclasses.dataclass(frozen=True)
class Runs(results.Results):
    """Runs of the sweep, as `experiment.run` returns them.

    Attributes:
      unlearned: (seed, width) -> the loss on other strings of a frozen model that has not learned the compositions. The runs
        that start from it are left out.
    """

    main = MAIN
    unlearned: Mapping[tuple[int, str], float] = dataclasses.field(default_factory=dict)

    @classmethod
    def judging(cls, rows: Sequence[Mapping[str, Any]]) -> "Runs":
        """Returns the runs whose frozen model has learned the compositions."""
        losses = {(row["seed"], row["size"]): row[LOSS] for row in rows if row["arm"] == BASE}
        unlearned = {key: loss for key, loss in losses.items() if loss > LEARNED}
        kept = [row for row in rows if (row["seed"], row["size"]) not in unlearned]
        return cls(kept, unlearned)

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns METRICS of unseen and of seen compositions, the loss on the latter, and parameters."""
        measured = row["evaluations"].get("ranks") or {}
        return {
            f"{prefix}{metric}": (measured.get(name) or {}).get(metric)
            for prefix, name in (("", "unseen"), (SEEN, "seen"))
            for metric in METRICS
        } | {key: row.get(key) for key in (LOSS, PARAMETERS, "parameters")}

    def lower_is_better(self, score: str) -> bool:
        return score == LOSS

    def digits(self, score: str) -> int:
        return 0 if score.endswith("parameters") else 3

    def degenerate(self, row: Mapping[str, Any]) -> str:
        return domains.collapsed(row, self.top_1(row["arm"]))

    def limits(self, score: str) -> tuple[float, float] | None:
        """Returns what a model has that guesses, with what is near it, and what nothing can exceed by much."""
        if score.endswith(LOG_PROBABILITY):
            return math.log(CHANCE), math.log(0.98)
        if score.endswith((ACCURACY, PROBABILITY)):
            return CHANCE + 0.05, 0.98
        return None

    def unmet(self, score: str, *cases: results.Case) -> str:
        """Returns why a comparison gives no verdict, such as that (IA)3 is all but as good as full tuning."""
        for case in cases if score in METRICS[:2] else ():
            arm, width = (case, MAIN) if isinstance(case, str) else (case[0], case[1] or MAIN)
            share = self.headroom.get(f"{score} {width}", 0.0)
            if arm == IA3 and share > HEADROOM:
                return f"(IA)3 has {share:.2f} of full tuning's {score} at width {width}: nothing is left to gain"
        return super().unmet(score, *cases)

    @functools.cached_property
    def headroom(self) -> Mapping[str, float]:
        """(IA)3's mean score over full tuning's by score and width; `HEADROOM_KEY` of a row where arms were exchanged."""
        if self.rows and HEADROOM_KEY in self.rows[0]:
            return self.rows[0][HEADROOM_KEY]
        out = {}
        for score, width in itertools.product(METRICS[:2], WIDTHS):
            # Not by `find`: no arm is compared.
            one, other = (
                [
                    value
                    for row in self.rows
                    if (row["arm"], row["size"]) == (arm, width)
                    and (value := self.row_scores(row)[score]) is not None
                ]
                for arm in (IA3, FULL)
            )
            if one and other:
                out[f"{score} {width}"] = float(np.mean(one) / np.mean(other))
        return out

    def label(self, arm: str) -> str:
        return LABELS.get(arm, arm)

    def top_1(self, arm: str) -> tuple[str, ...]:
        """Returns the kinds of routers of an arm, of `domains.ROUTERS`, that choose one expert for each token."""
        return ("mlp", "attention") if arm == TOP_1 else ()

    def loads(self, arm: str, kind: str) -> dict[int, np.ndarray]:
        """Returns by seed the largest share of the tokens that one expert of a layer gets: [layer]."""
        return {seed: domains.largest_loads(x) for seed, x in self.choices(arm, kind).items()}

    def choices(self, arm: str, kind: str) -> dict[int, np.ndarray]:
        """Returns by seed the share of each composition's tokens whose first choice an expert is: [layer, task, expert]."""
        chosen = {seed: domains.choices(row, kind) for seed, row in self.find(arm).items()}
        return {seed: one for seed, one in chosen.items() if one is not None}

    def tasks(self) -> list[str]:
        """Returns the names of the unseen compositions."""
        measured = (row["evaluations"].get("ranks") for row in self.rows)
        return next((list(one["unseen"]["tasks"]) for one in measured if one), [])

    def routed(self) -> list[str]:
        """Returns the names of the compositions on which routers are read."""
        measured = (row["evaluations"].get("routing") for row in self.rows)
        return next((list(one["chosen"]) for one in measured if one), [])

    def by_task(self, arm: str, metric: str) -> dict[int, np.ndarray]:
        """Returns by seed a metric of each unseen composition."""
        return {
            seed: np.array([one[metric] for one in measured["unseen"]["tasks"].values()])
            for seed, row in self.find(arm).items()
            if (measured := row["evaluations"].get("ranks"))
        }

    def specialisation(self, arm: str, kind: str, than: str = "rows") -> dict[int, np.ndarray]:
        """Returns by seed and layer how much further apart two compositions route than `than`: [layer].

        `than` is 'rows', the halves of one composition's rows, or 'wordings', two templates of one composition. Distances
        are total variations of mean probabilities (`evaluations.routing`); `kind` is of `evaluations.KINDS`.
        """
        assert kind in evaluations.KINDS
        out = {}
        for seed, row in self.find(arm).items():
            by_kind = (row["evaluations"].get("routing") or {}).get("distances", {})
            if layers := by_kind.get(kind):
                out[seed] = np.array([x["tasks"] - x[than] for x in layers])
        return out


def plain(name: str) -> str:
    """Returns the name of a score or of a kind of router in words."""
    return name.replace("cross_", "cross-").replace("_", " ")
