"""The low-rank reproduction: verdicts and report on hand-made results, its sweep, and its arms as gin has them."""

import json
import math

import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.launch.papers.low_rank import experiment, report
from espalier.launch.papers.low_rank import experiment as lm
from espalier.launch.papers.shared import claim as shared_claim
from espalier.launch.sweep import file

SWEEP = "launch/papers/low_rank/experiment.py"
FACTS = {"command": "a command", "versions": {"jax": "1"}}


def score_of(arm):
    """(perplexity, effective rank, effective step) with which all claims hold, about as a pilot had them."""
    scores = {
        "dense": 6.0,
        "dense_half": 6.1,
        "dense_start": 9.0,
        "spectral_none_half": 6.7,
        "spectral_long_full": 5.6,
        "spectral_long_half": 5.62,
    }
    starts = {"he": 0.8, "spectral": 0.5, "spectral_ones": 0.55}
    scores |= {
        lm.arm(init, rank): 6.0 + gap + (lm.MAIN - rank)
        for init, gap in starts.items()
        for rank in lm.RANKS
    }
    for rate, more in (("full", 0.0), ("half", 0.1)):
        scores |= {lm.warm(rate): 6.3 + more, lm.ratio_arm(rate): 7.0 + more}
        scores[lm.warm(rate, "_ratio")] = 6.8 + more
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


def rows(seeds=5):
    """Rows of the sweep as `experiment.run` has them, each seed and arm a little different."""
    out, rng = [], np.random.default_rng(0)
    for run in file.read(f"{SWEEP}:{seeds}"):
        perplexity, rank, step = score_of(run.arm)
        shift = 0.03 * run.seed + 0.002 * rng.normal()
        first = 250 if run.arm.startswith("warm") else 0
        last = 250 if run.arm == "dense_start" else 4500 if "long" in run.arm else 1500
        at = [at for at in range(50, last + 1, 50) if at > first]
        end = perplexity + shift
        out.append(
            _row(run)
            | {
                "step": last,
                "parents": [run.parent] if run.parent else [],
                "held_out": {"python": {"perplexity": end}},
                "curve": [(s, end + 4000 / s**1.4 - 4000 / last**1.4) for s in at],
                "parameters": 100_864,
                **_course(run.arm, rank + shift, step * (1 + shift)),
            }
        )
    return out


def _row(run):
    return {"run": run.name, "arm": run.arm, "size": None, "seed": run.seed, "seconds": 45.0}


def _course(arm, rank, step):
    if arm.startswith("dense"):
        return {"spectrum": [], "first_profile": [], "last_profile": []}
    values = np.arange(40)
    reading = {"effective_rank": rank, "effective_step": step}
    return {
        "spectrum": [
            {"step": s, **reading, "effective_rank": rank + (26 - rank) * math.exp(-s / 300)}
            for s in range(0, 1500, 250)
        ]
        + [{"step": 1500, **reading}],
        "first_profile": (1 - values / 60).tolist(),
        "last_profile": np.exp(-values / rank).tolist(),
    }


def image_rows(seeds=5, *, frobenius=0.84, l2=0.82):
    out, rng = [], np.random.default_rng(0)
    levels = {"l2": (l2, 5.0), "frobenius": (frobenius, 7.0), "none": (0.85, None)}
    for run in file.read(f"launch/papers/low_rank/experiment.py:vision,{seeds}"):
        kind = next((kind for kind in levels if kind in run.arm), "none")
        level, rank = levels[kind]
        step = 1.1e-3 if run.arm.endswith("half") else 2e-3
        end = {"step": 2400, "effective_rank": rank, "effective_step": step}
        accuracy = level + 0.004 * (run.seed - 10) + 0.001 * rng.normal()
        end["effective_rank"] = rank and rank + 0.01 * rng.normal()
        out.append(
            _row(run)
            | {
                "step": 2400,
                "parents": [],
                "parameters": 50_000,
                "held_out": {"textures": {"accuracy": accuracy}},
                "curve": [],
                "spectrum": [end] if rank else [],
                "first_profile": [],
                "last_profile": [],
            }
        )
    return out


def times(factor=0.8):
    seconds = {arm: [0.010, 0.011, 0.0105, 0.0102, 0.0108] for arm in experiment.timed_arms()}
    for arm in seconds:
        if arm.startswith("spectral"):
            seconds[arm] = [factor * s + 1e-5 * i for i, s in enumerate(seconds["dense"])]
    return {"seconds": seconds}


def everything():
    return {"lm": rows(), "vision": image_rows(), "timing": times()}


def verdicts(found):
    return {claim.name: claim.verdict for claim in report.REPORT.judge(found)}


def change(found, arm, seeds=range(10, 15), **scores):
    """Sets perplexities, or what is said of the end of runs; values of one arm differ a little by seed."""
    for row in found["lm"]:
        if row["arm"] == arm and row["seed"] in seeds:
            for name, value in scores.items():
                where = row["held_out"]["python"] if name == "perplexity" else row["spectrum"][-1]
                where[name] = value * (1 + 1e-3 * row["seed"])


def test_all_claims_hold_where_they_should():
    found = verdicts(everything())
    assert list(found) == [*(f"L{n}" for n in range(1, 13)), "V1", "V2", "V3", "V4"]
    assert set(found.values()) == {"holds"}
    required = {claim.name for claim in report.REPORT.claims if claim.required}
    assert required == {"L1", "L2", "L3", "L5", "L6", "L7", "L10", "V1"}


def test_a_claim_fails_where_all_of_its_effects_do():
    found = everything()
    change(found, "dense", perplexity=10.0)
    for init in ("spectral", "spectral_ones"):
        for arm in (lm.arm(init, rank) for rank in lm.RANKS):
            change(found, arm, perplexity=8.5 if init == "spectral" else 9.5)
    found["timing"] = times(1.1)
    found["vision"] = image_rows(frobenius=0.80)
    failed = verdicts(found)
    expected = dict.fromkeys(("L1", "L2", "L3", "L12", "V1"), "fails")
    assert {name: failed[name] for name in expected} == expected


def test_a_claim_is_mixed_where_some_effects_fail_and_undecided_where_seeds_disagree():
    found = everything()
    change(found, lm.decayed("frobenius", "half", "1e-2"), effective_rank=1.0)
    change(found, lm.warm("full", "_ratio"), seeds=(10, 11), perplexity=7.8)
    judged = verdicts(found)
    assert (judged["L6"], judged["L5"], judged["L10"]) == ("mixed", "holds", "holds")
    assert judged["L11"] == "undecided"  # two seeds are worse, three better
    change(found, lm.warm("half"), perplexity=6.9)
    assert verdicts(found)["L10"] == "mixed"
    assert verdicts({**everything(), "lm": rows(seeds=3)})["L1"] == "not measured"


def test_both_explanations_are_judged_by_one_statistic():
    found = everything()
    claims = {claim.name: claim for claim in report.REPORT.judge(found)}
    assert [set(e.by_seed.values()) for e in claims["L7"].effects] == [{-1.0}] * 2
    assert [set(e.by_seed.values()) for e in claims["L8"].effects] == [{1.0}] * 2
    assert "over all 4 decays -1.00" in claims["L7"].effects[0].note
    for weight in lm.WEIGHTS:
        for rate in lm.RATES:
            for kind in lm.DECAYS:
                (_, _, step) = score_of(lm.decayed(kind, rate, weight))
                change(found, lm.decayed(kind, rate, weight), perplexity=6.0 - math.log10(step))
    changed = verdicts(found)
    assert changed["L7"] == "fails" and changed["L8"] == "fails"


def test_images_are_compared_at_the_same_rate_and_all_are_decayed():
    assert verdicts({"vision": image_rows(l2=0.9)})["V2"] == "fails"
    found = image_rows()
    for row in found:
        if row["arm"] == "dense_half":
            row["held_out"]["textures"]["accuracy"] += 0.05
    assert verdicts({"vision": found})["V1"] == "mixed"
    chance = [{**row, "held_out": {"textures": {"accuracy": 0.11}}} for row in image_rows()]
    assert verdicts({"vision": chance})["V1"] == "not measured"
    runs = file.read("launch/papers/low_rank/experiment.py:vision,1")
    assert {run.arm for run in runs if run.arm.startswith("dense")} == {"dense", "dense_half"}
    assert not any("FACTOR_DECAY='none'" in run.bindings for run in runs)


def test_shuffling_exchanges_the_times_of_a_round():
    found = {"timing": {"seconds": {"dense": [1.0, 2.0], "spectral": [3.0, 4.0]}}}
    shuffled = report.REPORT.shuffle(found, np.random.default_rng(0))["timing"]["seconds"]
    assert [sorted(x) for x in zip(*shuffled.values(), strict=True)] == [[1.0, 3.0], [2.0, 4.0]]
    rng = np.random.default_rng(0)
    assert shared_claim.shuffle_arms({"lm": rows(seeds=1)}, rng)["lm"] != rows(seeds=1)


def test_the_report_has_every_figure_and_says_what_is_missing(tmp_path):
    found = everything()
    judged = report.REPORT.write(found, tmp_path, FACTS)
    text = (tmp_path / "low_rank.md").read_text()
    drawn = {path.name for path in (tmp_path / "low_rank").glob("*.png")}
    names = ("claims", "ranks", "spectra", "effective_rank", "explanations", "warm_start", "images")
    assert drawn == {f"{name}.png" for name in names}
    assert all(f"](low_rank/{name})" in text for name in drawn) and "Missing" not in text
    written = json.loads((tmp_path / "low_rank" / "results.json").read_text())
    assert [c["verdict"] for c in written["claims"]] == [c.verdict for c in judged]
    again = report.REPORT.judge(written["measured"])
    assert [c.verdict for c in again] == [c.verdict for c in judged]


def test_a_report_of_partial_results_names_what_is_missing(tmp_path):
    kept = [row for row in rows() if row["arm"] in ("dense", "he", "spectral")]
    partial = {"lm": [row for row in kept if row["run"] != "he/seed11"]}
    judged = {claim.name: claim for claim in report.REPORT.write(partial, tmp_path, FACTS)}
    text = (tmp_path / "low_rank.md").read_text()
    assert "`he` (seed 11)" in text and "`spectral_ones`" in text and "`warm_start_full`" in text
    assert "all of the part `vision`" in text and "all of the part `timing`" in text
    assert judged["L1"].verdict == "not measured" and len(judged["L1"].effects) == 2
    assert judged["L5"].verdict == "not measured" and "- Not measured." in text
    report.REPORT.write({}, tmp_path, FACTS)
    assert "all of the part `lm`" in (tmp_path / "low_rank.md").read_text()


FULL = "launch/papers/low_rank/experiment.py:full,/tfds"


def test_the_full_sweep_has_the_papers_arms():
    runs = {run.arm: run for run in file.read(FULL)}
    factors = [arm for arm in runs if arm.startswith(("gpt2_he", "gpt2_spectral"))]
    assert len(factors) == 3 * 3 * 2
    assert "FACTOR_DECAY='l2'" in runs["gpt2_spectral_ones_l2_half"].bindings
    assert "LEARNING_RATE=0.0005" in runs["gpt2_spectral_ones_l2_half"].bindings
    assert runs["gpt2_warm_start_half"].parent == "gpt2_dense_start/seed0"
    assert "RATE_SCALE=0.5" in runs["gpt2_warm_start_half"].bindings
    ranks = {arm.rpartition("_")[2] for arm in runs if arm.startswith("resnet50_spectral_rank")}
    assert ranks == {"rank30", "rank50"}
    assert {"wrn28_10_spectral_rank10", "wrn28_10_spectral_rank20"} <= set(runs)
    assert all("/tfds" in " ".join(run.bindings) for run in runs.values())


@pytest.mark.parametrize(
    "arm",
    [
        *("gpt2_dense_half", "gpt2_he_l2_full", "gpt2_warm_start_half"),
        *("resnet50_spectral_ones_rank30", "wrn28_10_dense", "wrn28_10_he_rank10"),
    ],
)
def test_arms_of_the_full_sweep_are_valid_configurations(arm):
    (run,) = [run for run in file.read(FULL) if run.arm == arm]
    bindings = (*run.bindings, "MODEL_DIR='/run'")
    if run.parent:
        bindings += ("INITIAL_CHECKPOINT_PATH='/before'",)
    config = gin_config.load(run.gin_files, bindings, entry="espalier.launch.train:train")
    assert config.arguments()["total_steps"] in (240_000, 112_600, 78_125)


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
    held_out = {"python": {"perplexity": math.e, "loss": 1.0}}
    row = experiment.with_course({"held_out": held_out, "arm": "a", "log": "x"}, tmp_path)
    assert row["curve"] == [(2, 2.7183)] and row["parameters"] == 12 and "log" not in row
    assert row["held_out"] == {"python": {"perplexity": math.e}}
    assert [r["effective_rank"] for r in row["spectrum"]] == [26.0, 14.0]
    assert row["spectrum"][-1]["effective_step"] == 1e-5
    assert row["first_profile"] == [1.0, 0.5] and row["last_profile"] == [1.0, 0.1667]
    (tmp_path / "spectra.jsonl").unlink()
    without = experiment.with_course({"held_out": {}}, tmp_path)
    assert without["last_profile"] == [] and without["spectrum"] == []


def test_profiles_of_spectra_count_a_matrix_that_has_vanished_as_zero():
    assert experiment.profile({"a": [[2.0, 1.0], [0.0, 0.0]], "b": [[4.0, 1.0]]}) == [0.6667, 0.25]
    assert experiment.profile({"a": [[2.0, 1.0]], "b": [[1.0]]}) == []


def test_ratios_of_steps_are_within_a_round():
    found = {"seconds": {"dense": [1.0, 2.0, 4.0], "spectral": [0.5, 1.0, 4.0]}}
    assert experiment.time_ratios(found, "spectral").tolist() == [0.5, 0.5, 1.0]


def test_arms_take_turns(monkeypatch):
    turns = []

    class Side:
        def __init__(self, name):
            self.name = name

        def median(self, steps):
            turns.append(self.name)
            return 0.25 * steps

    names = iter(experiment.timed_arms())
    monkeypatch.setattr(experiment._Side, "of", lambda settings: Side(next(names)))
    found = experiment.measure_times()
    assert turns == [*experiment.timed_arms()] * experiment.ROUNDS
    assert found["seconds"]["dense"] == [0.25 * experiment.TIMED_STEPS] * experiment.ROUNDS


def test_a_step_is_timed_as_it_is_compiled_for_a_run():
    settings = experiment.timed_arms()["spectral_rank30"]
    small = ("WIDTH=16", "MLP_WIDTH=16", "TASK_FEATURE_LENGTHS={'targets': 4}", "BATCH_SIZE=8")
    side = experiment._Side.of({**settings, "bindings": [*settings["bindings"], *small]})
    assert side.median(2) > 0
    assert int(side.state.step) == 3  # the first to warm up
