"""Numbers of a set of outputs, in float64 on the host. Shape: N outputs or pairs."""

import math
from collections.abc import Sequence

import numpy as np

from trainers.rewards.base import Completion, Reward, finite_rewards


def distinct_ngrams(outputs: Sequence[Sequence[int]], *, n: int, vocab_size: int) -> float:
    """Expectation-adjusted distinct n-grams (arXiv 2202.13587), of all outputs together.

    N / (V (1 - ((V - 1) / V)^C)): N different n-grams among C, over what C uniform draws of V give. V is the size of
    the vocabulary for every n, as in the authors' code. NaN where no output has n tokens.
    """
    ngrams = [tuple(row[i : i + n]) for row in outputs for i in range(len(row) - n + 1)]
    if not ngrams:
        return math.nan
    # 1 - (1 - 1/V)^C without its cancellation; one word alone is drawn always.
    missed = len(ngrams) * math.log1p(-1 / vocab_size) if vocab_size > 1 else -math.inf
    return len(set(ngrams)) / (vocab_size * -math.expm1(missed))


def diversity(
    outputs: Sequence[Sequence[int]], *, vocab_size: int, sizes: Sequence[int] = (1, 2, 3, 4, 5)
) -> float:
    """EAD of the paper: `distinct_ngrams` averaged over the n for which there are n-grams."""
    values = [distinct_ngrams(outputs, n=n, vocab_size=vocab_size) for n in sizes]
    there = [value for value in values if not math.isnan(value)]
    return float(np.mean(there)) if there else math.nan


def win_probability(policy_N: np.ndarray, competitor_N: np.ndarray) -> float:
    """P_win: the mean over prompts of sigma(r_policy - r_competitor), rewards of one model."""
    margin_N = np.asarray(policy_N, np.float64) - np.asarray(competitor_N, np.float64)
    return float(np.mean(0.5 * (1 + np.tanh(margin_N / 2))))


def sampled_divergence(policy_N: np.ndarray, reference_N: np.ndarray) -> float:
    """Mean over outputs of log pi_theta(y) - log pi_ref(y), in nats.

    Of outputs drawn from the policy itself this estimates KL(pi_theta || pi_ref); of those drawn at a temperature
    or with top-p it is what it is, a mean log-ratio where the policy writes.
    """
    return float(np.mean(np.asarray(policy_N, np.float64) - np.asarray(reference_N, np.float64)))


def likelihood_distance(policy_N: np.ndarray, reference_N: np.ndarray) -> float:
    """L2 distance of the mean token log-likelihoods of policy and reference, over the root of their number.

    The paper's proxy of the divergence (appendix), divided so that it does not grow with the held-out set.
    """
    away_N = np.asarray(policy_N, np.float64) - np.asarray(reference_N, np.float64)
    return float(np.sqrt(np.mean(np.square(away_N))))


def pearson(x_N: Sequence[float], y_N: Sequence[float]) -> float:
    """Correlation of two series, such as likelihood and length of output; NaN where one of them does not vary."""
    x, y = (np.asarray(values, np.float64) - np.mean(values) for values in (x_N, y_N))
    norm = math.sqrt(float(np.dot(x, x) * np.dot(y, y)))
    return float(np.dot(x, y)) / norm if norm else math.nan


class Judge:
    """Compares a policy's outputs with a competitor's by a reward; both have one output for each prompt.

    Args:
      reward: judges outputs.
      competing: the competitor's outputs; None for the policy's own of the first call.
    """

    def __init__(self, reward: Reward, competing: Sequence[Completion] | None):
        self._reward = reward
        self._competing_N = None if competing is None else self.rewards(competing)

    def rewards(self, outputs: Sequence[Completion]) -> np.ndarray:
        """float32 [N]; raises ValueError for rewards that are not finite numbers."""
        return finite_rewards(self._reward, outputs, macro="INDICATORS_REWARD")

    def win_probability(self, rewards_N: np.ndarray) -> float:
        """P_win of outputs with these rewards; without a competitor, the first call's rewards compete."""
        if self._competing_N is None:
            self._competing_N = rewards_N
        return win_probability(rewards_N, self._competing_N)
