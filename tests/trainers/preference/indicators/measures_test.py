"""Diversity, P_win and distances: closed forms, exact fractions and limits."""

import math
from fractions import Fraction

import numpy as np
import pytest

from trainers.preference.indicators import measures


def ead_exactly(outputs, n, vocab_size):
    grams = [tuple(row[i : i + n]) for row in outputs for i in range(len(row) - n + 1)]
    expected = vocab_size * (1 - Fraction(vocab_size - 1, vocab_size) ** len(grams))
    return float(len(set(grams)) / expected)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_ngrams_are_the_papers_formula_in_fractions(n):
    rng = np.random.default_rng(n)
    outputs = [rng.integers(0, 7, size).tolist() for size in (2, 9, 30)]
    got = measures.distinct_ngrams(outputs, n=n, vocab_size=7)
    assert got == pytest.approx(ead_exactly(outputs, n, 7), rel=1e-12)


def test_distinct_ngrams_in_limits():
    # As many as uniform draws give: one draw gives one word.
    assert measures.distinct_ngrams([[5]], n=1, vocab_size=50_000) == pytest.approx(1.0)
    # The whole of a small vocabulary, over and over.
    many = [list(range(4)) * 500]
    assert measures.distinct_ngrams(many, n=1, vocab_size=4) == pytest.approx(1.0)
    # One word alone, over and over: 1 / V.
    assert measures.distinct_ngrams([[3] * 5000], n=1, vocab_size=8) == pytest.approx(1 / 8)
    # A vocabulary so large that 1 - (1 - 1/V)^C would cancel.
    distinct = [list(range(100))]
    assert measures.distinct_ngrams(distinct, n=1, vocab_size=10**12) == pytest.approx(1, rel=1e-9)
    assert measures.distinct_ngrams([[1, 1]], n=1, vocab_size=1) == 1.0
    assert math.isnan(measures.distinct_ngrams([[1, 2]], n=3, vocab_size=9))


def test_diversity_is_the_mean_over_the_sizes_that_there_are():
    outputs = [[1, 2, 3], [1, 2, 4]]
    sizes = [measures.distinct_ngrams(outputs, n=n, vocab_size=9) for n in (1, 2, 3)]
    assert measures.diversity(outputs, vocab_size=9) == pytest.approx(np.mean(sizes))
    assert math.isnan(measures.diversity([[], []], vocab_size=9))


def test_ngrams_do_not_cross_outputs():
    apart = measures.distinct_ngrams([[1, 2], [3, 4]], n=2, vocab_size=9)
    assert apart == pytest.approx(ead_exactly([[1, 2], [3, 4]], 2, 9))


def test_p_win_of_equals_is_a_half_and_of_swapped_sides_adds_up_to_one():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50)) * 8
    assert measures.win_probability(a, a) == 0.5
    both = measures.win_probability(a, b) + measures.win_probability(b, a)
    assert both == pytest.approx(1, abs=1e-12)
    assert measures.win_probability(a, b) == pytest.approx(
        np.mean(1 / (1 + np.exp(b - a))), rel=1e-12
    )
    # Not the share of wins, and without overflow.
    assert measures.win_probability(np.array([1e4]), np.array([-1e4])) == 1.0
    assert measures.win_probability(np.array([math.log(3)]), np.zeros(1)) == pytest.approx(0.75)


def test_divergence_and_distance():
    ours, theirs = np.array([-3.0, -5.0]), np.array([-4.0, -9.0])
    assert measures.sampled_divergence(ours, theirs) == pytest.approx(2.5)
    assert measures.likelihood_distance(ours, theirs) == pytest.approx(math.sqrt(17 / 2))
    assert measures.likelihood_distance(ours, ours) == 0.0
    # The norm of the paper over the root of the number, which more of the same does not change.
    assert measures.likelihood_distance(np.tile(ours, 9), np.tile(theirs, 9)) == pytest.approx(
        math.sqrt(17 / 2)
    )


def test_the_correlation_is_numpys():
    x, y = np.random.default_rng(0).normal(size=(2, 20))
    assert measures.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
    assert measures.pearson(x, -2 * x) == pytest.approx(-1)
    assert math.isnan(measures.pearson(x, np.ones(20)))
