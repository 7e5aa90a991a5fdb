"""The rules of verdicts, on numbers whose answer is known."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from espalier.launch.papers.shared import (
    claim,
    criteria,
    page,
    results,
    scorecard,
    sequential,
    verdicts_figure,
)
from espalier.launch.papers.shared.claim import Claim, Effect, Planned
from espalier.launch.papers.shared.results import Results, average, compare
from espalier.launch.plots import panels

PLANNED = Planned(sd=1.0, expected=1.0, source="a pilot")


def effect(values=(), **settings):
    by_seed = dict(enumerate(values, 10))
    return Effect(where="here", what="a number", by_seed=by_seed, **settings)


def made(values=(), *, looks=(5,), name="X1", measure=None, **settings):
    """Returns a judged claim of one effect with these values."""
    bounds = {key: settings.pop(key) for key in ("above", "below") if key in settings}
    texts = {"name": name, "statement": "it is so", "condition": "above it", "part": "p"}
    more = {key: settings.pop(key) for key in ("required", "group", "paper") if key in settings}
    primary = effect(values, **settings)
    one = Claim(
        **texts,
        measure=measure or (lambda runs, where: [primary]),
        planned=PLANNED,
        looks=looks,
        **bounds,
        **more,
    )
    return claim.judge([one], {"p": None}, {"p": "here"})[0]


def test_an_interval_is_students_and_is_not_rounded():
    values = [1e-6, 3e-6, 2e-6, 5e-6, 4e-6]
    one = made(values, above=0)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (one.range["low"], one.range["high"]) == pytest.approx((low, high), rel=1e-12)
    assert one.verdict == "holds" and one.level == 0.05


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
def test_a_claim_holds_fails_or_is_undecided_by_its_whole_interval(bounds, verdict):
    assert made([0.9, 1.1, 1.0, 0.95, 1.05], **bounds).verdict == verdict


@pytest.mark.parametrize(
    ("settings", "why", "goes_on"),
    [
        ({"values": [1.0] * 4}, "4 of 5 seeds", True),
        ({"values": [1.0] * 2, "looks": (3, 5)}, "2 of 3 seeds", True),
        ({"values": []}, "no runs", True),
        ({"values": [1.0, 1.0, math.nan, 1.0, 1.0]}, "not a number", False),
        ({"values": [1.0] * 5, "unmet": "600 of 1,600 updates"}, "600 of 1,600 updates", False),
        ({"values": [1.0] * 4, "unmet": "600 of 1,600 updates"}, "600 of 1,600 updates", False),
    ],
)
def test_a_claim_whose_own_condition_is_not_met_is_not_measured(settings, why, goes_on):
    one = made(**settings, above=0.0)
    assert one.verdict == "not measured" and why in one.why and one.open == goes_on


def test_the_first_look_that_decides_ends_a_claim_and_later_seeds_do_not_change_it():
    early = [1.0, 1.1, 0.9, 1.05, 0.95]
    looks = (5, 8)
    decided = made([*early, -9.0, -9.0, -9.0], looks=looks, above=0.0)
    assert (decided.verdict, decided.seeds) == ("holds", 5)
    assert decided.level == sequential.levels(looks)[0] < 0.05
    # Between two looks, the seeds of the earlier one judge.
    assert made([*early, -9.0], looks=looks, above=0.0).seeds == 5
    noisy = [1.0, -1.0, 0.5, 0.0, 0.1]
    undecided = made(noisy, looks=looks, above=0.0)
    assert (undecided.verdict, undecided.open) == ("undecided", True)
    later = made([*noisy, 0.2, 0.1, -0.3], looks=looks, above=0.0)
    assert not later.open
    assert (later.verdict, later.seeds, later.level) == (
        "undecided",
        8,
        sequential.levels(looks)[1],
    )


@pytest.mark.parametrize("looks", [(5, 8, 12), (3, 6), (4, 6, 8, 10, 12)])
def test_looking_several_times_errs_in_five_of_a_hundred_cases(looks):
    draws = np.random.default_rng(7).standard_normal((40_000, looks[-1]))
    missed = np.zeros(len(draws), bool)
    for look, level in zip(looks, sequential.levels(looks), strict=True):
        low, high = stats.t.interval(
            1 - level, look - 1, draws[:, :look].mean(1), stats.sem(draws[:, :look], axis=1)
        )
        missed |= (low > 0) | (high < 0)
    # 0.05 with a standard error of 0.0011, and as much of the simulated levels.
    assert missed.mean() == pytest.approx(0.05, abs=0.005)
    once = stats.ttest_1samp(draws[:, : looks[0]], 0, axis=1).pvalue < 0.05
    assert once.mean() < missed.mean() + 0.005  # and no more often than one look at the first seeds


def test_seeds_are_planned_as_tables_of_students_test_have_them():
    # Cohen (1988): one sample, both sides, 5 %, power 0.8.
    for distance, seeds in ((0.5, 34), (0.8, 15), (1.0, 10)):
        assert (
            sequential.power(distance, 1.0, seeds)
            >= 0.8
            > sequential.power(distance, 1.0, seeds - 1)
        )
    distance = sequential.smallest(2.0, 10)
    assert sequential.power(distance, 2.0, 10) == pytest.approx(0.8)
    draws = np.random.default_rng(0).normal(distance, 2.0, (20_000, 10))
    low = draws.mean(1) - stats.t.isf(0.025, 9) * stats.sem(draws, axis=1)
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.01)
    # Of several looks: each alone has less, and together they have as many as verdicts of simulated claims hold.
    looks = (5, 8)
    planned = sequential.planned_power(1.2, 1.0, looks)
    assert planned > sequential.power(1.2, 1.0, 8, sequential.levels(looks)[1])
    draws = np.random.default_rng(2).normal(1.2, 1.0, (2000, 8))
    held = np.mean([made(one, looks=looks, above=0.0).verdict == "holds" for one in draws])
    assert held == pytest.approx(planned, abs=0.03)  # three standard errors
    assert sequential.planned_power(1.0, 1.0, (10,)) == sequential.power(1.0, 1.0, 10)
    for looks in ((), (1, 2), (5, 5), (8, 5)):
        with pytest.raises(ValueError, match="increase"):
            sequential.levels(looks)


def test_noise_around_a_bound_holds_no_more_often_than_the_level():
    rng = np.random.default_rng(0)
    for seeds in (3, 5):
        draws = rng.normal(0.5, 1.0, (1000, seeds))
        held = sum(made(one, above=0.5, looks=(seeds,)).verdict == "holds" for one in draws)
        assert held < 45  # 25 are expected, and 45 are 4 standard deviations more


def test_verdicts_follow_from_the_record_by_seed():
    values = [0.31, 0.22, 0.4, 0.27, 0.35]
    one = made(values, above=0.1, below=3.0)
    null = {"X1": {"draws": 100, "holds": 2, "low": -0.1, "high": 0.1}}
    (recorded,) = claim.record([one], null)
    again = made(recorded["by_seed"].values(), above=recorded["above"], below=recorded["below"])
    assert again.verdict == recorded["verdict"] == "holds"
    seen = again.range["low"], again.range["high"]
    assert seen == pytest.approx(recorded["interval"], rel=1e-5)
    assert recorded["exchanged"]["holds"] == 2 and recorded["planned"]["power"] == round(
        sequential.power(0.9, 1.0, 5), 2
    )
    assert recorded["smallest"] == pytest.approx(
        sequential.smallest(np.std(values, ddof=1), 5), rel=1e-5
    )


def test_one_effect_judges_a_claim_and_secondary_ones_are_shown():
    def measure(values):
        return lambda runs, where: [effect(values)] * 2

    with pytest.raises(ValueError, match="X1 has 2 primary effects"):
        made(measure=measure([1.0] * 5))
    texts = {"name": "X1", "statement": "", "condition": "", "part": "p"}
    bad = measure([-1.0] * 5)
    one = Claim(
        **texts,
        measure=lambda runs, where: [effect([1.0, 1.1, 0.9, 1.0, 1.0])],
        secondary={"p": [bad], "q": [bad]},
        above=0.0,
        planned=PLANNED,
        looks=(5,),
    )
    (judged,) = claim.judge([one], {"p": None}, {"p": "here"})
    assert judged.verdict == "holds" and len(judged.others) == 2
    (without,) = claim.judge([one], {"p": None}, {"p": "here"}, secondary=False)
    assert without.others == []
    (missing,) = claim.judge([one], {"q": None}, {"q": "there"})
    assert (missing.verdict, missing.why, len(missing.others)) == ("not measured", "no runs", 2)


def test_a_required_claim_that_does_not_hold_or_was_not_measured_is_unmet():
    good, undecided = ([1.0, 1.1, 0.9, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0])
    assert claim.unmet([made(good, above=0.0, required=True)], ["p"]) == []
    (problem,) = claim.unmet([made(undecided, above=0.0, required=True)], ["p", "q"])
    assert "X1 must hold, and its verdict is: undecided" in problem
    (problem,) = claim.unmet([made(good[:2], above=0.0, required=True)], ["p"])
    assert "not measured (2 of 5 seeds)" in problem
    assert claim.unmet([made(undecided, above=0.0, required=True)], ["q"]) == []
    assert claim.unmet([made(undecided, above=0.0)], ["p"]) == []


class Runs(Results):
    def row_scores(self, row):
        accuracy = row.get("accuracy")
        return {"loss": row["loss"], "accuracy": accuracy, "mixed": accuracy}

    def lower_is_better(self, score):
        return score == "loss"

    def limits(self, score):
        return (0.02, 0.98) if score == "accuracy" else None

    def parts(self, score):
        return ("accuracy",) if score == "mixed" else ()

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
    seen = gain.range()
    assert seen["value"] == pytest.approx(0.2, abs=0.02)
    assert seen["high"] - seen["low"] < 0.1  # the spread of seeds cancels
    (percent,) = runs.gain("here", "loss", "a", "b", relative=True)
    assert 5 < percent.range()["value"] < 17 and percent.unit == "%"
    assert runs.gain("here", "loss", "a", "missing") == []


def test_an_average_is_the_mean_of_effects_at_the_seeds_that_all_have():
    rows = table({"a": 1.0, "b": 1.2, "c": 1.6})
    runs = Runs([row for row in rows if (row["arm"], row["seed"]) != ("b", 12)])
    pairs = compare("loss", ("a", "b")), compare("loss", ("a", "c"))
    (mean,) = average("two gains", *pairs)(runs, "here")
    ((first,), (second,)) = (pair(runs, "here") for pair in pairs)
    assert list(mean.by_seed) == [10, 11, 13, 14]
    assert mean.by_seed[10] == pytest.approx((first.by_seed[10] + second.by_seed[10]) / 2)
    assert average("none", compare("loss", ("a", "d")), *pairs)(runs, "here") == []


def test_a_degenerate_run_or_a_dead_or_saturated_part_gives_no_verdict():
    runs = Runs([*table({"a": 1.0}), *table({"b": 1.2}, load=0.97)])
    (gain,) = runs.gain("here", "loss", "a", "b")
    assert "b, seed 10: its router has collapsed" in gain.unmet
    for accuracy, name in ((0.995, "ceiling"), (0.01, "floor"), (0.5, "")):
        full = Runs(table({"a": 1.0, "b": 1.2}, accuracy=accuracy))
        (gain,) = full.gain("here", "accuracy", "a", "b")
        assert name in gain.unmet and bool(gain.unmet) == bool(name)
    # A score is not compared either where one of its parts is dead.
    dead = Runs(table({"a": 1.0, "b": 1.2}, accuracy=0.0))
    (gain,) = dead.gain("here", "mixed", "a", "b")
    assert gain.unmet == "all arms are at the floor of accuracy"


def test_a_seed_after_the_look_that_decides_takes_no_verdict_away_and_changes_no_note():
    rows = table({"a": 1.0, "b": 1.2})
    rows[-1]["load"] = 0.97  # b, seed 14
    one = claim_of(compare("loss", ("a", "b")), looks=(3, 5))
    (judged,) = claim.judge([one], {"p": Runs(rows)}, {"p": "here"})
    assert (judged.verdict, judged.seeds, len(judged.primary.by_seed)) == ("holds", 3, 5)
    first = [row for row in rows if row["seed"] < 13]
    (alone,) = claim.judge([one], {"p": Runs(first)}, {"p": "here"})
    assert judged.primary.note == alone.primary.note and judged.range == alone.range
    assert "at 3 seeds, 2 more judge nothing" in "".join(page._measurements([judged], {}))
    rows[2]["load"] = 0.97  # a, seed 12
    (judged,) = claim.judge([one], {"p": Runs(rows)}, {"p": "here"})
    assert judged.verdict == "not measured" and "seed 14" not in judged.why


def test_seeds_that_an_effect_lacks_are_named_with_the_reason():
    rows = [row for row in table({"a": 1.0, "b": 1.2}) if (row["arm"], row["seed"]) != ("b", 12)]
    rows += table({"c": 1.4}, seeds=8)  # of another claim
    pair = compare("loss", ("a", "b"))
    one = claim_of(pair, looks=(3,), secondary={"p": [pair, compare("loss", ("a", "c"))]})
    (judged,) = claim.judge([one], {"p": Runs(rows)}, {"p": "here"})
    assert [one.absent for one in (judged.primary, *judged.others)] == [
        {12: "no run of `b`"},
        {12: "no run of `b`"},
        {},
    ]
    shown = page._measurements([judged], {})
    assert sum("Left out: seed 12, no run of `b`." in line for line in shown) == 2
    (recorded,) = claim.record([judged], {})
    assert recorded["absent"] == {"12": "no run of `b`"}
    # Fewer seeds than the first look.
    few = [row for row in rows if row["seed"] < 12 or row["arm"] == "a"]
    (judged,) = claim.judge([claim_of(pair)], {"p": Runs(few)}, {"p": "here"})
    assert judged.why == "2 of 5 seeds" and list(judged.primary.absent) == [12, 13, 14]


def test_means_side_by_side_are_of_the_seeds_that_all_arms_have():
    rows = table({"a": 1.0, "c": 1.4}, seeds=5) + table({"b": 1.2}, seeds=3)
    runs = Runs(rows).shared("a", "b", "missing")
    assert runs.seeds == [10, 11, 12] and runs.values("a", "loss").size == 3
    assert Runs(rows).shared("a", "c").seeds == [10, 11, 12, 13, 14]


def test_arms_that_measures_read_are_known():
    runs = Runs(table({"a": 1.0, "b": 1.2, "c": 1.4}))
    with results.reading() as arms:
        compare("loss", ("a", "b"))(runs, "here")
    runs.gain("here", "loss", "a", "c")
    assert arms == {"a", "b"}


def claim_of(measure, **settings):
    texts = {"name": "X", "statement": "it is so", "condition": "above it", "part": "p"}
    return Claim(
        **{**texts, "planned": PLANNED, "looks": (5,), "above": 0.0, **settings}, measure=measure
    )


def test_shuffled_arms_lose_their_differences_and_nothing_else():
    rows = table({"a": 1.0, "b": 1.2, "c": 1.4, "d": 1.6})
    claims = [claim_of(compare("loss", ("a", "d")))]

    def judge(measured):
        return claim.judge(claims, {"p": Runs(measured["p"])}, {"p": "here"})

    shuffled = claim.shuffle_arms({"p": rows}, np.random.default_rng(0))["p"]
    assert sorted(r["loss"] for r in shuffled) == sorted(r["loss"] for r in rows)
    assert [(r["arm"], r["seed"]) for r in shuffled] == [(r["arm"], r["seed"]) for r in rows]
    (real,) = judge({"p": rows})
    null = claim.exchanges(judge, claim.shuffle_arms, {"p": rows})["X"]
    assert real.verdict == "holds" and null["holds"] <= 8 and null["draws"] == 100
    assert null["low"] < 0 < null["high"] < real.range["value"]
    # Of two arms and three seeds there are eight exchanges: they show no share of one in twenty.
    few = [row for row in rows if row["arm"] in "ad" and row["seed"] < 13]
    assert claim.exchanges(judge, claim.shuffle_arms, {"p": few}) == {}
    claims[0] = dataclasses.replace(claims[0], looks=(3,))
    assert claim.exchanges(judge, claim.shuffle_arms, {"p": few}) == {}
    claims[0] = dataclasses.replace(claims[0], looks=(5,))
    later = {"o": rows, "p": rows, "q": rows}
    assert claim.exchanges(judge, claim.shuffle_arms, later)["X"] == null


class Experiment:
    SEEDS, EARLIER, SWEEPS = (5, 8), ("seeds 0 to 4, of another score",), {}


def test_criteria_are_fixed_by_the_first_run_and_changes_are_named(tmp_path, monkeypatch):
    early, late = (claim_of(compare("loss", ("a", "b")), above=n) for n in (1, 2))
    folder = tmp_path / "runs"
    criteria.fix(folder, [early], Experiment)
    fixed = criteria.fix(folder, [late], Experiment)  # nothing has run yet
    said = criteria.in_words(fixed, [late])
    assert "before the first run" in said and "none has changed since" in said
    assert "before this one: 1 (seeds 0 to 4, of another score)" in said
    (folder / "run").mkdir()
    fixed = criteria.fix(folder, [early], Experiment)
    assert "changed since: X." in criteria.in_words(fixed, [early])  # a bound alone
    other = tmp_path / "other"
    (other / "run").mkdir(parents=True)
    fixed = criteria.fix(other, [early], Experiment)
    assert "after the first runs" in criteria.in_words(fixed, [early])


def test_a_part_that_comes_later_has_criteria_of_its_own_and_changes_no_others(
    tmp_path, monkeypatch
):
    first, other = claim_of(compare("loss", ("a", "b")), above=1), "q"
    second = dataclasses.replace(first, name="Y", part=other)
    monkeypatch.setattr(criteria, "_design", lambda experiment: dict(experiment.SWEEPS))

    class Wider(Experiment):
        SWEEPS = {"p": "1", other: "2"}

    class Narrow(Experiment):
        SWEEPS = {"p": "1"}

    fixed = criteria.fix(tmp_path, [first], Narrow)
    said = criteria.in_words(fixed, [first, second])  # a page between the two
    assert "none has changed since; nothing has run yet of the part `q`." in said
    (tmp_path / "p").mkdir()
    fixed = criteria.fix(tmp_path, [first, second], Wider)
    said = criteria.in_words(fixed, [first, second])
    assert "those of the part `q` before its first run" in said and "none has changed since" in said
    (tmp_path / other).mkdir()
    moved = dataclasses.replace(second, above=2)
    fixed = criteria.fix(tmp_path, [first, moved], Wider)
    assert "changed since: Y." in criteria.in_words(fixed, [first, moved])
    Wider.SWEEPS = {"p": "1", other: "3"}
    fixed = criteria.fix(tmp_path, [first, second], Wider)
    said = criteria.in_words(fixed, [first, second])
    assert "changed since: the runs of the part `q`" in said and "before its first run" in said


def test_criteria_have_a_digest_of_runs_and_of_what_their_gin_files_include(tmp_path, monkeypatch):
    file = tmp_path / "sweep.py"
    file.write_text(
        "import ml_collections\n"
        "def get_config(seeds):\n"
        "    return ml_collections.ConfigDict({'seeds': tuple(range(int(seeds))), 'gin_files': ('a.gin',),\n"
        "                                      'arms': {'x': {'bindings': ('RATE=1',)}}})\n"
    )
    (tmp_path / "a.gin").write_text("include 'b.gin'\n# a remark\nA = 1\n")
    (tmp_path / "b.gin").write_text("B = 1\n")
    monkeypatch.setattr(criteria.sweeps, "_PAPERS", tmp_path)
    monkeypatch.setattr(criteria.environment, "ROOT", tmp_path)

    class Swept(Experiment):
        SWEEPS = {"p": "sweep:{seeds}"}

    def digest():
        return criteria.fix(tmp_path / "runs", [], Swept)

    first = digest()
    assert set(first["design"]) == {"p"} and first["changed"] == []
    (tmp_path / "runs" / "run").mkdir()
    (tmp_path / "a.gin").write_text("include 'b.gin'\n# another remark\n\nA = 1\n")
    assert digest()["changed"] == []
    (tmp_path / "b.gin").write_text("B = 2\n")
    assert digest()["changed"] == ["p"]
    assert "changed since: the runs of the part `p`" in criteria.in_words(digest(), [])


def test_criteria_say_today_what_changed_and_which_commits_are_lost(monkeypatch):
    monkeypatch.setattr(criteria, "_design", lambda experiment: {"p": "1", "q": "2"})
    head = criteria.environment.commit()["commit"]
    now = {"date": "2026-01-01 00:00 UTC", "commit": head, "dirty": False, "late": False}
    later = {"q": {**now, "commit": "0" * 40}}
    fixed = {**now, "earlier": [], "claims": {}, "design": {"p": "1", "q": "1"}, "later": later}
    said = criteria.in_words(criteria.today({**fixed, "changed": []}, Experiment), [])
    assert "changed since: the runs of the part `q`." in said
    assert "at commit 0000000000 (not in this repository's history)" in said
    assert said.count("not in this") == 1


def test_the_figure_of_verdicts_has_a_row_for_each_claim_and_its_bound_at_zero():
    far = made([9.0, 9.1, 8.9, 9.0, 9.0], above=0.0, required=True)
    near = made([1.0, -1.0, 0.5, 0.0, 0.1], name="X2", above=0.0)
    null = {"X1": {"draws": 100, "holds": 2, "low": -0.1, "high": 0.1}}
    figure = verdicts_figure.draw([far, near, made([], name="X3")], null)
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["X1 it is so", "X2 it is so"]
    assert verdicts_figure.draw([made([])], {}) is None
    assert verdicts_figure.draw([far] * 17, {}).get_size_inches()[1] * panels.DPI <= 900


def test_an_interval_around_the_middle_of_two_bounds_is_drawn_up_to_its_distance():
    one = made([-1.0, 1.0, 0.4, -0.6, 0.0], above=-5.0, below=5.0)
    (axes,) = verdicts_figure.draw([one], {}).axes
    (ends,) = [
        line.get_xdata()
        for line in axes.lines
        if len(line.get_xdata()) == 2 and line.get_marker() == "None" and line.get_linewidth() == 2
    ]
    reach = max(-one.range["low"], one.range["high"])
    assert 0 < reach < 5
    np.testing.assert_allclose(ends, [(5 - reach) / one.smallest, 5 / one.smallest])


@pytest.mark.parametrize(
    ("values", "paper", "word"),
    [
        ([2.0, 2.1, 1.9, 2.0, 2.0], 3.0, "reproduced"),
        ([-2.0, -2.1, -1.9, -2.0, -2.0], 3.0, "contradicted"),
        ([0.1, -0.1, 0.1, -0.1, 0.0], 3.0, "tie"),
        ([1.0, -1.0, 4.0, 0.0, 0.1], 3.0, "not shown"),
        ([0.1, -0.1, 0.1, -0.1, 0.0], None, "not shown"),
        ([1.0], 3.0, "not measured"),
    ],
)
def test_the_word_of_a_headline_follows_from_the_claims_verdict(values, paper, word):
    one = made(values, above=0.0)
    texts = {"what": "gain", "unit": "%", "why": "It is so.", "mind": "More seeds, 3 minutes."}
    headline = page.Headline(claim="X1", paper=paper, measure=one.measure, part="p", **texts)
    recorded = headline.record([one], {"p": None}, "here")
    assert recorded["word"] == word and recorded["seeds"] == sorted(one.primary.by_seed)
    assert scorecard.READING[word]


def test_a_headline_has_the_interval_that_judges_its_claim():
    values = [2.0, 2.1, 1.9, 2.0, -9.0, -9.0, -9.0, -9.0]  # decided by the first four
    one = made(values, above=0.0, looks=(4, 8))
    texts = {"what": "gain", "unit": "%", "why": "It is so.", "mind": "More seeds, 3 minutes."}
    headline = page.Headline(claim="X1", paper=3.0, measure=one.measure, part="p", **texts)
    recorded = headline.record([one], {"p": None}, "here")
    level = sequential.levels((4, 8))[0]
    low, high = stats.t.interval(1 - level, 3, loc=2.0, scale=stats.sem(values[:4]))
    assert level < 0.05 and recorded["seeds"] == [10, 11, 12, 13]
    assert (recorded["low"], recorded["high"]) == pytest.approx((low, high), rel=1e-4)
    assert recorded["word"] == "reproduced"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([-0.1, -0.2, -0.1, -0.2, -0.1], "tie"),  # below zero, by less than what counts
        ([-0.9, -1.2, -0.8, -1.1, -0.9], "contradicted"),
    ],
)
def test_without_a_number_of_the_papers_a_headline_is_a_tie_up_to_what_counts(values, word):
    one = made(values, above=0.5)
    texts = {"what": "gain", "unit": "nats", "why": "It is so.", "mind": "More seeds, 3 minutes."}
    headline = page.Headline(
        claim="X1", paper=None, tie=1.0, measure=one.measure, part="p", **texts
    )
    assert headline.record([one], {"p": None}, "here")["word"] == word
