"""The rules of verdicts, on numbers whose answer is known."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Claim, Effect
from espalier.launch.papers.shared.results import Results, compare


def effect(values=(), **settings):
    by_seed = dict(enumerate(values, 10))
    return Effect(where="here", what="a number", by_seed=by_seed, **settings)


def test_an_interval_is_students_and_is_not_rounded():
    values = [1e-6, 3e-6, 2e-6, 5e-6, 4e-6]
    shown = effect(values).range
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (shown["low"], shown["high"]) == pytest.approx((low, high), rel=1e-12)
    assert effect(values, above=0).verdict == "holds"


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"above": 0.0}, "holds"),
        ({"above": 0.95}, "undecided"),
        ({"above": 2.0}, "fails"),
        ({"below": 0.0}, "fails"),
        ({"above": -2.0, "below": 2.0}, "holds"),
        ({"above": -2.0, "below": 1.0}, "undecided"),
        ({"above": -2.0, "below": 0.5}, "fails"),
    ],
)
def test_an_effect_holds_fails_or_is_undecided_by_its_whole_interval(bounds, verdict):
    assert effect([0.9, 1.1, 1.0, 0.95, 1.05], **bounds).verdict == verdict


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"values": [1.0] * 4}, "4 of 5 seeds"),
        ({"values": [1.0] * 2, "seeds": 3}, "2 of 3 seeds"),
        ({"values": []}, "no runs"),
        ({"values": [1.0, 1.0, math.nan, 1.0, 1.0]}, "not a number"),
        ({"values": [1.0] * 5, "unmet": "600 of 1,600 updates"}, "600 of 1,600 updates"),
    ],
)
def test_an_effect_whose_own_condition_is_not_met_is_not_measured(settings, why):
    one = effect(**settings, above=0.0)
    assert one.verdict == "not measured" and why in one.why


def test_exact_numbers_and_intervals_of_prompts_need_no_seeds():
    assert effect([0.0], above=-0.5, below=0.5, exact=True).verdict == "holds"
    assert effect([0.0, 1.0], above=-0.5, below=0.5, exact=True).verdict == "undecided"
    by_prompt = {"value": 0.3, "low": 0.1, "high": 0.5}
    assert effect([0.3], above=0.0, interval=by_prompt).verdict == "holds"


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        ("hh", "holds"),
        ("hf", "mixed"),
        ("hfu", "mixed"),
        ("fu", "fails"),
        ("hu", "undecided"),
        ("un", "undecided"),
        ("hn", "not measured"),
        ("", "not measured"),
    ],
)
def test_a_claim_has_the_worst_verdict_of_its_effects(verdicts, verdict):
    made = {
        "h": effect([1.0] * 5, above=0.0),
        "f": effect([-1.0] * 5, above=0.0),
        "u": effect([1.0, -1.0, 0.5, 0.0, 0.1], above=0.0),
        "n": effect([1.0], above=0.0),
    }
    one = Claim("X1", "a statement", "a condition", {}, by_part={"a": [made[v] for v in verdicts]})
    assert one.verdict == verdict
    (recorded,) = json.loads(json.dumps(claim.record([one])))
    assert recorded["verdict"] == verdict and len(recorded["effects"]) == len(verdicts)
    if verdicts:
        worst = "f" if verdict == "mixed" else verdict[0]
        decides = made[worst]
        assert recorded["effect"] == decides.range["value"]
        assert recorded["seeds"] == list(decides.by_seed)


def test_verdicts_follow_from_the_record_by_seed():
    values = [0.31, 0.22, 0.4, 0.27, 0.35]
    (one,) = claim.record(
        [Claim("X", "", "", {}, by_part={"a": [effect(values, above=0.1, below=1.0)]})]
    )
    (recorded,) = one["effects"]
    again = effect(recorded["by_seed"].values(), above=recorded["above"], below=recorded["below"])
    assert again.verdict == one["verdict"] == "holds"
    assert [again.range["low"], again.range["high"]] == pytest.approx(one["interval"], rel=1e-5)


def test_a_required_claim_that_does_not_hold_or_was_not_measured_is_unmet():
    def claims(effects):
        return [Claim("X1", "", "", {"a": [], "b": []}, required=True, by_part=effects)]

    good, open_ = effect([1.0] * 5, above=0.0), effect([1.0, -1.0] * 3, above=0.0)
    assert claim.unmet(claims({"a": [good], "b": [good]}), ["a", "b"]) == []
    assert claim.unmet(claims({"a": [good]}), ["a"]) == []
    assert "part b" in claim.unmet(claims({"a": [good]}), ["a", "b"])[0]
    assert "undecided" in claim.unmet(claims({"a": [open_], "b": [good]}), ["a", "b"])[0]


def test_noise_around_a_bound_holds_no_more_often_than_the_level():
    rng = np.random.default_rng(0)
    for seeds in (3, 5):
        draws = rng.normal(0.5, 1.0, (1000, seeds))
        held = sum(effect(one, above=0.5, seeds=3).verdict == "holds" for one in draws)
        assert held < 45  # 25 are expected, and 45 are 4 standard deviations more


class Runs(Results):
    def row_scores(self, row):
        return {"loss": row["loss"], "accuracy": row.get("accuracy")}

    def lower_is_better(self, score):
        return score == "loss"

    def limits(self, score):
        return (0.0, 1.0) if score == "accuracy" else None

    def degenerate(self, row):
        return "its router has collapsed" if row.get("load", 0.0) > 0.8 else ""


def table(arms, seeds=5, **more):
    rng = np.random.default_rng(1)
    return [
        {"arm": arm, "seed": seed, "loss": loss + 0.1 * seed + 0.01 * rng.normal(), **more}
        for arm, loss in arms.items()
        for seed in range(10, 10 + seeds)
    ]


def test_the_gain_of_an_arm_is_paired_and_positive_where_it_is_better():
    runs = Runs(table({"a": 1.0, "b": 1.2}))
    (gain,) = runs.gain("here", "loss", "a", "b")
    assert gain.verdict == "holds" and gain.range["value"] == pytest.approx(0.2, abs=0.02)
    assert gain.range["high"] - gain.range["low"] < 0.1  # the spread of seeds cancels
    (no_worse,) = runs.gain("here", "loss", "b", "a", above=-0.3)
    assert no_worse.verdict == "holds"
    (percent,) = runs.gain("here", "loss", "a", "b", relative=True)
    assert 5 < percent.range["value"] < 17 and percent.unit == "%"
    assert runs.gain("here", "loss", "a", "missing") == []


def test_a_degenerate_run_or_a_ceiling_gives_no_verdict():
    runs = Runs([*table({"a": 1.0}), *table({"b": 1.2}, load=0.97)])
    (gain,) = runs.gain("here", "loss", "a", "b")
    assert gain.verdict == "not measured" and "b, seed 10: its router has collapsed" in gain.why
    for accuracy, name in ((0.995, "ceiling"), (0.0, "floor")):
        full = Runs(table({"a": 1.0, "b": 1.2}, accuracy=accuracy))
        (gain,) = full.gain("here", "accuracy", "a", "b", above=-0.1)
        assert gain.verdict == "not measured" and name in gain.why


def test_shuffled_arms_lose_their_differences_and_nothing_else():
    rows = table({"a": 1.0, "b": 1.2, "c": 1.4, "d": 1.6})
    claims = [Claim("X", "", "", {"p": [compare("loss", ("a", "d"))]})]
    held = 0
    for draw in range(100):
        shuffled = claim.shuffle_arms({"p": rows}, np.random.default_rng(draw))["p"]
        assert sorted(r["loss"] for r in shuffled) == sorted(r["loss"] for r in rows)
        assert [(r["arm"], r["seed"]) for r in shuffled] == [(r["arm"], r["seed"]) for r in rows]
        (judged,) = claim.judge(claims, {"p": Runs(shuffled)}, {"p": "here"})
        held += judged.verdict == "holds"
    (real,) = claim.judge(claims, {"p": Runs(rows)}, {"p": "here"})
    assert real.verdict == "holds" and held <= 8


def test_criteria_are_fixed_by_the_first_run_and_changes_are_named(tmp_path):
    early, late = (Claim("X1", "it is so", f"above {n}", {}) for n in (1, 2))
    folder = tmp_path / "runs"
    claim.fix_criteria(folder, [early])
    fixed = claim.fix_criteria(folder, [late])  # nothing has run yet
    assert "before the first run" in claim.criteria_in_words(fixed, [late])
    assert "none has changed since" in claim.criteria_in_words(fixed, [late])
    (folder / "run").mkdir()
    fixed = claim.fix_criteria(folder, [early])
    assert "changed since: X1" in claim.criteria_in_words(fixed, [early])
    other = tmp_path / "other"
    (other / "run").mkdir(parents=True)
    assert "after the first runs" in claim.criteria_in_words(
        claim.fix_criteria(other, [early]), [early]
    )


def test_the_figure_of_effects_has_a_panel_for_each_claim_that_has_some():
    measured = Claim("X1", "it is so", "", {}, by_part={"a": [effect([1.0, 2.0], above=0.0)] * 2})
    drawn = page.effects_figure([measured, Claim("X2", "it is not", "", {})])
    (axes,) = drawn.axes
    assert "it is so: not measured" in axes.texts[0].get_text()
    assert page.effects_figure([Claim("X2", "it is not", "", {})]) is None
