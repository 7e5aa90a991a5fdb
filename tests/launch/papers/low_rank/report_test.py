"""The low-rank reproduction: verdicts and report on hand-made results, its sweep, and its arms as gin has them."""

import json
import math

import gin
import numpy as np
import pytest

from launch.papers.low_rank import figures, measure, page, timing
from launch.papers.low_rank import sweep as lm
from launch.papers.low_rank.arms import Results
from launch.sweeping import file

SWEEP = "launch/papers/low_rank/sweep.py"
FOLDER = "t5x_configs/experiments/low_rank"
FACTS = {"command": "a command", "versions": {"jax": "1"}}
LAMBDAS = tuple(map(float, lm.WEIGHTS))


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config(clear_constants=True)


def score_of(arm):
    """(perplexity, effective rank, effective step) with which all claims hold, about as a pilot had them."""
    plain = {
        "dense": 6.0,
        "dense_start": 9.0,
        "warm_start": 6.4,
        "warm_start_ratio": 6.7,
        "spectral_ratio": 7.0,
        "spectral_none_half": 6.4,
    }
    starts = {"he": 0.8, "spectral": 0.5, "spectral_ones": 0.55}
    scores = plain | {
        lm.arm(init, rank): 6.0 + gap + (lm.MAIN - rank)
        for init, gap in starts.items()
        for rank in lm.RANKS
    }
    scores |= {lm.narrow(rank): 6.7 + (lm.MAIN - rank) for rank in lm.RANKS}
    if arm in scores:
        half = arm.endswith("half")
        return scores[arm], 19.0 if half else 14.0, 6e-6 if half else 1.3e-5
    _, kind, rate, weight = arm.split("_")
    strength, l2, half = 4 + math.log10(float(weight)), kind == "l2", rate == "half"
    return (
        6.6 + strength * (1.0 if l2 else 0.6) + 0.1 * l2 - 0.05 * half,
        (12 if l2 else 14) / (1 + strength * (1.2 if l2 else 0.8)) + 4 * half,
        1e-4 * 10**strength * (1.1 if l2 else 1.0) / (2 if half else 1),
    )


def rows(seeds=3):
    """Rows of the sweep as `measure.run` has them, each seed a little different."""
    out = []
    for run in file.read(f"{SWEEP}:{seeds}"):
        perplexity, rank, step = score_of(run.arm)
        shift = 0.03 * run.seed
        first = 250 if run.arm.startswith("warm") else 0
        last = 250 if run.arm == "dense_start" else 1500
        at = [at for at in range(50, 1501, 50) if first < at <= last]
        end = perplexity + shift
        out.append(
            _row(run)
            | {
                "step": last,
                "parents": [run.parent] if run.parent else [],
                "held_out": {"python": {"loss": math.log(end), "perplexity": end}},
                "curve": [(s, end + 4000 / s**1.4 - 4000 / last**1.4) for s in at],
                "parameters": {"dense_narrow15": 31_680}.get(run.arm, 100_864),
                **_course(run.arm, rank + shift, step * (1 + shift)),
            }
        )
    return out


def _row(run):
    return {"run": run.name, "arm": run.arm, "size": None, "seed": run.seed, "seconds": 45.0}


def _course(arm, rank, step):
    if arm.startswith("dense"):
        return {"spectrum": [], "first_spectra": {}, "last_spectra": {}}
    values = np.arange(40)
    decayed = np.exp(-values / rank).tolist()
    start = (1 - values / 60).tolist()
    reading = {"effective_rank": rank, "effective_step": step}
    return {
        "spectrum": [
            {"step": s, **reading, "effective_rank": rank + (26 - rank) * math.exp(-s / 300)}
            for s in range(0, 1500, 125)
        ]
        + [{"step": 1500, **reading}],
        "first_spectra": {"a/query": [start, start], "a/up": [start, start]},
        # Decay of the factors brings some matrices to nothing.
        "last_spectra": {
            "a/query": [decayed, [0.0] * 40 if "_l2_" in arm else decayed],
            "a/up": [decayed, decayed],
        },
    }


def image_rows(seeds=3, *, spectral=0.84, l2=0.82):
    out = []
    levels = {"he": 0.80, "spectral": spectral, "spectral_ones": spectral - 0.002}
    arms = {"dense": (0.85, None, None)}
    for init, level in levels.items():
        for kind, change, rank in (("none", 0, 9.0), ("l2", l2 - 0.84, 5.0), ("frobenius", 0, 7.0)):
            for rate, step in (("full", 2e-3), ("half", 1.1e-3)):
                arms[f"{init}_{kind}_{rate}"] = (level + change, rank, step)
    for arm, (accuracy, rank, step) in arms.items():
        for seed in range(seeds):
            end = {"step": 1000, "effective_rank": rank, "effective_step": step}
            out.append(
                {
                    "run": f"{arm}/seed{seed}",
                    "arm": arm,
                    "seed": seed,
                    "seconds": 20.0,
                    "step": 1000,
                    "parents": [],
                    "parameters": 50_000,
                    "held_out": {"textures": {"accuracy": accuracy + 0.004 * seed}},
                    "curve": [],
                    "spectrum": [end] if rank else [],
                    "first_spectra": {},
                    "last_spectra": {},
                }
            )
    return out


def times(factor=0.8):
    seconds = {arm: [0.010, 0.011, 0.0105] for arm in timing.arms()}
    for arm in seconds:
        if arm.startswith("spectral"):
            seconds[arm] = [factor * s + 1e-5 * i for i, s in enumerate(seconds["dense"])]
    return {"seconds": seconds}


def everything():
    return {"lm": rows(), "vision": image_rows(), "timing": times()}


def verdicts(found):
    return {claim.name: claim.verdict for claim in page.REPORT.judge(found)}


def change(found, arm, seeds=(0, 1, 2), **scores):
    """Sets perplexities, or what is said of the end of runs."""
    for row in found["lm"]:
        if row["arm"] == arm and row["seed"] in seeds:
            for name, value in scores.items():
                where = row["held_out"]["python"] if name == "perplexity" else row["spectrum"][-1]
                where[name] = value


def test_all_claims_hold_where_they_should():
    found = verdicts(everything())
    assert list(found) == [*(f"L{n}" for n in range(1, 14)), "V1", "V2", "V3", "V4"]
    assert set(found.values()) == {"holds"}


def test_a_claim_fails_where_all_of_its_measurements_do():
    found = everything()
    change(found, "dense", perplexity=10.0)
    for init in ("spectral", "spectral_ones"):
        for arm in (lm.arm(init, rank) for rank in lm.RANKS):
            change(found, arm, perplexity=8.5 if init == "spectral" else 9.5)
    found["timing"] = times(1.1)
    found["vision"] = image_rows(spectral=0.80)
    failed = verdicts(found)
    expected = dict.fromkeys(("L1", "L2", "L3", "L13", "V1"), "fails")
    assert {name: failed[name] for name in expected} == expected


def test_a_claim_is_mixed_where_some_measurements_fail():
    found = everything()
    change(found, "warm_start_ratio", seeds=(1,), perplexity=7.5)  # the other two seeds still gain
    change(found, lm.decayed("frobenius", "half", "1e-2"), effective_rank=1.0)
    mixed = verdicts(found)
    assert (mixed["L11"], mixed["L6"], mixed["L5"]) == ("mixed", "mixed", "holds")
    assert mixed["L10"] == "holds"  # which one seed of three does not refute
    (claim,) = (c for c in page.REPORT.judge(found) if c.name == "L11")
    assert "better in 2 of 3 pairs (p = 0.5)" in claim.evidence[1].measured
    assert not claim.evidence[1].holds


def test_effective_steps_that_order_the_runs_are_told_from_those_that_do_not():
    found = everything()
    for weight in lm.WEIGHTS:
        for rate in lm.RATES:
            for kind in lm.DECAYS:
                (_, _, step) = score_of(lm.decayed(kind, rate, weight))
                change(found, lm.decayed(kind, rate, weight), perplexity=6.0 - math.log10(step))
    changed = verdicts(found)
    assert changed["L7"] == "fails" and changed["L8"] == "fails"


def test_the_images_claims_are_of_pairs_and_of_the_effective_step():
    found = {"vision": image_rows(l2=0.9)}
    assert verdicts(found)["V2"] == "fails" and verdicts(found)["V4"] == "holds"
    for row in found["vision"]:
        if row["arm"] == "he_l2_half":
            row["spectrum"][-1]["effective_step"] = 1.0
    assert verdicts(found)["V4"] == "mixed"


def test_differences_are_of_the_seeds_that_both_arms_have():
    found = everything()
    found["lm"] = [row for row in found["lm"] if row["run"] != "dense/seed0"]
    (claim, *_) = page.REPORT.judge(found)
    assert "difference -0.80 [-0.80, -0.80], better in 2 of 2 pairs" in claim.evidence[0].measured


def test_the_report_has_every_figure_and_says_what_is_missing(tmp_path):
    found = everything()
    judged = page.write(found, tmp_path, FACTS)
    text = (tmp_path / "low_rank.md").read_text()
    drawn = {path.name for path in (tmp_path / "low_rank").glob("*.png")}
    names = ("ranks", "spectra", "effective_rank", "explanations", "warm_start", "sizes", "images")
    assert drawn == {f"{name}.png" for name in (*names, "image_explanations")}
    assert all(f"](low_rank/{name})" in text for name in drawn) and "Missing" not in text
    written = json.loads((tmp_path / "low_rank" / "results.json").read_text())
    assert [c["verdict"] for c in written["claims"]] == [c.verdict for c in judged]
    assert len(written["runs"]) == len(found["lm"]) + len(found["vision"])


def test_a_report_of_partial_results_names_what_is_missing(tmp_path):
    kept = [row for row in rows() if row["arm"] in ("dense", "he", "spectral")]
    partial = {"lm": [row for row in kept if row["run"] != "he/seed1"]}
    judged = {claim.name: claim for claim in page.write(partial, tmp_path, FACTS)}
    text = (tmp_path / "low_rank.md").read_text()
    assert "`he` (seed 1)" in text and "`spectral_ones`" in text and "`warm_start`" in text
    assert "all of the part `vision`" in text and "all of the part `timing`" in text
    assert judged["L1"].verdict == "holds" and len(judged["L1"].evidence) == 2
    assert judged["L5"].verdict == "not measured" and "- Not measured." in text
    assert not list((tmp_path / "low_rank").glob("*.png"))
    page.write({}, tmp_path, FACTS)
    assert "all of the part `lm`" in (tmp_path / "low_rank.md").read_text()


def test_a_row_is_read_with_the_course_of_its_run(tmp_path):
    lines = [
        {"step": 0, "spectrum/effective_rank": 26.0, "spectrum/effective_step": 0.0},
        {"step": 1, "loss": 4.0},
        {"step": 2, "eval/python/loss": 1.0, "eval/python/perplexity": math.e},
        {"step": 2, "spectrum/effective_rank": 14.0, "spectrum/effective_step": 1e-5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    readings = [
        {"step": s, "learning_rate": 0.1, "layers": {"a/query": [[2.0, 1.0 / (s + 1)]]}}
        for s in (0, 2)
    ]
    (tmp_path / "spectra.jsonl").write_text("".join(json.dumps(x) + "\n" for x in readings))
    (tmp_path / "run.json").write_text(json.dumps({"parameters": 12}))
    row = measure.with_course({"held_out": {"python": {"perplexity": math.e}}}, tmp_path)
    assert row["curve"] == [(2, math.e)] and row["parameters"] == 12
    assert [r["effective_rank"] for r in row["spectrum"]] == [26.0, 14.0]
    assert row["spectrum"][-1]["effective_step"] == 1e-5
    assert row["first_spectra"]["a/query"] == [[2.0, 1.0]]
    assert row["last_spectra"]["a/query"] == [[2.0, 1 / 3]]
    (tmp_path / "spectra.jsonl").unlink()
    without = measure.with_course({}, tmp_path)
    assert without["last_spectra"] == {} and without["spectrum"] == []


def test_profiles_of_spectra_count_a_matrix_that_has_vanished_as_zero():
    found = Results(rows())
    (arm, start) = (lm.decayed("l2", "full", "1e-2"), "spectral")
    assert figures._profile(found, arm, "last_spectra")[0] == pytest.approx(3 / 4)
    assert figures._profile(found, start, "first_spectra")[30] == pytest.approx(1 - 30 / 60)


def test_ratios_of_steps_are_within_a_round():
    found = {"seconds": {"dense": [1.0, 2.0, 4.0], "spectral": [0.5, 1.0, 4.0]}}
    assert timing.ratios(found, "spectral").tolist() == [0.5, 0.5, 1.0]


def test_arms_take_turns(monkeypatch):
    turns = []

    class Side:
        def __init__(self, name):
            self.name = name

        def median(self, steps):
            turns.append(self.name)
            return 0.25 * steps

    names = iter(timing.arms())
    monkeypatch.setattr(timing._Side, "of", lambda settings: Side(next(names)))
    found = timing.measure()
    assert turns == [*timing.arms()] * timing.ROUNDS
    assert found["seconds"]["dense"] == [0.25 * timing.STEPS] * timing.ROUNDS


def test_a_step_is_timed_as_it_is_compiled_for_a_run():
    settings = timing.arms()["spectral_rank15"]
    small = ("WIDTH=16", "MLP_WIDTH=16", "TASK_FEATURE_LENGTHS={'targets': 4}", "BATCH_SIZE=8")
    side = timing._Side.of({**settings, "bindings": [*settings["bindings"], *small]})
    assert side.median(2) > 0
    assert int(side.state.step) == 3  # the first to warm up
