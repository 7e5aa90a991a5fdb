"""Effects of SnapKV's measurements: over retrieval models by seed, and over haystacks by a bootstrap.

The needles of a haystack are not independent, so that haystacks are resampled and not needles.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from launch.papers.shared.claim import FEW_SEEDS, Effect
from launch.papers.snapkv import measure, needles
from launch.papers.snapkv.results import CHAT_BAR, Needles, Retrieval
from launch.plots import intervals

Values = dict[int, float]  # by seed, or by haystack
Measures = dict[str, list[Any]]  # part -> functions that return its effects


def over_models(runs: Retrieval, where: str, what: str, by_seed: Values, **settings: Any) -> Effect:
    """Returns an effect over retrieval models; the seeds that cannot judge are named."""
    left_out = "; ".join(f"seed {seed} {why}" for seed, why in runs.excluded.items())
    notes = [settings.pop("note", ""), f"left out: {left_out}" if left_out else ""]
    note = ", ".join(filter(None, notes))
    settings = {"seeds": FEW_SEEDS, "note": note, **settings}
    return Effect(where=where, what=what, by_seed=by_seed, **settings)


def over_haystacks(
    results: Needles, where: str, what: str, tops: Any, bottoms: Any, **settings: Any
) -> Effect:
    """Returns an effect over haystacks: the ratio of sums, with a bootstrap over haystacks."""
    tops, bottoms = np.asarray(tops, float), np.asarray(bottoms, float)
    numbers = results.of_length(needles.JUDGED.tokens)
    mean = max(float(bottoms.mean()), 1e-9)
    by_haystack = {number: float(top / mean) for number, top in zip(numbers, tops, strict=True)}
    settings = {"interval": intervals.ratio(tops, bottoms), **settings}
    place = f"{where}, {len(numbers)} haystacks of {needles.JUDGED.tokens} tokens"
    return Effect(where=place, what=what, by_seed=by_haystack, **settings)


def pair(ones: Values, others: Values, of: Callable[[float, float], float]) -> Values:
    return {seed: of(ones[seed], others[seed]) for seed in ones if seed in others}


def means(*named: tuple[str, Any]) -> str:
    """Returns the means of named values as text."""
    return ", ".join(f"{name} {np.mean(list(values)):.2f}" for name, values in named)


def compared(
    one: str, other: str, names: tuple[str, str], *, relative: bool = False, **settings: Any
) -> Measures:
    """Returns measures of the exact answers of a method less those of another at a fifth of the prompt.

    Args:
      one, other: short names of the methods.
      names: as the report has them.
      relative: whether the difference is a share of the full cache's exact answers.
      **settings: of Effect.
    """
    of = " as a share of the full cache's" if relative else ""
    what = f"exact answers, {names[0]} less {names[1]}{of}"

    def small(runs: Retrieval, where: str) -> list[Effect]:
        ones, others, full = (runs.exact(name, measure.CAPACITY) for name in (one, other, "full"))
        gaps = pair(ones, others, lambda a, b: a - b)
        if relative:
            gaps = pair(gaps, full, lambda gap, share: gap / share)
        note = means((names[0], ones.values()), (names[1], others.values())) if ones else ""
        place = f"{where}, C = {measure.CAPACITY}"
        return [over_models(runs, place, what, gaps, note=note, **settings)]

    def chat(results: Needles, where: str) -> list[Effect]:
        ones, others, full = (on_haystacks(results, name) for name in (one, other, "full"))
        if not (ones.size and others.size):
            return []
        bottoms = full if relative else np.ones_like(ones)
        settings_here = {"note": means((names[0], ones), (names[1], others)), **settings}
        place = f"{where}, C = {needles.JUDGED.fifth}"
        unmet = chat_unmet(results)
        return [
            over_haystacks(
                results, place, what, ones - others, bottoms, unmet=unmet, **settings_here
            )
        ]

    return {"retrieval": [small], "needles": [chat]}


def on_haystacks(results: Needles, method: str) -> np.ndarray:
    grid = needles.JUDGED
    return results.exact(grid.tokens, method, 0 if method == "full" else grid.fifth)


def chat_unmet(results: Needles) -> str:
    full = on_haystacks(results, "full")
    share = float(full.mean()) if full.size else 0.0
    return "" if share >= CHAT_BAR else f"the full cache answers {share:.2f}"


def together(*measures: Measures) -> Measures:
    """Returns the measures of several comparisons, by part."""
    return {part: [one for each in measures for one in each[part]] for part in measures[0]}
