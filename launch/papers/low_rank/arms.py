"""The scores of the low-rank runs, and the arms' names in the report."""

from collections.abc import Mapping
from typing import Any

from launch.papers.shared import results

PLACES = {"lm": "characters", "vision": "textures", "timing": "steps"}


class Results(results.Results):
    """Runs of a part, as `measure.run` returns them."""

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns 'parameters', the held-out metrics, and the means of trainers/low_rank/spectrum.py at the end."""
        end = (row["spectrum"] or [{}])[-1]
        metrics = [value for values in row["held_out"].values() for value in values.items()]
        return {**end, **dict(reversed(metrics)), "parameters": row["parameters"]}

    def lower_is_better(self, score: str) -> bool:
        return score == "perplexity"

    def digits(self, score: str) -> int:
        return 3 if score == "accuracy" else 2

    def label(self, arm: str) -> str:
        return arm_name(arm)


def arm_name(name: str) -> str:
    """Returns the name of an arm or score in the report."""
    words = name.split("_")
    return " ".join(["He", *words[1:]] if words[0] == "he" else words)
