"""Diversity, P_win and distances: closed forms, exact fractions and limits."""

import collections
import math
from fractions import Fraction

import numpy as np
import pytest

from espalier.trainers.preference.indicators import measures


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


def rarefied_exactly(outputs, n, draws):
    """The expected number of distinct n-grams among `draws` of all, without replacement, in fractions."""
    grams = [tuple(row[i : i + n]) for row in outputs for i in range(len(row) - n + 1)]
    counts, total = collections.Counter(grams).values(), math.comb(len(grams), draws)
    return sum(1 - Fraction(math.comb(len(grams) - count, draws), total) for count in counts)


@pytest.mark.parametrize(("n", "draws"), [(1, 1), (1, 17), (2, 30), (3, 5)])
def test_a_fixed_number_of_ngrams_is_drawn_without_replacement(n, draws):
    rng = np.random.default_rng(n)
    outputs = [rng.integers(0, 4, size).tolist() for size in (2, 9, 30)]
    got = measures.distinct_ngrams(outputs, n=n, vocab_size=4, draws=draws, alphabet="ngrams")
    expected = 4**n * (1 - Fraction(4**n - 1, 4**n) ** draws)
    assert got == pytest.approx(float(rarefied_exactly(outputs, n, draws) / expected), rel=1e-10)
    total = sum(max(0, len(row) - n + 1) for row in outputs)
    everything = measures.distinct_ngrams(outputs, n=n, vocab_size=4, draws=total)
    assert everything == pytest.approx(ead_exactly(outputs, n, 4), rel=1e-10)
    assert math.isnan(measures.distinct_ngrams(outputs, n=n, vocab_size=4, draws=total + 1))


def test_with_a_fixed_number_of_ngrams_diversity_is_no_length_and_has_a_bound():
    rng, vocab, draws = np.random.default_rng(0), 300, 200
    settings = {"vocab_size": vocab, "sizes": (1, 2, 3), "draws": draws, "alphabet": "ngrams"}

    def outputs(count, length, of):
        return rng.integers(0, of, (count, length)).tolist()

    # Uniform draws have 1, texts of a tenth of the vocabulary less, however many and long they are.
    for of, value in ((300, 1.0), (30, None)):
        sizes = ((100, 6), (100, 12), (400, 6), (400, 24))
        values = [measures.diversity(outputs(*size, of), **settings) for size in sizes]
        assert np.ptp(values) < 0.02
        assert value is None or values == pytest.approx([value] * 4, abs=0.02)
        # As published it grows with the number of tokens.
        published = [measures.diversity(outputs(*size, of), vocab_size=vocab) for size in sizes]
        assert published[-1] > 1.5 * published[0]
    # No outputs have more than all different n-grams: 1 and at most draws / V^n more.
    different = [list(range(i, i + 10)) for i in range(0, 300, 10)]
    for n in (1, 2, 3):
        one = {"vocab_size": vocab, "n": n, "draws": draws, "alphabet": "ngrams"}
        most = measures.distinct_ngrams(different, **one)
        space = vocab**n
        assert most == pytest.approx(draws / (space * (1 - (1 - 1 / space) ** draws)), rel=1e-6)
        assert 1 <= most <= 1 + draws / space
    assert math.isnan(measures.diversity([[1] * 150] * 2, **{**settings, "draws": 299}))
    with pytest.raises(ValueError, match="'tokens', 'ngrams'"):
        measures.distinct_ngrams([[1]], n=1, vocab_size=2, alphabet="letters")


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
