"""The mixing schedule against a greedy simulation in exact fractions, and sources that reach their caps."""

import collections
import itertools
from fractions import Fraction

import numpy as np
import pytest

from espalier.data.cache import store
from espalier.data.stream import mixing, rows, schedule
from espalier.data.stream.train_stream import Stream


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


def test_counts_are_exact_at_steps_of_billions():
    """Ten trillion rows: sums, shares and places, in whole numbers of any size."""
    batch_size, change = 4096, 10**9 + 7
    phases = [(0, [0.7, 0.3, 0.0]), (change, [0.2, 0.3, 0.5])]
    made = schedule.Schedule(phases, sources=("a", "b", "c"), batch_size=batch_size)
    for step in (change - 1, change, 3 * 10**9 + 1):
        used = made.used(step).tolist()
        assert sum(used) == step * batch_size
        wanted = [Fraction(0)] * 3
        for (start, _), end in zip(phases, (change, max(step, change)), strict=True):
            shares = made._phases[made.starts.index(start)].shares.tolist()
            slots = (min(end, step) - start) * batch_size if step > start else 0
            wanted = [w + Fraction(q * slots, sum(shares)) for w, q in zip(wanted, shares, strict=True)]  # fmt: skip
        assert max(abs(u - w) for u, w in zip(used, wanted, strict=True)) < 3
        sources, positions = made.locate(step, 0, batch_size)
        for source, before in enumerate(used):
            here = positions[sources == source].tolist()
            assert here == list(range(before, before + len(here)))
    with pytest.raises(ValueError, match="64 bits do not count the rows"):
        made.locate(2**62, 0, 1)
    # A cap that no run reaches ends the search for the step that reaches it.
    phases = [(0, {"a": 1.0})]
    make = lambda found: schedule.Schedule([(0, [1.0])], sources=("a",), batch_size=8)  # noqa: E731
    assert schedule.redistribute(phases, {"a": 2**63 - 1}, make) == (phases, [], None)


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


ROWS = {"a": 30, "b": 400, "c": 100}
BATCH = 16
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Documents of exactly one row each, so that documents, rows and epochs are one count."""
    root = tmp_path_factory.mktemp("caches")
    return {
        name: store.write(
            root / name,
            [{"targets": np.full(8, 1 + i % 90)} for i in range(count)],
            features={"targets": 100},
        )
        for name, count in ROWS.items()
    }


@pytest.fixture
def make(caches):
    def build(phases=((0, SHARES),), batch_size=BATCH, **settings):
        names = [name for name in ROWS if any(name in shares for _, shares in phases)]
        sources = [rows.plan_source(name, caches[name], {"targets": 8}) for name in names]
        return Stream(sources, phases, batch_size=batch_size, **settings)

    return build


def read(made, steps):
    """Rows of each source, as the batches hold them."""
    return collections.Counter(
        row["source"] for step in steps for row in made.documents(step, 0, made.batch_size)
    )


def assert_equal(one, other):
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("interleaving", ["error_diffusion", "random"])
@pytest.mark.parametrize("cap", [1.0, 2.5, 7])
def test_a_capped_source_is_read_as_often_as_it_may_and_the_others_share_pro_rata(
    make, cap, interleaving
):
    made = make(max_epochs={"a": cap}, on_cap="redistribute", interleaving=interleaving)
    plain = make(interleaving=interleaving)
    limit = int(cap * ROWS["a"])
    counts = list(itertools.accumulate(read(plain, [step])["a"] for step in range(60)))
    reached = next(step for step, count in enumerate(counts) if count > limit)
    for step in range(reached):
        assert_equal(made.batch(step, 0, BATCH), plain.batch(step, 0, BATCH))
    before, after = read(made, range(reached)), read(made, range(reached, reached + 50))
    assert before["a"] <= limit < before["a"] + BATCH and after["a"] == 0
    if interleaving == "error_diffusion":
        assert abs(after["b"] - 0.6 * 50 * BATCH) <= 1 and abs(after["c"] - 0.4 * 50 * BATCH) <= 1
    assert made.epochs(reached + 50)["a"] == before["a"] / ROWS["a"] <= cap
    (said,) = made.check_repeats(reached + 50)
    assert f"a reach max_epochs at step {reached}" in said
    assert made.check_repeats(reached) == []


def test_caps_of_several_sources_and_phases_are_met_one_after_the_other(make):
    phases = ((0, SHARES), (20, {"a": 0.25, "b": 0.75}), (60, {"a": 0.2, "c": 0.8}))
    made = make(phases, max_epochs={"a": 8, "c": 1.5}, on_cap="redistribute")
    seen, steps = collections.Counter(), 0
    for step in range(70):
        try:
            seen += read(made, [step])
        except ValueError as error:
            assert "reached max_epochs" in str(error)
            break
        steps = step + 1
    # a is full in the second phase, c in the third, where nothing else is left.
    assert 8 * ROWS["a"] - BATCH < seen["a"] <= 8 * ROWS["a"]
    assert 1.5 * ROWS["c"] - BATCH < seen["c"] <= 1.5 * ROWS["c"]
    assert read(made, range(60, steps)).keys() == {"c"}
    assert {name: count / ROWS[name] for name, count in seen.items()} == made.epochs(steps)
    with pytest.raises(ValueError, match=rf"From step {steps} on, all sources.*The run has 70"):
        made.check_repeats(70)
    with pytest.raises(ValueError, match="The budget needs .* tokens more"):
        made.steps_for_tokens(8 * BATCH * 70)
    assert made.steps_for_tokens(8 * BATCH * steps) == steps


def test_capped_batches_are_a_pure_function_of_the_step_on_any_number_of_hosts(make):
    settings = {"max_epochs": 2, "on_cap": "redistribute"}
    whole = make(**settings)
    for step in (0, 7, 8, 9, 30):
        for hosts in (2, 8):
            share = BATCH // hosts
            parts = [make(**settings).batch(step, h * share, (h + 1) * share) for h in range(hosts)]
            joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
            assert_equal(joined, whole.batch(step, 0, BATCH))


def test_a_cap_that_is_not_reached_changes_no_batch(make):
    plain = make()
    for settings in (
        {"max_epochs": 1e6, "on_cap": "redistribute"},
        {"max_epochs": {"a": 1}, "on_cap": "warn"},
        {"max_epochs": {"a": 1}, "on_cap": "error"},
    ):
        capped = make(**settings)
        for step in (0, 9, 500):
            assert_equal(capped.batch(step, 0, BATCH), plain.batch(step, 0, BATCH))
        assert (capped.fingerprint == plain.fingerprint) == (settings["on_cap"] != "redistribute")


def test_a_run_that_would_pass_a_cap_is_told_before_it_starts(make):
    fine = make(max_epochs={"a": 4}).check_repeats(14)
    assert fine == []
    with pytest.raises(
        ValueError,
        match=r"source 'a' has 240 tokens, and 20 steps read 1,280 tokens of it: 5\.33 epochs, but "
        r"max_epochs allows 4\.00\. Lower its share.*on_cap='redistribute'",
    ):
        make(max_epochs={"a": 4}).check_repeats(20)
    (said,) = make(max_epochs={"a": 4}, on_cap="warn").check_repeats(20)
    assert "5.33 epochs" in said
    assert make().check_repeats(10**9) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_epochs": {"d": 1}}, "unknown source 'd'"),
        ({"max_epochs": 0}, "must be positive"),
        ({"max_epochs": {"a": float("inf")}}, "must be positive"),
        ({"max_epochs": 1, "on_cap": "redistibute"}, "'redistribute'"),
        ({"max_epochs": 0.01, "on_cap": "redistribute"}, "leaves no row of 'a', 'b', 'c'"),
    ],
)
def test_caps_that_mean_nothing_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_limits_are_whole_rows():
    assert schedule.row_limits(1.5, {"a": 3, "b": 10}) == {"a": 4, "b": 15}
    assert schedule.row_limits({"b": 2}, {"a": 3, "b": 10}) == {"b": 20}
    assert schedule.row_limits(None, {"a": 3}) == {}


# Phases that are runs of their own.


def test_a_run_that_reads_on_equals_the_second_phase_of_one_run(make):
    second = {"a": 0.1, "c": 0.9}
    one = make(((0, SHARES), (23, second)))
    positions = make().positions(23)
    other = make(((0, second),), positions=positions)
    for step in (0, 1, 10, 300):
        first, then = one.documents(23 + step, 0, BATCH), other.documents(step, 0, BATCH)
        assert first == then
    assert other.epochs(10)["a"] == one.epochs(33)["a"]
    assert other.fingerprint != make(((0, second),)).fingerprint
    # And what a third would begin with.
    assert other.positions(7)["c"] == one.positions(30)["c"]


def test_no_document_comes_twice_before_all_have_come_when_a_phase_reads_on(make):
    positions = make().positions(20)
    other = make(((0, {"b": 1.0}),), positions=positions)
    seen = collections.Counter()
    for made, steps in ((make(), 20), (other, 30)):
        for step in range(steps):
            for row in made.documents(step, 0, BATCH):
                if row["source"] == "b":
                    seen.update([row["row"]])
    times = [seen[row] for row in range(ROWS["b"])]
    assert sum(times) == round(other.epochs(30)["b"] * ROWS["b"])
    assert set(times) == {1, 2}


def test_what_was_read_before_counts_for_a_cap(make):
    positions = make().positions(10)
    settings = {"max_epochs": {"a": 4}, "on_cap": "redistribute", "positions": positions}
    made = make(((0, {"a": 0.5, "b": 0.5}),), **settings)
    total = read(make(), range(10))["a"] + read(made, range(20))["a"]
    assert 4 * ROWS["a"] - BATCH < total <= 4 * ROWS["a"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 4}])
def test_another_order_cannot_be_read_on(make, caches, change):
    positions = make().positions(10)
    source = rows.plan_source("a", caches["a"], {"targets": change.get("length", 8)})
    with pytest.raises(ValueError, match="'a' cannot continue.*INITIAL_DATA = 'restart'"):
        Stream(
            [source],
            ((0, {"a": 1.0}),),
            batch_size=4,
            seed=change.get("seed", 0),
            positions=positions,
        )
