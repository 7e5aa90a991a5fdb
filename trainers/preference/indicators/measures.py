"""Statistics of a set of outputs, in float64 on the host. Shape: N outputs or pairs."""

import math
from collections.abc import Sequence

import numpy as np


def distinct_ngrams(outputs: Sequence[Sequence[int]], *, n: int, vocab_size: int) -> float:
    """Returns expectation-adjusted distinct n-grams (arXiv 2202.13587) over all outputs together.

    N / (V (1 - ((V - 1) / V)^C)): the number N of distinct n-grams among C n-grams, divided by the expected number of
    distinct values in C uniform draws from V. V is the vocabulary size for every n, as in the authors' code. NaN if no
    output has n tokens.
    """
    ngrams = [tuple(row[i : i + n]) for row in outputs for i in range(len(row) - n + 1)]
    if not ngrams:
        return math.nan
    # 1 - (1 - 1/V)^C by log1p and expm1, which avoid cancellation; it is 1 for V = 1.
    missed = len(ngrams) * math.log1p(-1 / vocab_size) if vocab_size > 1 else -math.inf
    return len(set(ngrams)) / (vocab_size * -math.expm1(missed))


def diversity(
    outputs: Sequence[Sequence[int]], *, vocab_size: int, sizes: Sequence[int] = (1, 2, 3, 4, 5)
) -> float:
    """Returns the paper's EAD: `distinct_ngrams` averaged over the n for which any output has n tokens."""
    values = [distinct_ngrams(outputs, n=n, vocab_size=vocab_size) for n in sizes]
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


def pearson(x_N: Sequence[float], y_N: Sequence[float]) -> float:
    """Pearson correlation of two series, such as likelihood and length of outputs; NaN if one of them is constant."""
    x, y = (np.asarray(values, np.float64) - np.mean(values) for values in (x_N, y_N))
    norm = math.sqrt(float(np.dot(x, x) * np.dot(y, y)))
    return float(np.dot(x, y)) / norm if norm else math.nan
