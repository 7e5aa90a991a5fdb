"""The stateless order: a bijection per epoch, different for every epoch, seed and source."""

import itertools

import numpy as np
import pytest

from espalier.data.stream import order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permutes_every_range(size):
    for key in (0, 1, 2**64 - 1):
        rows = order.permute(np.arange(size), size, key)
        assert sorted(rows.tolist()) == list(range(size))


def test_large_ranges_need_no_table():
    size = 2**40 + 12345
    some = np.array([0, 1, size // 2, size - 1])
    rows = order.permute(some, size, 7)
    assert len(set(rows.tolist())) == 4
    assert rows.min() >= 0
    assert rows.max() < size
    # One at a time or all together is the same.
    assert [int(order.permute(np.array([x]), size, 7)[0]) for x in some] == rows.tolist()


def inverse(y, size, key):
    """The place of a row, by the network backwards in whole numbers of any size."""
    half = (max(size - 1, 1).bit_length() + 1) // 2
    mask, word = 2**half - 1, 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    while True:
        left, right = y >> half, y & mask
        for i in reversed(range(6)):
            round_key = mix((key + (i + 1) * 0x9E3779B97F4A7C15) & word)
            left, right = right ^ (mix((left + round_key) & word) & mask), left
        y = (left << half) | right
        if y < size:
            return y


@pytest.mark.parametrize("size", [1000, 5 * 10**8, 2**32 + 1, 2**40, 10**12, 2**61 + 3])
def test_every_row_of_a_large_range_has_one_place(size):
    rng = np.random.default_rng(0)
    for key in (5, 2**64 - 3):
        rows = rng.integers(0, size, 300)
        rows[:2] = 0, size - 1
        places = np.array([inverse(row, size, key) for row in rows.tolist()])
        assert places.max() < size
        np.testing.assert_array_equal(order.permute(places, size, key), rows)
    if size > 10**8:  # neighbours: no two at one row, and spread over the range
        rows = order.permute(np.arange(size - 200_000, size), size, 1)
        assert len(np.unique(rows)) == 200_000 and rows.min() >= 0 and rows.max() < size
        counts = np.histogram(rows.astype(float), 16, (0, float(size)))[0]
        assert np.abs(counts - 12_500).max() < 5 * np.sqrt(12_500)


def test_small_ranges_reach_every_permutation():
    seen = {
        tuple(order.permute(np.arange(3), 3, order.hash64("k", i)).tolist()) for i in range(200)
    }
    assert seen == set(itertools.permutations(range(3)))


def test_places_are_uniform():
    size, keys = 10, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), order.permute(np.arange(size), size, order.hash64(key))] += 1
    expected = keys / size
    # Each of 100 cells is binomial with standard deviation 19; five of them is never reached.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.9)


def test_neighbours_are_not_kept_together():
    size = 10_000
    rows = order.permute(np.arange(size), size, 3)
    assert np.mean(np.abs(np.diff(rows)) == 1) < 0.002
    assert abs(np.corrcoef(np.arange(size), rows)[0, 1]) < 0.05


def test_each_row_once_per_epoch_and_epochs_seeds_and_sources_differ():
    rows = 257
    positions = np.arange(3 * rows)
    epochs, out = order.shuffled_rows(positions, rows, 0, "a")
    assert epochs.tolist() == np.repeat([0, 1, 2], rows).tolist()
    for epoch in range(3):
        assert sorted(out[epochs == epoch].tolist()) == list(range(rows))
    first = out[:rows].tolist()
    assert first != out[rows : 2 * rows].tolist()
    assert first != order.shuffled_rows(positions, rows, 1, "a")[1][:rows].tolist()
    assert first != order.shuffled_rows(positions, rows, 0, "b")[1][:rows].tolist()
    # The second epoch of one seed is not the first of the next seed, a known trap.
    assert (
        order.shuffled_rows(positions, rows, 1, "a")[1][:rows].tolist()
        != out[rows : 2 * rows].tolist()
    )


def test_order_does_not_change_between_versions():
    """A change here changes the data of every run that is resumed: it must never happen unseen."""
    assert order.hash64("english", 1) == 0x251424F38906EB65
    assert order.permute(np.arange(10), 10, 42).tolist() == [1, 5, 2, 9, 8, 0, 7, 6, 3, 4]
