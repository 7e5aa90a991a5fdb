"""Statistics of a set of outputs, in float64 on the host. Shape: N outputs or pairs."""

import collections
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from espalier.common.ranges import Size

Alphabet = Literal["tokens", "ngrams"]


def distinct_ngrams(
    outputs: Sequence[Sequence[int]],
    *,
    n: int,
    vocab_size: int,
    draws: int | None = None,
    alphabet: Alphabet = "tokens",
) -> float:
    """Returns expectation-adjusted distinct n-grams (arXiv 2202.13587) over all outputs together.

    N / (V (1 - ((V - 1) / V)^C)): the number N of distinct n-grams among C n-grams, divided by the expected number of
    distinct values in C uniform draws from V. NaN if no output has n tokens.

    With V = `vocab_size` for every n, as in the authors' code, and many more n-grams than V, this is N / V, which grows
    with the length and the number of outputs and exceeds 1. With `draws` and alphabet 'ngrams' it depends on neither
    and is at most 1 + draws / V.

    Args:
      draws: C, instead of the number of n-grams; N is then the expected number of distinct n-grams among C that are drawn
        from all without replacement (rarefaction, Hurlbert 1971). NaN if there are fewer.
      alphabet: 'tokens' for V = vocab_size, 'ngrams' for V = vocab_size^n.
    """
    if alphabet not in get_args(Alphabet):
        raise ValueError(f"alphabet = {alphabet!r}: choose from {get_args(Alphabet)}.")
    counts = collections.Counter(
        tuple(row[i : i + n]) for row in outputs for i in range(len(row) - n + 1)
    )
    total, size = counts.total(), vocab_size if alphabet == "tokens" else vocab_size**n
    if not total or total < (draws or 0):
        return math.nan
    number = len(counts) if draws is None else _rarefied(list(counts.values()), draws)
    # 1 - (1 - 1/V)^C by log1p and expm1, which avoid cancellation; it is 1 for V = 1.
    missed = (draws or total) * math.log1p(-1 / size) if size > 1 else -math.inf
    return number / (size * -math.expm1(missed))


def _rarefied(counts: Sequence[int], draws: int) -> float:
    """Returns the expected number of distinct kinds among `draws` items, drawn without replacement; `counts` are of kinds.

    A kind of c items among C is absent with probability binom(C - c, draws) / binom(C, draws).
    """
    total, expected = sum(counts), 0.0
    for count, kinds in collections.Counter(counts).items():
        rest = total - count - draws  # items of other kinds that are not drawn
        if rest < 0:
            expected += kinds
            continue
        logs = (total - count, total - draws, rest, total)
        above, beside, below, all_of_them = (math.lgamma(x + 1) for x in logs)
        expected -= kinds * math.expm1(above + beside - below - all_of_them)
    return expected


def diversity(
    outputs: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    sizes: Sequence[Size] = (1, 2, 3, 4, 5),
    draws: Size | None = None,
    alphabet: Alphabet = "tokens",
) -> float:
    """Returns the paper's EAD: `distinct_ngrams` averaged over the n of `sizes` for which it is defined.

    With `draws` it is NaN unless it is defined for all of them, so that values are comparable.
    """
    values = [
        distinct_ngrams(outputs, n=n, vocab_size=vocab_size, draws=draws, alphabet=alphabet)
        for n in sizes
    ]
    if draws is not None:
        return float(np.mean(values))
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def win_probability(policy_N: np.ndarray, competitor_N: np.ndarray) -> float:
    """P_win: the mean over prompts of sigma(r_policy - r_competitor); both rewards are by the same reward model."""
    margin_N = np.asarray(policy_N, np.float64) - np.asarray(competitor_N, np.float64)
    return float(np.mean(0.5 * (1 + np.tanh(margin_N / 2))))


def sampled_divergence(policy_N: np.ndarray, reference_N: np.ndarray) -> float:
    """Mean over outputs of log pi_theta(y) - log pi_ref(y), in nats.

    With outputs sampled from the policy at temperature 1 this estimates KL(pi_theta || pi_ref). With outputs sampled at
    another temperature or with top-p it is only a mean log-ratio on the policy's outputs.
    """
    return float(np.mean(np.asarray(policy_N, np.float64) - np.asarray(reference_N, np.float64)))


def likelihood_distance(policy_N: np.ndarray, reference_N: np.ndarray) -> float:
    """L2 distance of the mean token log-likelihoods of policy and reference, divided by sqrt(N).

    The paper's proxy of the divergence (appendix); the division makes it independent of the size of the held-out set.
    """
    away_N = np.asarray(policy_N, np.float64) - np.asarray(reference_N, np.float64)
    return float(np.sqrt(np.mean(np.square(away_N))))
