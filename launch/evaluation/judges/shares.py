"""Win rates with their intervals, and measures of the judge's biases.

Shares have 95 % intervals over prompts by Wilson (launch/plots/intervals.py), which are sensible for few prompts: of ten losses
of ten, the share of wins is 0 to 28 %.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from launch.evaluation.judges.answers import System
from launch.evaluation.judges.base import TIE, A, B, Outcome, Pair
from launch.plots import intervals

_NORMAL = 1.959964  # quantile of such an interval
_NEWTON_STEPS = 100


def pair_summary(pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Summarises the outcomes of the pairs of two systems.

    Returns:
      'a', 'b': names of the systems.
      'counts': win, loss and tie of the first system, which add up to the judged pairs; identical (also among the
        ties); invalid (in no share).
      The others are {'value', 'low', 'high'}, or None without judged pairs:
      'win', 'loss', 'tie': shares; 'difference': win minus loss; 'rate': wins and half of the ties.
      'consistency': share of pairs with the same verdict in both orders, of pairs asked in both orders.
      'position_bias': from -1 (always prefers the last answer shown) to 1 (always the first), of the same pairs.
      'longer_wins': share of wins of the longer answer, among decided pairs of unequal lengths.
      'length_controlled': see `length_controlled`.
    """
    judged = [(p, o) for p, o in zip(pairs, outcomes, strict=True) if o.verdict is not None]
    verdicts = [outcome.verdict for _, outcome in judged]
    won, lost, tied = (np.array([v == kind for v in verdicts], bool) for kind in (A, B, TIE))
    same = [o.consistent for _, o in judged if o.consistent is not None]
    biases = [o.bias for _, o in judged if o.bias is not None]
    longer = [
        (len(p.a) > len(p.b)) == (o.verdict == A)
        for p, o in judged
        if o.verdict != TIE and len(p.a) != len(p.b)
    ]
    return {
        "a": pairs[0].systems[0],
        "b": pairs[0].systems[1],
        "counts": {
            **{name: int(x.sum()) for name, x in (("win", won), ("loss", lost), ("tie", tied))},
            "identical": sum(o.identical for _, o in judged),
            "invalid": len(outcomes) - len(judged),
        },
        "win": _interval(won),
        "loss": _interval(lost),
        "tie": _interval(tied),
        "difference": _interval(won.astype(int) - lost.astype(int), least=-1),
        "rate": _interval(won + 0.5 * tied),
        "consistency": _interval(same),
        "position_bias": _interval(biases, least=-1),
        "longer_wins": _interval(longer),
        "length_controlled": length_controlled(
            won + 0.5 * tied, np.array([len(p.a) - len(p.b) for p, _ in judged], float)
        ),
    }


def _interval(
    values: Sequence[float] | np.ndarray, *, least: float = 0.0
) -> dict[str, float] | None:
    return intervals.bounded(values, least=least) if len(values) else None


def length_controlled(rates: np.ndarray, longer: np.ndarray) -> dict[str, float] | None:
    """Returns the rate of the first system, were its answers as long as the other's (after arXiv 2404.04475).

    The logit of a prompt's rate is a constant plus a slope times tanh of the difference in length, in standard deviations.
    The slope has a normal prior of unit variance. The interval is of 95 %, by the robust covariance over prompts.

    Args:
      rates: per prompt 1 for a win, 1/2 for a tie, 0 for a loss, [N].
      longer: by how many characters the first system's answer is longer, [N].

    Returns:
      {'value', 'low', 'high', 'slope'}; None if all prompts have the same outcome, or there is one prompt.
    """
    if len(rates) < 2 or np.ptp(rates) == 0:
        return None
    deviation = float(longer.std())
    lengths_N = np.tanh(longer / deviation) if deviation else np.zeros_like(longer)
    design_N2 = np.stack([np.ones_like(lengths_N), lengths_N], axis=1)
    prior = np.diag([0.0, 1.0])
    weights_2 = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        shares_N = 1 / (1 + np.exp(-design_N2 @ weights_2))
        slopes_2 = design_N2.T @ (rates - shares_N) - prior @ weights_2
        curvature = (design_N2 * (shares_N * (1 - shares_N))[:, None]).T @ design_N2 + prior
        change_2 = np.linalg.solve(curvature, slopes_2)
        weights_2 = weights_2 + np.clip(change_2, -1.0, 1.0)
        if np.abs(change_2).max() < 1e-10:
            break
    errors_N2 = design_N2 * (rates - shares_N)[:, None]
    inverse = np.linalg.inv(curvature)
    spread = float(np.sqrt((inverse @ (errors_N2.T @ errors_N2) @ inverse)[0, 0]))
    logits = weights_2[0] + spread * _NORMAL * np.array([0.0, -1.0, 1.0])
    value, low, high = (1 / (1 + np.exp(-logits))).tolist()
    return {"value": value, "low": low, "high": high, "slope": float(weights_2[1])}


def by_language(
    pairs: Sequence[Pair], outcomes: Sequence[Outcome], languages: Sequence[str]
) -> dict[str, Any]:
    """Summarises the outcomes of the pairs of two systems by language.

    Args:
      pairs, outcomes: as of `pair_summary`.
      languages: of each pair, as codes.

    Returns:
      'a', 'b': names of the systems; 'languages': code -> `pair_summary`, in order of the codes; 'mean': {'win', 'loss',
      'tie', 'rate'} averaged over languages, as if each had as many prompts; 'worst': the language of the lowest rate.
      The last two leave out languages without a judged pair, and are None if there is none.
    """
    summaries = {
        code: pair_summary(
            [pair for pair, one in zip(pairs, languages, strict=True) if one == code],
            [outcome for outcome, one in zip(outcomes, languages, strict=True) if one == code],
        )
        for code in sorted(set(languages))
    }
    judged = {code: one for code, one in summaries.items() if one["rate"] is not None}
    names = ("win", "loss", "tie", "rate")
    return {
        "a": pairs[0].systems[0],
        "b": pairs[0].systems[1],
        "languages": summaries,
        "mean": {n: float(np.mean([one[n]["value"] for one in judged.values()])) for n in names}
        if judged
        else None,
        "worst": min(judged, key=lambda code: judged[code]["rate"]["value"]) if judged else None,
    }


def system_summary(system: System) -> dict[str, Any]:
    """Returns lengths of a system's answers, because a judge may prefer longer ones for their length alone."""

    def lengths(size: Callable[[str], int]) -> dict[str, float]:
        sizes = [size(answer.text) for answer in system.answers]
        return {"mean": round(float(np.mean(sizes)), 2), "median": float(np.median(sizes))}

    return {
        "file": system.path,
        "answers": len(system.answers),
        "empty": sum(not answer.text.strip() for answer in system.answers),
        "characters": lengths(len),
        "words": lengths(lambda text: len(text.split())),
    }
