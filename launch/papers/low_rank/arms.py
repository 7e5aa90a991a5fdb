"""The scores of the low-rank runs, and the arms' names in the report."""

from collections.abc import Mapping
from typing import Any

from launch.papers.shared import results

PLACES = {"lm": "characters", "vision": "textures", "timing": "steps"}

_CHANCE = 0.1  # of the textures' ten classes


class Results(results.Results):
    """Runs of a part, as `measure.run` returns them."""

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns 'parameters', the held-out metrics, and the means of trainers/low_rank/spectrum.py at the end."""
        end = (row["spectrum"] or [{}])[-1]
        metrics = [value for values in row["held_out"].values() for value in values.items()]
        return {**end, **dict(reversed(metrics)), "parameters": row["parameters"]}

    def by_seed(self, score: str, *arms: str) -> dict[int, list[float]]:
        """Returns a score of arms, at the seeds that all of them have."""
        scores = [self.scores(arm, score) for arm in arms]
        seeds = set.intersection(*(set(one.index) for one in scores))
        return {int(seed): [float(one[seed]) for one in scores] for seed in sorted(seeds)}

    def limits(self, score: str) -> tuple[float, float] | None:
        return (_CHANCE, 1.0) if score == "accuracy" else None

    def degenerate(self, row: Mapping[str, Any]) -> str:
        """Returns whether a network of images has learned nothing."""
        accuracy = self.row_scores(row).get("accuracy")
        return "it is at chance" if accuracy is not None and accuracy < 1.5 * _CHANCE else ""

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
