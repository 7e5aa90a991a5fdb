"""The scores of the runs of launch/papers/aya23/sweep.py, and their names in the report."""

from collections.abc import Mapping
from typing import Any

from launch.papers.aya23 import answers
from launch.papers.shared import results

LOSS, TURNS, PLAIN, FORMAT = "loss", "right answers", "right without turns", "gain by turns"
TUNED = ("scratch", "tuned", "tuned_full")
_LABELS = {
    "base": "base: parallel, SwiGLU, 2 heads",
    "sequential": "sequential blocks",
    "gelu": "GELU",
    "kv4": "4 heads of keys and values",
    "kv1": "1 head of keys and values",
    "scratch": "new model, full mixture",
    "tuned": "base, a quarter of the mixture",
    "tuned_full": "base, full mixture",
}
# A loss of uniform guesses over the words of a language is above 4 nats.
_UNTRAINED = 3.5


class Runs(results.Results):
    """Runs as `measure.run` returns them."""

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns the mean loss of the common languages; of tuned models the share of right answers instead."""
        if row["arm"] not in TUNED:
            losses = row["held_out"]
            return {LOSS: sum(losses.values()) / len(losses) if losses else None}
        exact = (row.get("evaluations") or {}).get("answers")
        if not exact:
            return {TURNS: None, PLAIN: None}
        return {TURNS: answers.mean(exact, "turns"), PLAIN: answers.mean(exact, "plain")}

    def lower_is_better(self, score: str) -> bool:
        return score == LOSS

    def digits(self, score: str) -> int:
        return 3

    def limits(self, score: str) -> tuple[float, float] | None:
        return None if score == LOSS else (0.0, 1.0)

    def degenerate(self, row: Mapping[str, Any]) -> str:
        loss = self.row_scores(row).get(LOSS)
        return "it has not learned" if loss is not None and not loss < _UNTRAINED else ""

    def label(self, arm: str) -> str:
        if arm.startswith("languages"):
            count, width = arm.removeprefix("languages").split("_")
            return f"{count} languages, {width}"
        return _LABELS[arm]
