"""The search for weights: no trial twice, never below its start, the choice by mean and worst, collisions."""

import json

import numpy as np
import pytest
import yaml

from espalier.launch.merge import search, trials
from espalier.launch.merge.settings import MergeError
from espalier.launch.merge.trials import Trial, Trials

ONES = {"x": 1.0, "y": 1.0}  # losses of the best single model
TARGETS = {"x": np.array([0.7, 0.3, 0.0]), "y": np.array([0.2, 0.5, 0.3])}


def evaluate(weights):
    """Losses that are lowest near other weights for each domain."""
    return {
        k: (1 + float(np.square(np.array(weights) - t).sum()), 0.01) for k, t in TARGETS.items()
    }


def searched(path, method, *, budget=40, evaluate=evaluate, **more):
    found = Trials(str(path), {"models": 3}, evaluate, budget=budget)
    getattr(trials, method)(found, 3, **(more or {"delta": None, "single": ONES}))
    return found


@pytest.mark.parametrize(
    ("method", "more"), [("coordinate", {"delta": 0.1, "single": ONES}), ("random", {"seed": 1})]
)
def test_a_search_is_no_worse_than_its_start_and_is_resumed_without_repeats(tmp_path, method, more):
    whole = searched(tmp_path / "whole", method, **more)
    start = whole.done[whole.key([1, 1, 1])]
    assert next(iter(whole.done)) == start.weights
    best = trials.choose(list(whole.done.values()), delta=np.inf, single=ONES)
    assert best.mean(ONES) <= start.mean(ONES) and len(whole.done) <= 40
    seen = []

    def counted(weights):
        seen.append(weights)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return evaluate(weights)

    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut", method, evaluate=counted, **more)
    with open(tmp_path / "cut", "a") as file:
        file.write('{"weights": [0.1')  # killed while it wrote
    again = searched(tmp_path / "cut", method, evaluate=counted, **more)
    assert list(again.done) == list(whole.done) and again.new == len(whole.done) - 6
    assert len(set(seen[:6] + seen[7:])) == len(whole.done)
    assert (tmp_path / "cut").read_text() == (tmp_path / "whole").read_text()
    with pytest.raises(MergeError, match="other models"):
        Trials(str(tmp_path / "cut"), {"models": 4}, evaluate, budget=9)


def test_a_merge_without_a_loss_is_never_chosen(tmp_path):
    def some(weights):
        losses = evaluate(weights)
        return losses if max(weights) > 0.6 else {**losses, "y": (np.nan, np.nan)}

    found = Trials(str(tmp_path / "x"), {}, some, budget=30)
    equal, alone = trials.begin(found, 3)
    single = trials.best_single(alone)
    trials.coordinate(found, 3, delta=None, single=single)
    best, _ = trials.best_with_table(found, delta=None, single=single)
    assert equal.losses["y"] == np.inf and max(best.weights) > 0.6
    again = Trials(str(tmp_path / "x"), {}, some, budget=30)
    assert again.done[equal.weights].losses == equal.losses
    with pytest.raises(MergeError, match="y: the loss of every model alone"):
        trials.best_single([equal])


def squares(best):
    """Losses that are lowest, 1, at weights that need not sum to 1."""
    return lambda weights: {"x": (1 + float(np.square(np.subtract(weights, best)).sum()), 0.0)}


@pytest.mark.parametrize("best", [(1.0, 1.0, 1.0), (0.3, 0.3, 0.3), (1.0, 0.0, 0.7)])
def test_absolute_weights_are_searched_where_the_sum_matters(tmp_path, best):
    more = {"delta": None, "single": {"x": 1.0}}
    at = Trials(str(tmp_path / "t"), {}, squares(best), budget=40, absolute=True)
    trials.coordinate(at, 3, **more)
    assert trials.choose(list(at.done.values()), **more).weights == best
    # First all weights are equal, at each level but 0.
    assert list(at.done)[:4] == [(level,) * 3 for level in (1.0, 0.7, 0.5, 0.3)]
    assert (0.0, 0.0, 0.0) not in at.done
    drawn = Trials(str(tmp_path / "drawn"), {}, squares(best), budget=200, absolute=True)
    trials.random(drawn, 3, seed=0)
    weights = np.array(list(drawn.done)[1:])
    assert weights.min() >= 0 and weights.max() <= 1  # uniform: the mean of 597 is 0.5, +- 0.012
    assert abs(weights.mean() - 0.5) < 0.05 and np.ptp(weights.sum(1)) > 1


def test_a_coordinate_search_whose_choices_go_in_a_circle_ends(tmp_path):
    """Each of three trials is chosen over the one before, within delta of its worst loss, and the first over the last."""
    losses = {0.0: (1.0, 1.0), 0.3: (1.08, 0.72), 0.5: (1.16, 0.44)}

    def evaluate(weights):
        pair = losses.get(weights[0], (3.0, 3.0)) if weights[1] == 1 else (3.0, 3.0)
        return {k: (x, 0.0) for k, x in zip("xy", pair, strict=True)}

    class Counted(Trials):
        calls = 0

        def __call__(self, weights):
            self.calls += 1
            assert self.calls < 1000, "the search does not end"
            return super().__call__(weights)

    circle = Counted(str(tmp_path / "t"), {}, evaluate, budget=100, absolute=True)
    trials.coordinate(circle, 2, delta=0.1, single=ONES)
    assert len(circle.done) < 30


def test_choice_by_mean_and_worst():
    def trial(*losses):
        return Trial((1.0,), dict(zip("xy", losses, strict=True)), {"x": 0.2, "y": 0.01})

    low_mean, balanced, near = trial(0.5, 3.0), trial(2.0, 2.0), trial(2.1, 1.8)
    every = [low_mean, balanced, near]
    for delta, chosen in ((np.inf, low_mean), (0, balanced), (None, near)):
        assert trials.choose(every, delta=delta, single=ONES) is chosen  # None: the standard error
    # Losses count by that of the best single model: 1.8 nats of y are much where one model has 0.5.
    assert trials.choose([near, balanced, low_mean], delta=0, single={"x": 2.0, "y": 0.5}) is near
    assert trials.choose(every, delta=0, single={"x": 0.2, "y": 3.0}) is low_mean


def test_no_domain_is_given_up_for_one_of_higher_entropy(tmp_path):
    alone = {(1.0, 0.0): (0.8, 4.0), (0.0, 1.0): (2.0, 3.0), (0.5, 0.5): (0.9, 3.1)}

    def evaluate(weights):
        return {k: (x, 0.0) for k, x in zip(("code", "prose"), alone[weights], strict=True)}

    found = Trials(str(tmp_path / "t"), {}, evaluate, budget=0)
    equal, singles = trials.begin(found, 2)
    single = trials.best_single(singles)
    assert equal.weights == (0.5, 0.5) and single == {"code": 0.8, "prose": 3.0}
    every = list(found.done.values())
    assert min(every, key=lambda x: max(x.losses.values())).weights == (0.0, 1.0)  # in nats
    assert trials.choose(every, delta=0, single=single) is equal
    assert equal.worst(single) == 0.9 / 0.8
    lines = trials.table(["one", "two"], singles[1], equal, singles, [])
    assert lines[2].split() == ["equal", "weights", "0.9000", "3.1000", "1.0792", "1.1250"]
    assert lines[3].split() == ["one", "alone", "0.8000", "4.0000", "1.1667", "1.3333"]
    assert lines[-1].startswith("warning: one got the weight 0")
    assert "warning" not in "".join(trials.table(["one", "two"], equal, equal, singles, []))


def test_what_leaving_out_a_model_gains(tmp_path):
    found = Trials(str(tmp_path / "t"), {}, evaluate, budget=1)
    best = found([0.5, 0.5, 0.0])
    without = list(trials.without_each(found, best))
    assert [trial.weights for _, trial in without] == [(0, 1, 0), (1, 0, 0), (0.5, 0.5, 0)]
    assert without[2][1] is best
    alone = [found.done[x] for x in ((1, 0, 0), (0, 1, 0))]
    lines = trials.table("abc", best, best, [*alone, alone[0]], without)
    assert lines[1].split()[0] == "merged" and lines[8].split() == [
        "without",
        "c",
        "0.000",
        *["+0.0000"] * 4,
    ]
    gain = best.losses["x"] - evaluate((1, 0, 0))["x"][0]
    assert f"{gain:+.4f}" in lines[7]
    rows = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    assert len(rows) == 4


def test_two_copies_act_as_one_of_twice_the_weight():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    two = search._mean((0.25, 0.25, 0.5), [a, a, b])
    np.testing.assert_allclose(two, search._mean((0.5, 0.5), [a, b]), atol=1e-6)
    assert np.array_equal(search._mean((0.0, 1.0), [a, b]), b)


def test_leaving_out_a_model_can_be_the_best_choice(tmp_path):
    def harmed(weights):
        return {"x": (1 + weights[2], 0.0)}

    found = Trials(str(tmp_path / "t"), {}, harmed, budget=1)
    found([1, 1, 1])
    best, without = trials.best_with_table(found, delta=None, single={"x": 1.0})
    assert best.weights == (0.5, 0.5, 0.0) and without[2][1] is best
    again = Trials(str(tmp_path / "t"), {}, harmed, budget=1)
    assert trials.best_with_table(again, delta=None, single={"x": 1.0})[0] == best and not again.new


def test_a_model_that_is_given_twice_has_both_weights(tmp_path):
    best = Trial((0.5, 0.25, 0.0, 0.25), {"x": 1.0}, {"x": 0.1})
    models = {"one": "/runs/one", "two": "/runs/two", "none": "/runs/none", "again": "/runs/one"}
    search._write(str(tmp_path), models, best, {})
    document = yaml.safe_load((tmp_path / "merge.yml").read_text())
    weights = {entry["model"]: entry["parameters"]["weight"] for entry in document["models"]}
    assert weights == {"/runs/one": 0.75, "/runs/two": 0.25} and len(document["models"]) == 2
