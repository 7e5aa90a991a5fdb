"""The mixing schedule against a greedy simulation in exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

from espalier.data.stream import mixing, schedule


def greedy(shares, slots):
    """Largest deficit first, with exact fractions and no period."""
    shares = [Fraction(int(q), int(sum(shares))) for q in shares]
    deficits = [Fraction(0)] * len(shares)
    out = []
    for _ in range(slots):
        deficits = [d + q for d, q in zip(deficits, shares, strict=True)]
        chosen = max(range(len(shares)), key=lambda i: (deficits[i], -i))
        deficits[chosen] -= 1
        out.append(chosen)
    return out


@pytest.mark.parametrize(
    "counts", [[1], [5, 3], [7, 0, 3], [1, 1, 1], [1, 97, 2], [13, 8, 5, 3, 2, 1, 1]]
)
def test_table_equals_greedy_and_has_the_period_of_its_sum(counts):
    counts = np.array(counts)
    period = int(counts.sum())
    long = greedy(counts, 3 * period)
    assert schedule.diffuse(counts, period).tolist() == long[:period]
    assert long[:period] * 3 == long


def test_many_sources_stay_within_about_one_row_of_their_share():
    rng = np.random.default_rng(0)
    for sources in (2, 10, 100):
        counts = schedule.integer_shares(
            rng.dirichlet(np.ones(sources) * 0.5) + 1e-4, "x" * sources
        )
        slots = 5000
        dealt = np.zeros((slots, sources))
        dealt[np.arange(slots), schedule.diffuse(counts, slots)] = 1
        wanted = np.outer(np.arange(1, slots + 1), counts / counts.sum())
        assert np.abs(dealt.cumsum(axis=0) - wanted).max() < 1.05


def test_closed_form_equals_counting_through_phases_and_periods():
    """(source, position) by arithmetic against a loop over every slot of three phases."""
    batch_size = 24
    phases = [(0, [0.7, 0.3, 0.0]), (40, [0.2, 0.3, 0.5]), (97, [0.0, 0.5, 0.5])]
    made = schedule.Schedule(phases, sources=("a", "b", "c"), batch_size=batch_size)
    used = np.zeros(3, int)
    starts = [start for start, _ in phases]
    for j, (start, shares) in enumerate(phases):
        end = starts[j + 1] if j + 1 < len(starts) else start + 60
        order = greedy(schedule.integer_shares(shares, "abc"), (end - start) * batch_size)
        for i, source in enumerate(order):
            step, row = start + i // batch_size, i % batch_size
            if row == 0:
                assert made.used(step).tolist() == used.tolist()
                sources, positions = made.locate(step, 0, batch_size)
            assert (sources[row], positions[row]) == (source, used[source])
            used[source] += 1


def test_positions_continue_over_many_periods(monkeypatch):
    monkeypatch.setattr(schedule, "_MIN_PERIOD", 16)
    monkeypatch.setattr(schedule, "_MAX_PERIOD", 64)
    made = schedule.Schedule([(0, [0.6, 0.4]), (31, [0.25, 0.75])], sources="ab", batch_size=7)
    seen = [[], []]
    for step in range(100):
        sources, positions = made.locate(step, 0, 7)
        for source, position in zip(sources, positions, strict=True):
            seen[source].append(int(position))
    assert seen == [list(range(len(s))) for s in seen]  # none twice, none left out


def test_phase_changes_need_only_the_slots_they_reach():
    many = [(50 * j, [1 + j % 3, 2.0]) for j in range(200)]
    made = schedule.Schedule(many, sources="ab", batch_size=4)
    assert max(len(phase.sources) for phase in made._phases[:-1]) == 200


@pytest.mark.parametrize("smallest", [1e-3, 1e-4, 3.3e-5])
def test_small_shares_are_relatively_right(smallest):
    shares = np.array([smallest, 0.3, 0.7 - smallest])
    counts = schedule.integer_shares(shares, "abc")
    np.testing.assert_allclose(counts / counts.sum(), shares, rtol=1e-3)
    assert 2**16 <= counts.sum() <= 2**20


def test_round_shares_are_exact():
    counts = schedule.integer_shares([0.7, 0.3], "ab")
    assert counts[0] * 3 == counts[1] * 7


def test_shares_that_round_to_zero_are_refused():
    with pytest.raises(ValueError, match="'tiny'.*round to zero"):
        schedule.integer_shares([1.0, 1e-7], ("big", "tiny"))
    assert schedule.integer_shares([1.0, 0.0], ("big", "none"))[1] == 0


@pytest.mark.parametrize("share", [0.25, 0.01])
def test_random_interleaving_is_as_noisy_as_independent_draws(share):
    counts = schedule.integer_shares([share, 1 - share], "ab")
    drawn = schedule.shuffle_period(counts, 10_000, seed=5) == 0
    for n in (1_000, 10_000):
        bound = 4 * np.sqrt(share * (1 - share) / n)
        assert abs(drawn[:n].mean() - share) <= bound
    made = [
        schedule.Schedule(
            [(0, [share, 1 - share])], sources="ab", batch_size=8, interleaving="random", seed=seed
        )
        for seed in (0, 0, 1)
    ]
    first, same, other = (np.concatenate([m.locate(s, 0, 8)[0] for s in range(50)]) for m in made)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    sources, positions = made[0].locate(10**6, 0, 8)
    assert (positions >= 0).all()
    assert sources.shape == (8,)


def test_steps_before_the_first_and_unknown_interleavings_are_refused():
    made = schedule.Schedule([(0, [1.0])], sources="a", batch_size=2)
    with pytest.raises(ValueError, match="negative"):
        made.locate(-1, 0, 2)
    with pytest.raises(ValueError, match="interleaving is 'chain'"):
        schedule.Schedule([(0, [1.0])], sources="a", batch_size=2, interleaving="chain")


def test_weights_normalise_to_one():
    assert mixing.normalised({"b": 3, "a": 1, "c": 0}, ("a", "b", "c"), "x") == {
        "a": 0.25,
        "b": 0.75,
    }


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"englsh": 1.0}, "unknown source 'englsh'.*'english'"),
        ({"english": -0.5}, "must be >= 0"),
        ({"english": float("nan")}, "finite"),
        ({"english": 0.0}, "cannot be normalised"),
        ({}, "cannot be normalised"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        mixing.normalised(weights, ("english", "python"), "phases[0]")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), "empty"),
        (((5, {"a": 1}),), "must start at step 0"),
        (((0, {"a": 1}), (0, {"b": 1})), "not after step 0"),
        (((0.0, {"a": 1}),), "must be an integer"),
        ((("a", 1.0),), r"phases\[0\]: expected"),
        (((0, {"a": 1}), (3, {"z": 1})), r"phases\[1\]: unknown source 'z'"),
    ],
)
def test_malformed_phases_are_refused(phases, message):
    with pytest.raises(ValueError, match=message):
        mixing.checked_phases(phases, ("a", "b"))


def test_temperature_evens_out_and_the_cap_applies_first():
    tempered = mixing.tempered({"a": 100, "b": 10_000}, 2.0)
    assert tempered == {"a": 10.0, "b": 100.0}
    assert mixing.tempered({"a": 100, "b": 10_000}, 1.0, cap=400) == {"a": 100.0, "b": 400.0}
    with pytest.raises(ValueError, match="temperature"):
        mixing.tempered({"a": 1}, 0)
