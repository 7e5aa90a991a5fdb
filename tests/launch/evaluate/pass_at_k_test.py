"""pass@k against all subsets of samples, and its interval against scipy's."""

import itertools
import math

import pytest
from scipy import stats

from espalier.launch.evaluate.pass_at_k import mean_pass_at_k, pass_at_k


def test_it_is_the_share_of_subsets_in_which_one_passes():
    for samples in range(1, 9):
        for passed in range(samples + 1):
            outcomes = [i < passed for i in range(samples)]
            for k in range(1, samples + 1):
                drawn = [any(subset) for subset in itertools.combinations(outcomes, k)]
                expected = sum(drawn) / len(drawn)
                assert pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("samples", "passed", "k"), [(200, 3, 100), (10_000, 1, 5_000), (2000, 700, 10)]
)
def test_many_samples_are_exact_too(samples, passed, k):
    exact = 1 - math.comb(samples - passed, k) / math.comb(samples, k)
    assert pass_at_k(samples, passed, k) == pytest.approx(exact, rel=1e-12)


def test_one_sample_each_has_wilsons_interval():
    for passed in (0, 1, 20, 163, 164):
        found = mean_pass_at_k([(1, i < passed) for i in range(164)], 1)
        wilson = stats.binomtest(passed, 164).proportion_ci(0.95, method="wilson")
        assert found.value == pytest.approx(passed / 164)
        assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
        assert found.problems == 164


def test_the_mean_is_over_problems_not_over_samples():
    assert mean_pass_at_k([(2, 1), (10, 10)], 1).value == pytest.approx(0.75)
    assert mean_pass_at_k([(2, 1), (10, 10)], 2).value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 6, 1), "6 of 5 samples"),
        ((5, -1, 1), "-1 of 5 samples"),
        ((5, 1, 6), "pass@6 cannot be estimated from 5 samples"),
        ((5, 1, 0), "pass@0 cannot"),
    ],
)
def test_what_cannot_be_estimated_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)
    with pytest.raises(ValueError, match="no problem"):
        mean_pass_at_k([], 1)
