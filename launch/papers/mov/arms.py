"""Names of the arms of launch/papers/mov/sweep.py, and the scores of their runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.mov import evaluations, sweep
from launch.papers.shared import domains, results

ACCURACY = "accuracy"
BASE, FULL, IA3 = "base", "full", "ia3"
LORA = tuple(f"lora{rank}" for rank in sweep.LORA_RANKS)
MOV = tuple(f"mov{n}" for n in sweep.MOV_EXPERTS)
MOLORA = tuple(f"molora{n}" for n in sweep.MOLORA_EXPERTS)
VARIANTS = tuple(f"{MOV[0]}_{name}" for name in sweep.VARIANTS)
TUNED = (FULL, IA3, *LORA, *MOV, *MOLORA, *VARIANTS)
ROUTED = (*MOV, *MOLORA, *VARIANTS)
_LABELS = {
    BASE: "frozen model, not tuned",
    FULL: "full tuning",
    IA3: "(IA)3",
    **{arm: f"LoRA, rank {rank}" for arm, rank in zip(LORA, sweep.LORA_RANKS, strict=True)},
    **{arm: f"MoV-{n}" for arm, n in zip(MOV, sweep.MOV_EXPERTS, strict=True)},
    **{arm: f"MoLORA-{n}" for arm, n in zip(MOLORA, sweep.MOLORA_EXPERTS, strict=True)},
    "mov10_top1": "MoV-10, top-1",
    "mov10_top1_renormalised": "MoV-10, top-1, renormalised",
    "mov10_top2": "MoV-10, top-2",
    "mov10_layer_input": "MoV-10, routed by layers' inputs",
    "mov10_sentence": "MoV-10, routed by sentences",
}
CHANCE = 1 / 4
# Nats for each token of an answer. A model that knows the letters but not their order has 0.9.
LEARNED = 0.2


@dataclasses.dataclass(frozen=True)
class Runs(results.Results):
    """Runs of the sweep, as `measure.run` returns them.

    Attributes:
      unlearned: the loss on other strings of the frozen models that have not learned the compositions, by seed. Their
        seeds' runs are left out.
    """

    unlearned: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def judging(cls, rows: Sequence[Mapping[str, Any]]) -> "Runs":
        """Returns the runs of the seeds whose frozen model has learned the compositions."""
        losses = {row["seed"]: row["trained_loss"] for row in rows if row["arm"] == BASE}
        unlearned = {seed: loss for seed, loss in losses.items() if loss > LEARNED}
        return cls([row for row in rows if row["seed"] not in unlearned], unlearned)

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns the accuracy on held-out compositions, the loss on those that are trained, and parameters."""
        measured = row["evaluations"].get("ranks") or {}
        return {
            ACCURACY: measured.get(ACCURACY),
            "trained_loss": row.get("trained_loss"),
            "trained_parameters": row.get("trained_parameters"),
        }

    def lower_is_better(self, score: str) -> bool:
        return score != ACCURACY

    def degenerate(self, row: Mapping[str, Any]) -> str:
        return domains.collapsed(row, self.top_1(row["arm"]))

    def limits(self, score: str) -> tuple[float, float] | None:
        return (CHANCE, 1.0) if score == ACCURACY else None

    def digits(self, score: str) -> int:
        return 0 if score == "trained_parameters" else 3

    def label(self, arm: str) -> str:
        return _LABELS.get(arm, arm)

    def top_1(self, arm: str) -> tuple[str, ...]:
        """Returns the kinds of routers of an arm, of `loads.ROUTERS`, that choose one expert for each token."""
        return ("mlp", "attention") if "top1" in arm else ()

    def choices(self, arm: str, kind: str) -> dict[int, np.ndarray]:
        """Returns by seed the share of each composition's tokens whose first choice an expert is: [layer, task, expert]."""
        out = {}
        for seed, row in self.find(arm).items():
            chosen = (row["evaluations"].get("routing") or {}).get("chosen", {})
            if chosen and all(kind in tables for tables in chosen.values()):
                out[seed] = np.array([tables[kind] for tables in chosen.values()]).swapaxes(0, 1)
        return out

    def tasks(self) -> list[str]:
        """Returns the names of the held-out compositions."""
        measured = (row["evaluations"].get("ranks") for row in self.rows)
        return next((list(one["tasks"]) for one in measured if one), [])

    def by_task(self, arm: str) -> dict[int, np.ndarray]:
        """Returns by seed the accuracy on each held-out composition."""
        return {
            seed: np.array([one[ACCURACY] for one in measured["tasks"].values()])
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
