"""UniMax: shares sum to the budget, no source beyond its epochs, all others alike."""

import numpy as np
import pytest

from espalier.data.stream import mixing


@pytest.mark.parametrize("seed", range(20))
def test_parts_fill_the_budget_within_the_cap_and_uncapped_sources_are_equal(seed):
    rng = np.random.default_rng(seed)
    sizes = {f"s{i}": float(size) for i, size in enumerate(rng.integers(1, 10_000, size=12))}
    epochs = float(rng.uniform(0.5, 6))
    budget = float(rng.uniform(0.05, 1)) * epochs * sum(sizes.values())
    parts = mixing.unimax(sizes, budget, epochs)
    assert list(parts) == list(sizes) and sum(parts.values()) == pytest.approx(budget)
    assert all(parts[name] <= epochs * size * (1 + 1e-12) for name, size in sizes.items())
    free = [part for name, part in parts.items() if part < epochs * sizes[name] * (1 - 1e-9)]
    assert np.ptp(free or [0.0]) <= 1e-6 * budget
    # No capped source could have had more than the others have.
    capped = [epochs * sizes[name] for name in parts if parts[name] not in free]
    assert not free or max(capped, default=0.0) <= max(free) * (1 + 1e-9)


def test_parts_at_known_values():
    sizes = {"large": 1000, "small": 10, "middle": 100}
    assert mixing.unimax(sizes, 300, 2) == {"large": 140, "small": 20, "middle": 140}
    assert mixing.unimax(sizes, 30, 2) == {"large": 10, "small": 10, "middle": 10}
    assert mixing.unimax(sizes, 2220, 2) == {"large": 2000, "small": 20, "middle": 200}


def test_a_budget_beyond_all_epochs_and_bad_numbers_are_errors():
    with pytest.raises(ValueError, match="fewer than the budget of 31. Raise unimax_epochs"):
        mixing.unimax({"a": 10}, 31, 3)
    with pytest.raises(ValueError, match="positive numbers"):
        mixing.unimax({"a": 0}, 1, 3)
