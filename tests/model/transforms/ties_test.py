"""TIES of bfloat16 against mergekit: they differ only where deltas are as large as the smallest that stays.

Differences of bfloat16 are often equally large, and where the number of values that stay ends among equal ones, any of them may
stay. A float64 enumeration of these choices has the results of both; here, of equal ones the first stay.
"""

import itertools
import pathlib

import ml_dtypes
import numpy as np
import pytest

from tests.model.transforms.merge_test import merged

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "ties.npz")
INPUTS = list(GOLDENS["inputs"].view(ml_dtypes.bfloat16))
WEIGHTS = GOLDENS["weights"].tolist()


def by_definition(deltas, masks):
    """The merge in float64: signs are elected by the sum of weighted deltas, and those that agree are averaged."""
    terms = np.stack([w * d * m for w, d, m in zip(WEIGHTS, deltas, masks, strict=True)])
    sign = np.where(terms.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(terms) == sign
    weight = (np.array(WEIGHTS)[:, None, None] * agree).sum(0)
    mean = (terms * agree).sum(0) / np.where(weight == 0, 1, weight)
    return INPUTS[0].astype(np.float64) + mean


@pytest.mark.parametrize("case", ["half", "few"])
def test_ties_differs_from_mergekit_among_equal_deltas_only(case):
    densities = GOLDENS[f"{case}/densities"].tolist()
    ours = merged("ties", INPUTS, weight=WEIGHTS, density=densities, dtype=np.dtype(np.float32))
    theirs = GOLDENS[case]
    deltas = [x.astype(np.float64) - INPUTS[0].astype(np.float64) for x in INPUTS[1:]]
    certain, equal, first = [], [], []
    for delta, density in zip(deltas, densities, strict=True):
        size, count = np.abs(delta), int(density * delta.size)
        smallest = np.sort(size, axis=None)[-count]
        certain.append(size > smallest)
        equal.append(size == smallest)
        left = count - certain[-1].sum()
        assert 0 < left < equal[-1].sum()  # a choice
        chosen = np.cumsum(equal[-1]).reshape(delta.shape) <= left
        first.append(certain[-1] | (equal[-1] & chosen))
    np.testing.assert_allclose(ours, by_definition(deltas, first), rtol=1e-6, atol=1e-7)

    choices = [
        by_definition(
            deltas, [c | (e & stays) for c, e, stays in zip(certain, equal, keep, strict=True)]
        )
        for keep in itertools.product((False, True), repeat=len(deltas))
    ]
    for result in (ours, theirs):
        assert np.min([np.abs(result - x) for x in choices], axis=0).max() < 1e-6
    open_ = np.any(equal, axis=0)
    np.testing.assert_allclose(ours[~open_], theirs[~open_], rtol=1e-6, atol=1e-7)
    assert np.abs(ours - theirs)[open_].max() > 1e-3  # they do differ
