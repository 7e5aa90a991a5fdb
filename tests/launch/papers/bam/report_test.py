"""The reproduction of BAM: verdicts, the guard against collapsed routers, figures and report on hand-made results."""

import json
import types

import numpy as np
import pytest

from espalier.launch import environment, reproduce
from espalier.launch.papers.bam import experiment, report
from espalier.launch.papers.bam.experiment import Runs, long, matched
from espalier.launch.papers.nexus import lag_domains
from espalier.launch.papers.shared import domain_panels, sweeps
from espalier.launch.papers.shared import domains as domain_runs
from espalier.launch.papers.shared import domains as shared_domains

FACTS = {"command": "a command", "versions": {"jax": "1"}}
DOMAINS = ("lag_general", "lag_4", "lag_7", "lag_11")
FLOORS = {"lag_general": 1.35, "lag_4": 1.11, "lag_7": 1.13, "lag_11": 1.15}
# Mean losses over the floors with which all claims hold.
EXCESS = {
    "seed": 0.9,
    "btx": 0.45,
    "btx6": 0.43,
    "btx6_top3": 0.42,
    "bam": 0.31,
    "bam_shared_kv": 0.37,
    "bam_averaged": 0.36,
    matched("bam"): 0.36,
    matched("bam_shared_kv"): 0.40,
    matched("moa_top2"): 0.44,
    matched("moa_top1"): 0.45,
    long("btx"): 0.2,
    long("bam"): 0.1,
    experiment.DENSE_LONG: 0.3,
}
STEPS, TOKENS = 600, 2048


def row(arm, seed, losses):
    dense = arm in ("seed", experiment.DENSE_LONG) or arm.startswith("spec")
    steps = 465 if arm.endswith("_cm") else 1600 if arm.endswith("_long") else STEPS
    curve = [
        (s, {task: loss + 30 / (s + 10) - 30 / (steps + 10) for task, loss in losses.items()})
        for s in (*range(100, steps, 100), steps)
    ]
    routing = {"domains": {}, "chosen": even(losses), "experts": ["seed", *list(losses)[1:]]}
    return {
        "run": f"{arm}/seed{seed}",
        "arm": arm,
        "seed": seed,
        "parents": [],
        "step": steps,
        "tokens": steps * TOKENS,
        "parameters": 120_000,
        "seconds": 40.0,
        "held_out": {task: {"loss": loss} for task, loss in losses.items()},
        "evaluations": {} if dense else {"routing": routing},
        "curve": curve,
    }


def even(domains, layers=2):
    """First choices that depend on the domain, of routers that are balanced over them."""
    shares = 0.12 + 0.52 * np.eye(len(domains))
    shares = shares / shares.sum(1, keepdims=True)
    return {
        task: {r: [shares[i].tolist()] * layers for r in ("mlp", "attention")}
        for i, task in enumerate(domains)
    }


def part(seeds=5, **changed):
    rows = []
    noise = np.random.default_rng(0)
    for seed in range(10, 10 + seeds):
        for arm, value in {**EXCESS, **changed}.items():
            jitter = 0.02 * (seed - 10) + noise.normal(0, 1e-4)
            losses = {d: FLOORS[d] + value + jitter for d in DOMAINS}
            if arm == "seed":
                losses[DOMAINS[0]] -= 0.7
            rows.append(row(arm, seed, losses))
        for home in DOMAINS[1:]:
            losses = {d: FLOORS[d] + 1.6 + noise.normal(0, 1e-4) for d in DOMAINS}
            losses[home] = FLOORS[home] + 0.1
            rows.append(row(experiment.specialist(home), seed, losses))
    planned = {}
    for one in rows:
        planned.setdefault(one["arm"], {})[one["seed"]] = ("held_out", *one["evaluations"])
    return {"rows": rows, "domains": DOMAINS, "floors": FLOORS, "planned": planned}


def everything(**changed):
    held = {"experts": [2, 4], "dense": [8, 8], "shared_kv": [8, 8], "expert_kv": [16, 32]}
    return {"synthetic": part(**changed), "caches": held}


def judged(measured):
    return {claim.name: claim for claim in report.REPORT.judge(measured)}


def verdicts(measured):
    return {name: claim.verdict for name, claim in judged(measured).items()}


def force_to_one_expert(measured, arm, *, router, layer, seed):
    """Sends 90 % of every domain's tokens to the first expert in one layer."""
    (one,) = (r for r in measured["synthetic"]["rows"] if (r["arm"], r["seed"]) == (arm, seed))
    for table in one["evaluations"]["routing"]["chosen"].values():
        layers = [list(shares) for shares in table[router]]
        layers[layer] = [0.9, 0.1, 0.0, 0.0]
        table[router] = layers


def test_all_claims_hold_where_they_should():
    assert verdicts(everything()) == {claim.name: "holds" for claim in report.CLAIMS}


@pytest.mark.parametrize(
    ("changed", "name", "verdict"),
    [
        ({"bam_shared_kv": 0.46}, "B3", "mixed"),
        ({matched("bam"): 0.5, matched("bam_shared_kv"): 0.47}, "B4", "fails"),
        ({"bam": 0.5}, "B5", "fails"),
        ({matched("bam"): 0.5}, "B6", "fails"),
        ({matched("moa_top2"): 0.2, matched("moa_top1"): 0.1}, "B7", "fails"),
        ({matched("moa_top1"): 0.43}, "B7", "holds"),  # less than the margin ahead of top-2
        ({matched("moa_top2"): 0.2, matched("moa_top1"): 0.1}, "B9", "fails"),
        ({"btx6": 0.33}, "B11", "fails"),
        ({"bam": 0.46}, "B11", "not measured"),  # no gap
        ({"bam_averaged": 0.2}, "B13", "fails"),
        ({"bam_averaged": 0.4}, "B16", "fails"),
        ({experiment.DENSE_LONG: 0.05}, "B14", "fails"),
    ],
)
def test_verdicts_follow_the_losses(changed, name, verdict):
    assert verdicts(everything(**changed))[name] == verdict


@pytest.mark.parametrize(
    ("arm", "router", "unmeasured"),
    [
        ("btx", "mlp", {"B3", "B4", "B5", "B6", "B9", "B11", "B16"}),
        ("bam", "mlp", {"B3", "B5", "B11", "B13", "B16"}),
        (matched("moa_top1"), "attention", {"B7", "B9"}),
        ("btx6_top3", "mlp", set()),  # three experts are active
        ("bam", "attention", set()),  # all attentions are
    ],
)
def test_a_top_1_router_that_sends_all_to_one_expert_in_one_layer_of_two_gives_no_verdict(
    arm, router, unmeasured
):
    measured = everything()
    force_to_one_expert(measured, arm, router=router, layer=1, seed=12)
    found = judged(measured)
    assert {name for name, one in found.items() if one.verdict == "not measured"} == unmeasured
    for name in unmeasured:
        assert any(
            "router of layer 1 sends 0.90 of the tokens" in e.why for e in found[name].effects
        )


def test_a_mixture_without_loads_gives_no_verdict():
    measured = everything()
    for one in measured["synthetic"]["rows"]:
        if one["arm"] == "btx":
            one["evaluations"] = {}
    assert "loads of its FFN router" in judged(measured)["B3"].effects[1].why


def test_the_largest_load_of_a_layer_is_not_averaged_over_layers():
    table = np.array([[[0.25, 0.75], [0.75, 0.25]], [[0.95, 0.05], [0.99, 0.01]]])
    np.testing.assert_allclose(shared_domains.largest_loads(table), [0.5, 0.97])


def test_few_updates_allow_no_conclusion_beside_dense_training():
    measured = everything()
    for one in measured["synthetic"]["rows"]:
        if one["arm"] == long("bam"):
            one["step"] = 600
    first, second = judged(measured)["B14"].effects
    assert first.why == "600 of 1,500 updates" and second.verdict == "holds"


def test_caches_are_judged_exactly():
    measured = experiment.cache_bytes()
    assert verdicts({"caches": measured})["B12"] == "holds"
    measured["expert_kv"][1] += 4
    assert verdicts({"caches": measured})["B12"] != "holds"


def test_curves_are_read_by_step_and_a_made_start_stands_for_step_0():
    measured = part()
    start = {**row("btx_start", 10, dict.fromkeys(DOMAINS, 3.0)), "step": 0, "curve": []}
    results = Runs.of({**measured, "rows": [*measured["rows"], start]})
    assert results.at(0).scores("btx", "mean loss").to_dict() == {10: 3.0}
    assert results.steps("btx")[:2] == [100, 200]  # other seeds have no start
    end = results.at(STEPS).values("btx", "mean loss")
    np.testing.assert_allclose(end, results.values("btx", "mean loss"))


def test_the_report_has_every_figure_and_the_loads_by_layer(tmp_path):
    measured = everything()
    force_to_one_expert(measured, "btx", router="mlp", layer=1, seed=12)
    report.REPORT.write(measured, tmp_path, FACTS)
    text = (tmp_path / "bam.md").read_text()
    drawn = {path.name for path in (tmp_path / "bam").glob("*.png")}
    figures = {f"synthetic_{kind}.png" for kind in ("loss", "loads", "choices", "curves")}
    assert drawn == {"claims.png", "cache.png", *figures}
    assert all(f"](bam/{name})" in text for name in drawn)
    assert "| BTX (`btx`) | FFN | top-1 | 0.25 (0.25) | 0.38 (0.90) |" in text
    assert "lag_4 (1.110)" in text


def test_a_report_of_partial_results_names_what_is_missing(tmp_path):
    measured = part()
    few = [r for r in measured["rows"] if r["arm"] in ("seed", "btx", "bam", "bam_shared_kv")]
    measured["rows"] = [r for r in few if r["run"] != "bam/seed11" and r["seed"] < 14]
    lost = measured["rows"][-1]
    lost["evaluations"] = {}
    by_name = {c.name: c for c in report.REPORT.write({"synthetic": measured}, tmp_path, FACTS)}
    text = (tmp_path / "bam.md").read_text()
    assert "synthetic `bam` (seed 11)" in text and "`spec_lag_4`" in text
    # A seed that has failed wholly is missing all the same, and so are evaluations.
    assert "synthetic all of seed 14, " in text
    assert f"synthetic `routing` of `bam_shared_kv` (seed {lost['seed']})" in text
    assert "all of the part `caches`" in text
    assert by_name["B5"].verdict == by_name["B1"].verdict == "not measured"
    report.REPORT.write({}, tmp_path, FACTS)
    assert "all of the part `synthetic`" in (tmp_path / "bam.md").read_text()


def test_parts_are_swept_with_their_name_and_read_with_floors_and_curves(tmp_path, monkeypatch):
    planned = [
        types.SimpleNamespace(arm=arm, seed=10, made=made, evaluations=names)
        for arm, made, names in (
            ("btx", (), {"routing": {}}),
            ("btx_start", ("a",), {"held_out": {}}),
        )
    ]
    monkeypatch.setattr(sweeps, "planned", lambda paper, text: planned)
    asked = []

    def swept(*words, **options):
        asked.append((words, options))
        trained = {"run": "btx/seed10", "arm": "btx", "directory": "btx", "tokens": 7}
        start = {"run": "s/seed10", "arm": "btx_start", "directory": "s", "tokens": 0}
        return [trained, start]

    monkeypatch.setattr(sweeps, "rows", swept)
    directory = tmp_path / "synthetic" / "btx"
    directory.mkdir(parents=True)
    lines = [
        {"step": 5, "eval/lag_4/loss": 1.5, "eval/lag_4/perplexity": 4.5},
        {"step": 6, "loss": 2.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (directory / "run.json").write_text(json.dumps({"parameters": 12}))
    out = experiment.run(model_dir=str(tmp_path), seeds=3, workers=2, parts=["synthetic", "caches"])
    assert asked == [((tmp_path / "synthetic", "bam/experiment", "synthetic,3"), {"workers": 2})]
    trained, made = out["synthetic"]["rows"]
    assert trained["curve"] == [(5, {"lag_4": 1.5})] and made["curve"] == []
    assert out["synthetic"]["planned"] == {
        "btx": {10: ("routing", "held_out")},
        "btx_start": {10: ("held_out",)},
    }
    assert (trained["parameters"], made["parameters"]) == (12, None)
    floors = out["synthetic"]["floors"]
    assert floors["lag_4"] == lag_domains.entropy_floor(lag_domains.DOMAINS["lag_4"])
    assert out["caches"]["dense"] == out["caches"]["shared_kv"]
    assert domain_runs.entropy_floors(["prose"]) == {}


def test_dots_have_a_row_for_each_arm_that_has_runs():
    drawn = domain_panels.dots(Runs.of(part()), {"btx": "red", "none": "blue"}, "mean loss")
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["BTX"]
    np.testing.assert_allclose(axes.lines[1].get_xdata(), 1.185 + 0.45 + 0.04, atol=1e-3)
    assert domain_panels.dots(Runs.of(part()), {"none": "blue"}, "mean loss") is None


def test_the_command_writes_the_report_of_the_parts_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "prepare", lambda: None)
    words = ["bam", f"--model_dir={tmp_path}", f"--out={tmp_path}", "--parts", "caches"]
    assert reproduce.main(words) == 0  # claims of other parts are not asked for
    assert "| **holds** |" in (tmp_path / "bam.md").read_text()


def test_every_arm_that_is_compared_is_in_the_sweep_and_equal_compute_is_at_the_papers_size(
    monkeypatch,
):
    cost = {arm: 1.0 for arm in experiment.MIXTURES} | {"bam": 4 / 3}
    monkeypatch.setattr(experiment, "paper_flops", lambda arm, context: cost[arm])
    assert (experiment.equal_compute("bam"), experiment.equal_compute("btx")) == (450, 600)
    planned = experiment.get_config("synthetic,5").arms
    twins = [
        *map(matched, (*experiment.BAM, *experiment.CHOSEN)),
        *map(long, experiment.LONG),
        experiment.DENSE_LONG,
    ]
    compared = {*experiment.BTX, *experiment.BAM, *experiment.CONTROLS, *twins, experiment.SEED}
    assert compared | set(map(experiment.specialist, DOMAINS[1:])) <= set(planned)
    assert planned["bam_long"].seeds == (10, 11, 12)


def test_costs_at_the_papers_size_are_those_of_its_layers_with_the_head():
    ratios = [
        experiment.paper_flops(arm, 1024) / experiment.paper_flops("btx", 1024)
        for arm in ("bam", "bam_shared_kv")
    ]
    assert 1.25 < ratios[0] < 1.34 and 1.13 < ratios[1] < 1.22
    assert [experiment.equal_compute(arm) for arm in ("bam", "moa_top1")] == [467, 512]
