"""The reproduction of likelihood over-optimisation: verdicts and report on hand-made runs, and what a run's folder has."""

import collections
import dataclasses
import json
import math

import numpy as np
import pytest

from espalier.launch.papers.preference import (
    experiment,
    numbers,
    pairs,
    report,
    rule,
    topic_language,
)
from espalier.launch.papers.preference.numbers import ARMS, DIRECT, OTHERS, Arm, Course
from espalier.launch.papers.shared import results
from espalier.launch.sweep import file
from espalier.trainers.preference.indicators.alarm import StoppingRule
from tests.launch.papers.judged import verdict_of

SWEEP = "launch/papers/preference/experiment.py"
FACTS = {"command": "a command", "versions": {"jax": "1"}}
START, TOP = -2.8, 0.7  # better LLH at the start, and how far below it P_win is best
# How far the better LLH falls in a run.
FALLS = {
    "dpo_0p01": 5.2, "dpo_0p1": 2.4, "dpo_0p1_nll0p1": 0.7, "dpo_0p1_nll1": 0.4, "dpo_1": 0.95, "dpo_5": 0.2,
    "ipo_0p01": 4.2, "ipo_0p1": 1.0, "hinge_0": 3.8, "hinge_1": 0.3,
    "simpo": 1.2, "sft_better": 0.1, "online_dpo": 0.3, "rloo": 0.4, "grpo": 0.4, "ppo": 0.3,
}  # fmt: skip


def evaluation(arm, step, fall, rng):
    """One with which all claims hold but that of the plain rule, at a better LLH of START - fall."""
    llh, gap = START - fall, 0.02 + (0.5 if FALLS[arm] > 2 else 0.05) * fall
    p_win = max(0.7 - 0.2 * ((fall - TOP) / TOP) ** 2, 0.1) + 0.004 * rng.normal() * (step > 0)
    turned = 0.1 * (0 < fall < 1.43) - 0.2 * max(fall - 1.43, 0)
    return {
        "step": step, "llh_chosen": llh, "llh_rejected": llh - gap, "llh_gap": gap, "p_win": p_win,
        "ead": 0.5 + 0.1 * fall + 0.002 * rng.normal(), "entropy": 2.4 + turned, "mass": 0.8 - 0.03 * fall,
        "entropy_chosen": 2.4, "mass_chosen": 0.8,
        "facts": max(1 - fall / 6, 0) + 0.001 * rng.normal(), "length": 8 + 0.2 * rng.normal(), "kl": fall,
        "reward": 2 * p_win, "outside": 0.0,
    }  # fmt: skip


def rows(seeds=5, change=lambda arm, one: {}, part="language"):
    """Rows of a sweep as `experiment.run` has them; `change` says what is different in an evaluation."""
    out, rng = [], np.random.default_rng(0)
    for run in file.read(f"{SWEEP}:{seeds}" if part == "language" else f"{SWEEP}:{part},{seeds}"):
        fall, course = FALLS.get(run.arm), collections.defaultdict(list)
        for step in range(0, 601, 20) if fall is not None else ():
            one = evaluation(run.arm, step, fall * (1 + 0.002 * run.seed) * step / 600, rng)
            for name, value in {**one, **change(run.arm, one)}.items():
                course[name].append(value)
        row = {"arm": run.arm, "seed": run.seed, "seconds": 60.0, "course": dict(course)}
        best = {"best_of": {1: 0.5, 2: 0.6 + 0.01 * run.seed}} if run.arm == "pairs" else {}
        out.append({**row, **best})
    return {part: out}


def judged(measured):
    return {claim.name: claim for claim in report.REPORT.judge(json.loads(json.dumps(measured)))}


def verdicts(measured):
    return {name: claim.verdict for name, claim in judged(measured).items()}


def test_the_sweep_and_the_report_know_the_same_arms():
    assert sorted(FALLS) == sorted(ARMS)
    runs = file.read(SWEEP)
    assert {run.arm for run in runs} == {"sft", "pairs", *ARMS}
    assert {run.seed for run in runs if run.arm in DIRECT} == {20, 21, 22, 23, 24}
    assert {run.seed for run in runs if run.arm not in {"sft", "pairs", *DIRECT}} == {20}
    assert ARMS["dpo_0p1_nll1"].label == "DPO β = 0.1, λ = 1"
    large = {run.arm for run in file.read(f"{SWEEP}:large,1")}
    assert large == {"sft", "pairs", *numbers.LARGE}


def test_all_claims_hold_where_they_should():
    found = verdicts(rows())
    # The plain rule speaks in healthy runs; the likelihood of over-optimised ones has fallen far.
    found.pop("C9")
    assert len(found) == 13 and set(found.values()) == {"holds"}


def test_other_methods_are_shown_and_no_claim_is_of_them():
    strange = {"p_win": 0.0, "ead": 0.0, "facts": 0.0, "length": 50.0, "llh_chosen": -3.0}
    others = {*OTHERS, *numbers.ONLINE}
    changed = judged(rows(change=lambda arm, one: strange if arm in others else {}))
    for name, one in judged(rows()).items():
        assert (one.primary, one.others) == (changed[name].primary, changed[name].others)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("C1a", lambda arm, one: {"p_win": 0.5 + (START - one["llh_chosen"]) / 10 + one["length"] * (one["step"] > 0) / 1000}),
        ("C1b", lambda arm, one: {"p_win": 0.7 if one["step"] else 0.5}),
        ("C1c", lambda arm, one: {"p_win": 0.5 + (START - one["llh_chosen"]) / 10}),
        ("C2", lambda arm, one: {"p_win": 0.5 + one["llh_gap"] / 10}),
        ("C3", lambda arm, one: {"ead": 0.9 + one["llh_chosen"] / 10}),
        ("C4", lambda arm, one: {"facts": -one["llh_chosen"]}),
        ("C5a", lambda arm, one: {"entropy": 2.4 - 0.2 * (one["entropy"] > 2.4)}),
        ("C5b", lambda arm, one: {"entropy": 2.4 + one["step"] / 1000}),
        ("C6", lambda arm, one: {"mass": 0.8 + one["step"] / 10_000}),
        ("C7a", lambda arm, one: {"p_win": one["p_win"] - 0.1 * (arm == "dpo_0p1_nll0p1")}),
        ("C7b", lambda arm, one: {"p_win": one["p_win"] + 0.1 * ("nll" in arm) * (one["step"] > 0)}),
        ("C8", lambda arm, one: {"length": -one["llh_chosen"]}),
        ("C10", lambda arm, one: {"mass": 0.8, "entropy": 2.4}),
    ],
)  # fmt: skip
def test_a_claim_fails_on_runs_that_say_the_contrary(name, change):
    assert verdict_of(report.REPORT, rows(change=change), name) == "fails"


@pytest.mark.parametrize(
    ("names", "change", "why"),
    [
        (("C1a", "C1b", "C1c"), lambda arm, one: {"p_win": 0.5}, "P_win in the middle is 0.000 above the start"),
        (("C3",), lambda arm, one: {"ead": one["ead"] + 0.6}, "EAD is 1.10 before the first update"),
        (("C4",), lambda arm, one: {"facts": 0.1}, "fact accuracy is 0.10 before the first update"),
        (("C5a", "C5b"), lambda arm, one: {"entropy": one["entropy"] + 0.9}, "entropy is 3.30 before the first update"),
        (("C6",), lambda arm, one: {"mass": one["mass"] + 0.2}, "mass is 1.00 before the first update"),
    ],
)  # fmt: skip
def test_a_value_without_room_to_change_gives_no_verdict(names, change, why):
    found = judged(rows(change=change))
    for name in names:
        assert found[name].verdict == "not measured"
        assert found[name].primary.unmet == why


def test_seeds_that_lack_an_arm_do_not_judge_and_others_are_read_alone():
    measured = rows(seeds=8)
    measured["language"] = [
        row for row in measured["language"] if row["seed"] < 25 or "nll" in row["arm"]
    ]
    found = judged(measured)
    assert len(found["C1a"].primary.by_seed) == 5 and len(found["C7a"].primary.by_seed) == 8
    runs = numbers.Runs(measured["language"])
    with results.reading() as arms:
        next(one for one in report.REPORT.claims if one.name == "C7a").measure(runs, "")
    assert arms == {"dpo_0p1_nll0p1", "dpo_0p1_nll1"}


def test_falls_are_from_the_start_of_each_seed():
    def change(arm, one):
        return {"llh_chosen": one["llh_chosen"] - 5, "llh_rejected": one["llh_rejected"] - 5}

    moved, plain = judged(rows(change=change)), judged(rows())
    for name in ("C1a", "C1b", "C1c", "C3"):
        assert moved[name].range["value"] == pytest.approx(plain[name].range["value"], rel=1e-6)


def test_runs_that_are_not_there_are_left_out():
    measured = rows(seeds=2)
    measured["language"] = [
        row for row in measured["language"] if row["arm"].startswith("dpo_0p01")
    ]
    found = judged(measured)
    assert found["C7a"].verdict == "not measured" and found["C7a"].primary is None
    labels = {e.what.rpartition(", ")[2] for e in found["C4"].others}
    assert "DPO" in labels and not labels & {"IPO", "Hinge"}
    assert found["C9"].why == "no runs"  # of over-optimised ones alone
    assert {claim.verdict for claim in report.REPORT.judge({})} == {"not measured"}


def course(p_win, *, entropy=2.0, mass=0.8, llh=None, seed=0):
    count = len(p_win)
    values = {
        "step": 20.0 * np.arange(count),
        "p_win": np.array(p_win, float),
        "reward": np.array(p_win, float),
        "entropy": np.broadcast_to(entropy, count),
        "mass": np.broadcast_to(mass, count),
        "llh_chosen": -3.0 - 0.1 * np.arange(count) if llh is None else np.array(llh, float),
    }
    return Course(Arm("dpo", 1.0), seed, values)


FALLING = [0.5, 0.5, 0.6, 0.6, 0.6, 0.5, 0.4, 0.4, 0.4, 0.4]
RISING = sorted(FALLING)
DROPS = [2.0, 2.1, 2.1, 2.1, 2.1, 1.9, 1.7, 1.5, 1.3, 1.1]  # in a row from the sixth


def test_alarms_are_in_time_early_missed_or_false():
    plain = StoppingRule(smoothing=0)
    found = rule.outcome(course(FALLING, entropy=DROPS), plain)
    assert (found.kind, found.alarm.step, found.course.best) == ("in time", 140, 3)
    # Means of three: the best, the end, that of step 120 before the alarm, and that of the best single reward.
    assert (found.best, found.end) == pytest.approx((0.6, 0.4))
    assert (found.stopped, found.retained) == pytest.approx((1.3 / 3, 1.7 / 3))
    assert rule.outcome(course(FALLING), plain).kind == "missed"
    assert rule.outcome(course(RISING, entropy=DROPS), plain).kind == "false"
    calm = rule.outcome(course(RISING), plain)
    assert (calm.kind, calm.alarm, calm.stopped) == ("none", None, calm.end)


def test_an_alarm_one_evaluation_before_the_best_is_in_time_and_two_are_early():
    best, plain = 3, StoppingRule(smoothing=0)
    for alarm, kind in ((best - 1, "in time"), (best - 2, "early")):
        mass = [0.8] * alarm + [0.7] * (len(FALLING) - alarm)
        assert rule.outcome(course(FALLING, mass=mass), plain).kind == kind


def test_a_rule_has_skill_where_it_stops_what_it_should_and_nothing_else():
    plain = StoppingRule(smoothing=0)
    some = [course(FALLING, entropy=DROPS)] * 3 + [course(RISING)] * 10
    assert rule.skill(plain, some) == 1
    some += [course(RISING, entropy=DROPS)] * 2 + [course(FALLING)] * 5
    assert rule.skill(plain, some) == pytest.approx(3 / 8 - 2 / 12)
    kinds = {kind: rule.wrong_kind(kind, plain, some) for kind in rule.WRONG}
    assert kinds == pytest.approx({"false": 2 / 12, "missed": 5 / 8, "early": 0})
    assert rule.wrong_kind("missed", plain, [course(RISING)]) is None
    assert rule.skill(plain, [course(RISING)]) is rule.skill(plain, some[:1]) is None
    assert rule.skill(plain, [course(RISING), course(FALLING)]) == 0  # it never speaks


def test_fits_are_least_squares_and_bins_are_of_falls():
    x = np.linspace(0.0, 1.4, 13)
    found = numbers.fitted(x, 2 - 3 * (x - 0.5) ** 2)
    assert found.curvature == pytest.approx(-3) and found.reduction == pytest.approx(1)
    noisy = np.random.default_rng(0).normal(size=13)
    (_, residual, *_) = np.linalg.lstsq(np.stack([x, np.ones(13)], 1), noisy, rcond=None)
    assert numbers.fitted(x, noisy).rmse_line == pytest.approx(np.sqrt(residual[0] / 13))
    assert numbers.fitted(x[:3], noisy[:3]) is None
    falls = np.array([-0.1, 0.0, 0.05, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 4.0])
    assert numbers.binned(falls, np.arange(11.0)) == [1.0, 4.0, 7.0, None, None, None]
    assert numbers.between(falls, np.arange(11.0), *numbers.MIDDLE) == 7.5
    assert numbers.near(falls, falls)[0].tolist() == falls[:-1].tolist()


def test_a_partial_correlation_is_that_of_what_another_score_leaves_over():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 60))
    every = {"step": 20.0 * np.arange(60), "llh_chosen": x, "length": z, "ead": z + 0.5 * x}
    run = [Course(Arm("dpo", 1.0), 10, every)]
    both = np.stack([np.argsort(np.argsort(v)).astype(float) for v in (x, every["ead"], z)])
    left = [v - np.polyval(np.polyfit(both[2], v, 1), both[2]) for v in both[:2]]
    expected = np.corrcoef(*left)[0, 1]
    assert numbers.spearman("ead", "dpo", np.inf, "length", run) == pytest.approx(
        expected, rel=1e-6
    )
    nll = [dataclasses.replace(run[0], arm=Arm("dpo", 1.0, 0.1))]
    assert numbers.spearman("ead", "dpo", np.inf, "", nll) is None


def test_what_runs_of_a_seed_start_from_counts_once():
    every = numbers.Runs(rows(seeds=2)["language"]).courses(DIRECT.values())
    (steps,) = numbers.points(every, "step")
    assert (steps == 0).sum() == 2 and (steps == 20).sum() == 2 * len(DIRECT)
    without_ead = rows(seeds=1, change=lambda arm, one: {"ead": None} if one["step"] == 20 else {})
    some = numbers.Runs(without_ead["language"]).courses()
    assert 20 not in numbers.points(some, "ead", "step")[1]


def falling(fall, method="dpo", nll=0.0, **values):
    """A run whose better LLH falls by these, with other values of the same length; the first evaluation is before an update."""
    every = {"step": 20.0 * np.arange(len(fall)), "llh_chosen": -3.0 - np.array(fall), **values}
    return Course(Arm(method, 1.0, nll), 20, {k: np.array(v, float) for k, v in every.items()})


def test_what_is_lost_is_a_share_of_the_gain_in_the_middle():
    fall = [0, 0.01, 0.02, 0.3, 0.5, 1.0, 2.0, 3.0, 4.0]
    runs = [falling(fall, p_win=[0.5, 0.55, 0.6, 0.7, 0.7, 0.7, 0.4, 0.4, 0.4])]
    assert numbers.gain(runs) == pytest.approx(0.2)
    assert numbers.lost(*numbers.NEAR, runs) == pytest.approx(0.15 / 0.2)
    assert numbers.lost(*numbers.FAR, runs) == pytest.approx(0.3 / 0.2)
    assert numbers.lost(*numbers.FAR, [falling(fall, p_win=[0.5] * 9)]) is None


def test_a_parabola_that_opens_upwards_saves_less_than_nothing():
    fall = np.linspace(0, 1.4, 15)
    down, up = (falling(fall, p_win=0.6 + sign * (fall - 0.7) ** 2 / 5) for sign in (-1, 1))
    assert numbers.saved([down]) == pytest.approx(100) == pytest.approx(-numbers.saved([up]))
    fit = numbers.fit_near([down])
    assert numbers.curvature([down]) == pytest.approx(-0.2) == pytest.approx(fit.curvature)


def test_rises_are_from_the_start_and_turns_from_what_has_moved():
    fall = [0, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    one = falling(
        fall, entropy=[2, 3, 3, 3, 3, 0, 1, 1, 1], ead=[0.5, 0.6, 0.7, 0.8, 0.1, 0, 0, 0, 0]
    )
    assert numbers.rise("entropy", [one]) == pytest.approx(1)
    assert numbers.turn("entropy", [one]) == pytest.approx(-2)
    assert numbers.first_rise("ead", ("dpo",), [one]) == pytest.approx(0.2)
    assert numbers.first_rise("ead", ("dpo", "ipo"), [one]) is None
    assert numbers.rise("entropy", [falling([0, 0.01, 0.02], entropy=[2, 2, 2])]) is None


def test_a_term_is_compared_at_equal_likelihood():
    fall = np.arange(12) * 0.1 + 0.05
    with_term = falling([0, *fall[:6]], nll=1.0, p_win=[0.5, *(0.6 + fall[:6] / 10 + 0.03)])
    other = [
        falling([0, *fall], method, p_win=[0.5, *(0.6 + fall / 10)])
        for method in ("dpo", "ipo", "hinge")
    ]
    assert numbers.beside_nll([with_term] * 3 + other) == pytest.approx(0.03)
    assert numbers.beside_nll(other) is None


def test_the_report_has_every_figure_and_its_numbers(tmp_path):
    measured = rows(seeds=2) | rows(seeds=2, part="large")
    written = report.REPORT.write(measured, tmp_path, FACTS)
    text = (tmp_path / "preference.md").read_text()
    drawn = {path.name for path in (tmp_path / "preference").glob("*.png")}
    names = ("claims", "likelihood", "online", "gap", "spread", "course", "nll", "alarms")
    assert drawn == {f"{name}.png" for name in names}
    assert all(f"](preference/{name})" in text for name in drawn)
    assert "Missing from this page" not in text
    # The updates of the best P_win are those that were evaluated.
    row = next(line for line in text.splitlines() if line.startswith("| DPO β = 0.01 | 0."))
    steps = [int(step) for step in row.split("|")[3].split(",")]
    assert len(steps) == 2 and all(step % 20 == 0 for step in steps)
    assert "| P_win | 0.500 [0.500, 0.500] | 0.805 [" in text
    record = json.loads((tmp_path / "preference" / "results.json").read_text())
    assert [c["verdict"] for c in record["claims"]] == [c.verdict for c in written]
    assert record["headline"]["word"] == "not measured" and record["headline"]["unit"] == "%"
    assert "all of the part `large`" in _written(rows(seeds=1), tmp_path / "other")


def _written(measured, folder):
    folder.mkdir()
    without_figures = dataclasses.replace(report.REPORT, figures=lambda parts: {})
    without_figures.write(measured, folder, FACTS)
    return (folder / "preference.md").read_text()


def test_a_report_of_partial_results_names_what_is_missing(tmp_path):
    report.REPORT.write({}, tmp_path, FACTS)
    assert "all of the part `language`" in (tmp_path / "preference.md").read_text()
    assert not list((tmp_path / "preference").glob("*.png"))
    measured = rows(seeds=2)
    measured["language"] = [
        row
        for row in measured["language"]
        if row["arm"] == "dpo_5" or (row["arm"], row["seed"]) == ("ipo_0p1", 21)
    ]
    without_figures = dataclasses.replace(report.REPORT, figures=lambda parts: {})
    without_figures.write(measured, tmp_path, FACTS)
    text = (tmp_path / "preference.md").read_text()
    (missing,) = (line for line in text.splitlines() if line.startswith("- Missing"))
    assert "`ipo_0p1` (seed 20)" in missing and "`dpo_0p1`" in missing and "`dpo_5`" not in missing


def test_a_row_is_read_with_the_course_of_its_run(tmp_path):
    indicators = {f"indicators/{name}": i / 10 for i, name in enumerate(experiment.INDICATORS)}
    lines = [
        {"step": 0, **indicators},
        {"step": 0, "facts/accuracy": 1.0},
        {"step": 1, "loss": 0.7},
        {"step": 20, **indicators, "indicators/p_win": 0.61234},
        {"step": 20, "facts/accuracy": 0.5},
        {"step": 40, "indicators/entropy": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    samples = tmp_path / "indicators" / "samples"
    samples.mkdir(parents=True)
    texts = (topic_language.LANGUAGE_A[:3], topic_language.LANGUAGE_B[0], "")
    (samples / "20.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    row = experiment.with_course({"arm": "dpo_5", "seed": 20, "seconds": 1.5, "x": 1}, tmp_path)
    read = row.pop("course")
    assert row == {"arm": "dpo_5", "seed": 20, "seconds": 1.5}
    assert read["step"] == [0, 20, 40] and read["p_win"] == [0.9, 0.6123, None]
    assert (read["facts"], read["outside"]) == ([1.0, 0.5, None], [None, 0.25, None])
    assert experiment.with_course({}, tmp_path / "elsewhere")["course"] == {}
    assert math.isnan(numbers._numbers(read)["ead"][2])


def test_the_best_of_n_is_chosen_by_quality():
    prompt = topic_language.prompts("validation")[0]
    wanted = topic_language.preferred(prompt[1])
    other = next(x for x in topic_language.LANGUAGE_A if x not in wanted)
    count = 1 + max(pairs.SIZES)
    texts = [other] + [other] * 2 + [wanted[0]] + [other] * (count - 4)
    samples = [{"prompt": prompt, "text": text, "ended": "eos"} for text in texts] * 2
    found = pairs.best_of(samples)
    gained = 1 / (1 + math.exp(-1.5))
    assert found == pytest.approx(dict.fromkeys(pairs.SIZES, gained) | {1: 0.5, 2: 0.5})
