"""Caps on repeats, and phases that read on where others stopped, against rows counted one by one."""

import collections
import itertools

import numpy as np
import pytest

from espalier.data.cache import store
from espalier.data.stream import repeats, rows
from espalier.data.stream.train_stream import Stream

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
    assert repeats.row_limits(1.5, {"a": 3, "b": 10}) == {"a": 4, "b": 15}
    assert repeats.row_limits({"b": 2}, {"a": 3, "b": 10}) == {"b": 20}
    assert repeats.row_limits(None, {"a": 3}) == {}


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
