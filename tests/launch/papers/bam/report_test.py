"""The reproduction of BAM: verdicts, figures and report on hand-made results."""

import json
import sys
import types

import numpy as np
import pytest

from data.nexus import lag_domains
from launch import environment, reproduce
from launch.papers.bam import arms, claims, figures, measure, page
from launch.papers.bam.arms import Runs, matched
from launch.papers.shared import domains as domain_runs
from launch.papers.shared import sweeps

FACTS = {"command": "a command", "versions": {"jax": "1"}}
DOMAINS = ("lag_general", "lag_4", "lag_7", "lag_11")
FLOORS = {"lag_general": 1.35, "lag_4": 1.11, "lag_7": 1.13, "lag_11": 1.15}
# Mean losses over the floors with which all claims hold, about as the specification's pilot had them.
EXCESS = {
    "seed": 0.9,
    "btx": 0.45,
    "btx6": 0.43,
    "btx6_top3": 0.42,
    "bam": 0.31,
    "bam_shared_kv": 0.37,
    "moa_top2": 0.34,
    "moa_top1": 0.40,
    "bam_averaged": 0.36,
    "dense_continued": 0.47,
    "soup": 1.1,
    matched("btx6_top3"): 0.44,
    matched("bam_averaged"): 0.39,
    matched("bam"): 0.36,
    matched("bam_shared_kv"): 0.40,
    matched("moa_top2"): 0.44,
    matched("moa_top1"): 0.45,
}
STEPS, TOKENS = 600, 2048


def rows(domains=DOMAINS, floors=FLOORS, seeds=3, **changed):
    """Rows of a part as `measure.run` has them, each seed a little different."""
    excess = {**EXCESS, **changed}
    out = []
    for seed in range(seeds):
        for arm, value in excess.items():
            losses = {d: floors.get(d, 1.2) + value + 0.02 * seed for d in domains}
            if arm == "seed":
                losses[domains[0]] -= 0.7
            out.append(row(arm, seed, losses))
        for home in domains[1:]:
            losses = {d: floors.get(d, 1.2) + 1.6 for d in domains}
            losses[home] = floors.get(home, 1.2) + 0.1
            out.append(row(arms.specialist(home), seed, losses))
    return out


def row(arm, seed, losses):
    made = arm == "soup"
    steps = (
        0 if made else 270 if arm.endswith("_cm") else 2400 if arm == "dense_continued" else STEPS
    )
    named = {task: {"loss": loss} for task, loss in losses.items()}
    curve = [
        (s, {task: loss + 30 / (s + 10) - 30 / (steps + 10) for task, loss in losses.items()})
        for s in range(50, steps + 1, 50 if steps != 270 else 55)
    ]
    if curve and curve[-1][0] != steps:
        curve.append((steps, losses))
    evaluations = {"held_out": {"tasks": named}} if made else {}
    if arm.startswith("bam"):
        names = ["seed", *list(losses)[1:]]
        shares = gates(list(losses))
        evaluations["routing"] = {"domains": shares, "chosen": shares, "experts": names}
    return {
        "run": f"{arm}/seed{seed}",
        "arm": arm,
        "seed": seed,
        "parents": [],
        "step": steps,
        "tokens": steps * TOKENS,
        "parameters": None if made else 150_000 if arm.startswith(("bam", "moa")) else 120_000,
        "seconds": 40.0,
        "held_out": {} if made else named,
        "evaluations": evaluations,
        "curve": curve,
        "flops": steps * TOKENS * (2.2 if arm.startswith(("bam", "moa")) else 1.0) * 1e6,
    }


def gates(domains, layers=2):
    shares = 0.12 + 0.52 * np.eye(len(domains))
    return {
        task: {r: [(shares[i] / shares[i].sum()).tolist()] * layers for r in ("mlp", "attention")}
        for i, task in enumerate(domains)
    }


def part(domains=DOMAINS, floors=FLOORS, **changed):
    found = rows(domains, floors, **changed)
    planned = {}
    for one in found:
        measured = ("held_out", *(("routing",) if one["arm"].startswith("bam") else ()))
        planned.setdefault(one["arm"], {})[one["seed"]] = measured
    return {"rows": found, "domains": domains, "floors": floors, "planned": planned}


def everything(**changed):
    real = ("prose", "code", "law", "maths")
    held = {"experts": [2, 4], "dense": [8, 8], "shared_kv": [8, 8], "expert_kv": [16, 32]}
    return {"synthetic": part(**changed), "real": part(real, {}, **changed), "caches": held}


def judged(found):
    return page.REPORT.judge(found)


def verdicts(found):
    return {claim.name: claim.verdict for claim in judged(found)}


def test_all_claims_hold_where_they_should():
    found = verdicts(everything())
    assert list(found) == [f"B{n}" for n in range(1, 16)]
    failed = {name: verdict for name, verdict in found.items() if verdict != "holds"}
    assert failed == {"B10": "fails"}  # top-k is better than BTX at equal data


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"bam_shared_kv": 0.30, "bam": 0.5}, "B5"),
        ({matched("bam"): 0.5, matched("bam_shared_kv"): 0.47}, "B4"),
        ({matched("bam"): 0.5}, "B6"),
        ({"moa_top2": 0.2, "moa_top1": 0.1}, "B7"),
        ({matched("moa_top2"): 0.2, matched("moa_top1"): 0.1}, "B8"),
        ({matched("moa_top2"): 0.2, matched("moa_top1"): 0.1}, "B9"),
        ({"btx6": 0.33}, "B11"),
        ({"bam": 0.46}, "B11"),  # no gap
        ({"bam_averaged": 0.2, matched("bam_averaged"): 0.2}, "B13"),
        ({"dense_continued": 0.2}, "B14"),
        ({"soup": 0.1}, "B15"),
    ],
)
def test_a_claim_fails_where_all_of_its_measurements_do(changed, name):
    assert verdicts(everything(**changed))[name] == "fails"


def test_a_claim_is_mixed_where_some_measurements_fail():
    found = everything(bam_shared_kv=0.46)
    assert verdicts(found)["B3"] == "mixed"
    found = everything()
    for one in found["real"]["rows"]:
        if one["arm"] == "spec_code":  # it has forgotten nothing
            one["held_out"] = {task: {"loss": 0.5} for task in one["held_out"]}
    assert verdicts(found)["B2"] == "mixed" and verdicts(found)["B1"] == "mixed"


def test_active_experts_are_not_copies_that_rescue():
    assert verdicts(everything(btx6_top3=0.33))["B11"] == "holds"


def test_what_is_said_beside_dense_training_names_the_updates():
    (claim,) = (c for c in judged(everything()) if c.name == "B14")
    where = "synthetic, 600 updates of the mixture, fewer than 1,500"
    assert [e.where for e in claim.evidence][:2] == [where] * 2


def test_caches_are_judged_exactly():
    measured = measure.cache_bytes()
    assert verdicts({"caches": measured})["B12"] == "holds"
    measured["expert_kv"][1] += 4
    assert verdicts({"caches": measured})["B12"] == "mixed"


def test_the_share_of_the_gap_is_of_the_mean_gap():
    results = Runs.of(part())
    closed = claims.gap_closed(results, "bam_averaged")
    assert closed["value"] == pytest.approx((0.45 - 0.36) / (0.45 - 0.31), abs=1e-3)
    assert claims.gap_closed(Runs.of(part(bam=0.6)), "btx6") is None
    (claim,) = (c for c in judged(everything()) if c.name == "B13")
    assert "copies of the average make 0.64" in claim.evidence[0].measured


def test_curves_are_read_by_step_and_a_made_start_stands_for_step_0():
    found = part()
    start = {**row("btx_start", 0, dict.fromkeys(DOMAINS, 3.0)), "step": 0, "curve": []}
    results = Runs.of({**found, "rows": [*found["rows"], start]})
    assert results.at(0).scores("btx", "mean loss").to_dict() == {0: 3.0}
    assert results.steps("btx")[:2] == [50, 100]  # seeds 1 and 2 have no start
    end = results.at(STEPS).values("btx", "mean loss")
    np.testing.assert_allclose(end, results.values("btx", "mean loss"))


def test_the_report_has_every_figure_and_says_what_is_missing(tmp_path):
    found = {name: one for name, one in everything().items() if name != "real"}
    written_claims = page.write(found, tmp_path, FACTS)
    text = (tmp_path / "bam.md").read_text()
    drawn = {path.name for path in (tmp_path / "bam").glob("*.png")}
    assert drawn == {"cache.png", *(f"synthetic_{k}.png" for k in ("loss", "curves", "gates"))}
    assert all(f"](bam/{name})" in text for name in drawn)
    assert "- Missing from this page: all of the part `real`." in text
    written = json.loads((tmp_path / "bam" / "results.json").read_text())
    assert [c["verdict"] for c in written["claims"]] == [c.verdict for c in written_claims]
    assert len(written["parts"]["synthetic"]["runs"]) == len(rows())
    assert written["caches"] == found["caches"]
    assert "lag_4 (1.110)" in text and "600 (`seed`, `btx`" in text


def test_a_report_of_partial_results_names_what_is_missing(tmp_path):
    found = part()
    kept = [r for r in found["rows"] if r["arm"] in ("seed", "btx", "bam", "bam_shared_kv")]
    found["rows"] = [r for r in kept if r["run"] != "bam/seed1" and r["seed"] < 2]
    lost = found["rows"][-1]
    lost["evaluations"] = {}
    by_name = {c.name: c for c in page.write({"synthetic": found}, tmp_path, FACTS)}
    text = (tmp_path / "bam.md").read_text()
    assert "synthetic `bam` (seed 1)" in text and "`spec_lag_4`" in text
    # A seed that has failed wholly is missing all the same, and so is what a run was not evaluated on.
    assert "synthetic all of seed 2, " in text and "seeds 0, 1, 2;" in text
    assert f"synthetic `routing` of `bam_shared_kv` (seed {lost['seed']})" in text
    assert "all of the part `real`" in text and "all of the part `caches`" in text
    assert (
        by_name["B5"].verdict == "holds"
        and "better in 1 of 1 pairs" in by_name["B5"].evidence[0].measured
    )
    assert by_name["B1"].verdict == "not measured"
    page.write({}, tmp_path, FACTS)
    assert "all of the part `synthetic`" in (tmp_path / "bam.md").read_text()


def test_parts_are_swept_with_their_name_and_read_with_floors_curves_and_flops(
    tmp_path, monkeypatch
):
    planned = [
        types.SimpleNamespace(arm=arm, seed=0, made=made, evaluations=names)
        for arm, made, names in (("btx", (), {"routing": {}}), ("soup", ("a",), {"held_out": {}}))
    ]
    monkeypatch.setattr(sweeps, "planned", lambda paper, given: planned)
    sweep = types.ModuleType("launch.papers.bam.sweep")
    sweep.DOMAINS = {"synthetic": ("lag_general", ("lag_4",))}
    sweep.train_flops_per_token = lambda arm, part: {("btx", "synthetic"): 10.0}[arm, part]
    monkeypatch.setitem(sys.modules, "launch.papers.bam.sweep", sweep)
    asked = []

    def swept(*words, **options):
        asked.append((words, options))
        trained = {"run": "btx/seed0", "arm": "btx", "directory": "btx", "tokens": 7}
        return [trained, {"run": "soup/seed0", "arm": "soup", "directory": "soup", "tokens": 0}]

    monkeypatch.setattr(sweeps, "rows", swept)
    directory = tmp_path / "synthetic" / "btx"
    directory.mkdir(parents=True)
    lines = [
        {"step": 5, "eval/lag_4/loss": 1.5, "eval/lag_4/perplexity": 4.5},
        {"step": 6, "loss": 2.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (directory / "run.json").write_text(json.dumps({"parameters": 12}))
    found = measure.run(model_dir=str(tmp_path), seeds=3, workers=2, parts=["synthetic", "caches"])
    assert asked == [((tmp_path / "synthetic", "bam/sweep", "synthetic,3"), {"workers": 2})]
    trained, made = found["synthetic"]["rows"]
    assert trained["curve"] == [(5, {"lag_4": 1.5})] and trained["flops"] == 70.0
    assert found["synthetic"]["planned"] == {
        "btx": {0: ("routing", "held_out")},
        "soup": {0: ("held_out",)},
    }
    assert found["synthetic"]["domains"] == ("lag_general", "lag_4")
    assert (trained["parameters"], made["parameters"]) == (12, None)
    assert made["curve"] == [] and made["flops"] == 0.0
    floors = found["synthetic"]["floors"]
    assert floors["lag_4"] == lag_domains.entropy_floor(lag_domains.DOMAINS["lag_4"])
    assert found["caches"]["dense"] == found["caches"]["shared_kv"]
    assert domain_runs.entropy_floors(["prose"]) == {}


def test_bars_are_over_the_entropy_where_it_is_known():
    known, unknown = (
        figures.excess_bars(Runs.of(part(floors=f)), {"btx": "red", "none": "blue"})
        for f in (FLOORS, {})
    )
    assert known.axes[0].patches[0].get_height() == pytest.approx(0.45 + 0.02, abs=1e-3)
    assert not unknown.axes[0].patches
    assert unknown.axes[0].lines[0].get_ydata()[0] == pytest.approx(1.2 + 0.47, abs=1e-3)
    assert known.axes[0].get_ylabel().startswith("mean loss over the entropy")


def test_the_command_writes_the_report_of_the_parts_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "prepare", lambda: None)
    words = ["bam", f"--model_dir={tmp_path}", f"--out={tmp_path}", "--parts", "caches"]
    assert reproduce.main(words) == 0  # what other parts measure is not asked for
    assert "| **holds** |" in (tmp_path / "bam.md").read_text()


def test_a_part_that_measures_nothing_of_what_must_hold_gives_status_1(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(environment, "prepare", lambda: None)
    found = {name: one for name, one in everything().items() if name != "caches"}
    found["real"]["rows"] = [r for r in found["real"]["rows"] if not r["arm"].startswith("btx6")]
    monkeypatch.setattr(measure, "run", lambda **settings: found)
    monkeypatch.setattr(page, "write", lambda found, out, facts: judged(found))
    words = ["bam", f"--model_dir={tmp_path}", f"--out={tmp_path}", "--parts"]
    assert reproduce.main([*words, "synthetic"]) == 0
    assert reproduce.main([*words, "synthetic", "real"]) == 1
    assert capsys.readouterr().err == "B11 must hold, and part real has not measured it\n"


def test_every_arm_that_is_compared_is_in_the_sweep(monkeypatch):
    sweep = domain_runs.sweep("bam")
    monkeypatch.setattr(sweep, "train_flops_per_token", lambda arm, kind: 1.0)
    planned = sweep.get_config("synthetic,1").arms
    compared = [*arms.BTX, *arms.BAM, *arms.CONTROLS, *map(matched, arms.COSTLY)]
    assert set(compared) | {arms.SEED, *map(arms.specialist, DOMAINS[1:])} <= set(planned)
    assert planned["soup"].evaluations == ("held_out",)
