"""Evidence of two arms, seed by seed."""

import numpy as np

from launch.reproductions import intervals
from launch.reproductions.claim import Evidence
from launch.reproductions.low_rank.results import Results

_DIGITS = {"accuracy": 3}


def better(
    results: Results,
    where: str,
    score: str,
    one: str,
    other: str,
    *,
    lower: bool = False,
    no_worse: bool = False,
) -> list[Evidence]:
    """Whether an arm has the better score than another; nothing where one of them is not there.

    Args:
      results: of a sweep.
      where: for the reader.
      score: of results.score.
      one, other: the arms.
      lower: whether lower scores are better.
      no_worse: whether it counts as well if the other is not significantly better.
    """
    ones, others = results.paired(score, one, other)
    if not len(ones):
        return []
    gaps = others - ones if lower else ones - others
    words = (
        f"{score.replace('_', ' ')}: {arm_name(one)} {mean(ones, score)}, {arm_name(other)} "
        f"{mean(others, score)}; {gaps_text(ones - others, gaps, score)}"
    )
    significant = intervals.significant
    return [Evidence(where, words, not significant(-gaps) if no_worse else significant(gaps))]


def gaps_text(differences: np.ndarray, gaps: np.ndarray, score: str) -> str:
    """Differences of pairs with their interval, and how many of them are gains."""
    wins, p = int((gaps > 0).sum()), intervals.sign_test(gaps)
    return f"difference {mean(differences, score)}, better in {wins} of {gaps.size} pairs (p = {p:.3g})"


def mean(values: np.ndarray, score: str) -> str:
    """Over seeds, with the interval."""
    shown = intervals.over_seeds(values)
    return intervals.text(shown, _DIGITS.get(score, 2))


def arm_name(name: str) -> str:
    """As a reader sees it."""
    words = name.split("_")
    return " ".join(["He", *words[1:]] if words[0] == "he" else words)
