"""The reproduction of BAM: verdicts, the guard against collapsed routers, figures and report on hand-made results."""

import json
import types

import numpy as np
import pytest

from espalier.launch.papers.bam import experiment, figures, report
from espalier.launch.papers.bam.experiment import Runs, biased, long, matched, wide
from espalier.launch.papers.nexus import lag_domains
from espalier.launch.papers.shared import domain_panels, results, sweeps
from espalier.launch.papers.shared import domains as domain_runs
from tests.launch.papers.judged import verdict_of

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
AT_WIDTHS = {
    wide(arm, width): EXCESS[arm] for width in experiment.WIDTHS for arm in ("seed", "btx", "bam")
}
BALANCED = {arm: EXCESS[arm] for arm in ("seed", "btx", "bam")}
BALANCED |= {biased(arm): EXCESS[arm] for arm in ("btx", "bam")}
ON_TEXT = {arm: EXCESS[arm] for arm in ("seed", "btx", "bam")} | {experiment.DENSE: 0.3}
# Seconds of each thing that is timed.
SECONDS = {"dense": 2.0, "btx": 2.2, "bam": 2.8, "bam_shared_kv": 2.7}
STEPS, TOKENS = 600, 2048


def row(arm, seed, losses):
    dense = arm.startswith(("seed", "dense", "spec"))
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


def part(seeds=5, excess=EXCESS, special=DOMAINS[1:], **changed):
    rows = []
    noise = np.random.default_rng(0)
    for seed in range(20, 20 + seeds):
        for arm, value in {**excess, **changed}.items():
            jitter = 0.02 * (seed - 20) + noise.normal(0, 1e-4)
            losses = {d: FLOORS[d] + value + jitter for d in DOMAINS}
            if arm == "seed":
                losses[DOMAINS[0]] -= 0.7
            rows.append(row(arm, seed, losses))
        for home in special:
            losses = {d: FLOORS[d] + 1.6 + noise.normal(0, 1e-4) for d in DOMAINS}
            losses[home] = FLOORS[home] + 0.1
            rows.append(row(experiment.specialist(home), seed, losses))
    planned = {}
    for one in rows:
        planned.setdefault(one["arm"], {})[one["seed"]] = ("held_out", *one["evaluations"])
    return {"rows": rows, "domains": DOMAINS, "floors": FLOORS, "planned": planned}


def everything(**changed):
    of_text = {arm[5:]: value for arm, value in changed.items() if arm.startswith("text_")}
    of_sizes = {arm: value for arm, value in changed.items() if arm in AT_WIDTHS}
    of_biases = {arm: value for arm, value in changed.items() if arm.endswith("_bias")}
    changed = {k: v for k, v in changed.items() if k in EXCESS}
    return {
        "synthetic": part(**changed),
        "text": part(excess=ON_TEXT, **of_text),
        "sizes": part(excess=AT_WIDTHS, special=(), **of_sizes),
        "balance": part(excess=BALANCED, special=(), **of_biases),
        "latency": timed(),
    }


def timed(**changed):
    """Five sessions, each a little slower than the one before."""
    seconds = {**SECONDS, **changed}
    return {
        str(seed): {
            "settings": {},
            "seconds": 60.0,
            "result": {
                arm: dict.fromkeys(("read", "generate", "score"), (1 + 0.01 * (seed - 20)) * x)
                | {"parameters": 10}
                for arm, x in seconds.items()
            }
            | {"device": "cpu"},
        }
        for seed in range(20, 25)
    }


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
        ({"bam": 0.46}, "B3", "fails"),
        ({"bam_shared_kv": 0.3}, "B8", "fails"),
        ({matched("bam"): 0.5}, "B4", "fails"),
        ({"btx6_top3": 0.3}, "B5", "fails"),
        ({"bam": 0.5}, "B5", "fails"),
        ({matched("bam"): 0.5}, "B6", "fails"),
        ({matched("moa_top2"): 0.2, matched("moa_top1"): 0.1}, "B7", "fails"),
        ({matched("moa_top2"): 0.2, matched("moa_top1"): 0.1}, "B9", "holds"),  # better than BTX
        ({matched("moa_top2"): 0.6, matched("moa_top1"): 0.6}, "B9", "fails"),
        ({wide("bam", 128): 0.5}, "B17", "fails"),
        ({wide("bam", 32): 0.5}, "B17", "holds"),  # shown, and does not judge
        ({"text_bam": 0.5}, "B18", "fails"),
        ({"btx6": 0.33}, "B11", "fails"),
        ({"bam": 0.46}, "B11", "not measured"),  # no gap
        ({"bam_averaged": 0.2}, "B13", "fails"),
        ({"bam_averaged": 0.4}, "B16", "fails"),
        ({experiment.DENSE_LONG: 0.05}, "B14", "fails"),
        ({biased("bam"): 0.5}, "B20", "fails"),
        ({biased("btx"): 0.5}, "B21", "fails"),
        ({biased("btx"): 0.46}, "B21", "holds"),  # 0.01 nats above
    ],
)
def test_verdicts_follow_the_losses(changed, name, verdict):
    assert verdict_of(report.REPORT, everything(**changed), name) == verdict


@pytest.mark.parametrize(
    ("arm", "router", "unmeasured"),
    [
        ("btx", "mlp", {"B3", "B4", "B9", "B11", "B16"}),
        ("bam", "mlp", {"B3", "B5", "B8", "B11", "B13", "B16"}),
        (matched("moa_top1"), "attention", {"B7", "B9"}),
        ("btx6_top3", "mlp", set()),  # three experts are active
        ("bam", "attention", set()),  # all attentions are
    ],
)
def test_a_top_1_router_that_sends_all_to_one_expert_in_one_layer_of_two_gives_no_verdict(
    arm, router, unmeasured
):
    measured = everything()
    force_to_one_expert(measured, arm, router=router, layer=1, seed=22)
    found = judged(measured)
    assert {name for name, one in found.items() if one.verdict == "not measured"} == unmeasured
    assert all("router of layer 1 sends 0.90 of the tokens" in found[x].why for x in unmeasured)


def test_a_mixture_without_loads_gives_no_verdict():
    measured = everything()
    for one in measured["synthetic"]["rows"]:
        if one["arm"] == "btx":
            one["evaluations"] = {}
    assert "loads of its FFN router" in judged(measured)["B3"].why


def test_the_largest_load_of_a_layer_is_not_averaged_over_layers():
    table = np.array([[[0.25, 0.75], [0.75, 0.25]], [[0.95, 0.05], [0.99, 0.01]]])
    np.testing.assert_allclose(domain_runs.largest_loads(table), [0.5, 0.97])


def test_few_updates_allow_no_conclusion_beside_dense_training():
    measured = everything()
    for one in measured["synthetic"]["rows"]:
        if one["arm"] == long("bam"):
            one["step"] = 600
    assert judged(measured)["B14"].why == "600 of 1,500 updates"


def test_arms_that_have_learned_all_or_nothing_of_one_domain_give_no_verdict():
    for loss, end in ((FLOORS["lag_7"] + 0.01, "floor"), (np.log(48), "ceiling")):
        measured = everything()
        for one in measured["synthetic"]["rows"]:
            one["held_out"]["lag_7"] = {"loss": loss}
        assert judged(measured)["B3"].why == f"all arms are at the {end} of loss on lag 7"


def test_seconds_to_answer_are_compared_by_session():
    measured = everything()
    found = judged(measured)["B19"]
    assert found.range["value"] == pytest.approx(100 * (1 - 2.8 / 2.2)) and found.verdict == "holds"
    shared, own, *_ = found.others
    assert shared.range()["value"] == pytest.approx(100 * (1 - 2.7 / 2.2))
    assert "seconds to read a prompt and generate, BAM below BAM, shared KV" in own.what
    measured["latency"] = timed(bam=3.5)
    assert verdicts(measured)["B19"] == "fails"


def test_the_main_effect_is_in_per_cent_of_mean_perplexity():
    (effect,) = report.HEADLINE.measure(Runs.of(part()), "here")
    btx, bam = (np.mean([np.exp(FLOORS[d] + EXCESS[x]) for d in DOMAINS]) for x in ("btx", "bam"))
    assert effect.range()["value"] == pytest.approx(100 * (1 - bam / btx), abs=0.02)
    assert effect.unit == "%"


def test_an_undecided_claim_asks_for_more_seeds_of_its_own_arms_alone():
    measured = {"synthetic": part()}
    (claim,) = (one for one in report.CLAIMS if one.name == "B3")
    with results.reading() as arms:
        report.REPORT.read(measured)["synthetic"].at(STEPS).scores("btx", "mean loss")
        claim.measure(report.REPORT.read(measured)["synthetic"], "here")
    assert arms == {"btx", "bam"}
    runs = [types.SimpleNamespace(arm=arm, seed=24) for arm in ("btx", "btx6")]
    further = sweeps.Further(3, frozenset(arms))
    assert [further.includes(run) for run in runs] == [True, False]


def test_curves_are_read_by_step_and_a_made_start_stands_for_step_0():
    measured = part()
    start = {**row("btx_start", 20, dict.fromkeys(DOMAINS, 3.0)), "step": 0, "curve": []}
    runs = Runs.of({**measured, "rows": [*measured["rows"], start]})
    assert runs.at(0).scores("btx", "mean loss").to_dict() == {20: 3.0}
    assert runs.steps("btx")[:2] == [100, 200]  # other seeds have no start
    end = runs.at(STEPS).values("btx", "mean loss")
    np.testing.assert_allclose(end, runs.values("btx", "mean loss"))


def test_the_report_has_every_figure_and_the_loads_by_layer(tmp_path):
    measured = everything()
    force_to_one_expert(measured, "btx", router="mlp", layer=1, seed=22)
    report.REPORT.write(measured, tmp_path, FACTS)
    text = (tmp_path / "bam.md").read_text()
    drawn = {path.name for path in (tmp_path / "bam").glob("*.png")}
    kinds = {f"synthetic_{kind}.png" for kind in ("loss", "loads", "choices", "curves")}
    assert drawn == {"claims.png", "text_loss.png", "sizes.png", "latency.png", *kinds}
    assert all(f"](bam/{name})" in text for name in drawn)
    assert "| BTX (`btx`) | FFN | top-1 | 0.25 (0.25) | 0.38 (0.90) |" in text
    assert "lag_4 (1.110)" in text


def test_a_report_of_partial_results_names_what_is_missing(tmp_path, unsaved):
    measured = part()
    few = [r for r in measured["rows"] if r["arm"] in ("seed", "btx", "bam", "bam_shared_kv")]
    measured["rows"] = [r for r in few if r["run"] != "bam/seed21" and r["seed"] < 24]
    lost = measured["rows"][-1]
    lost["evaluations"] = {}
    by_name = {c.name: c for c in report.REPORT.write({"synthetic": measured}, tmp_path, FACTS)}
    text = (tmp_path / "bam.md").read_text()
    assert "synthetic `bam` (seed 21)" in text and "`spec_lag_4`" in text
    # A seed that has failed wholly is missing all the same, and so are evaluations.
    assert "synthetic all of seed 24, " in text
    assert f"synthetic `routing` of `bam_shared_kv` (seed {lost['seed']})" in text
    assert "all of the part `latency`" in text
    assert by_name["B5"].verdict == by_name["B1"].verdict == "not measured"
    report.REPORT.write({}, tmp_path, FACTS)
    assert "all of the part `synthetic`" in (tmp_path / "bam.md").read_text()


def test_parts_are_swept_with_their_name_and_read_with_floors_and_curves(tmp_path, monkeypatch):
    planned = [
        types.SimpleNamespace(arm=arm, seed=20, made=made, evaluations=names)
        for arm, made, names in (
            ("btx", (), {"routing": {}}),
            ("btx_start", ("a",), {"held_out": {}}),
        )
    ]
    monkeypatch.setattr(sweeps, "planned", lambda paper, text: planned)
    asked = []

    def swept(*words, **options):
        asked.append((words, options))
        trained = {"run": "btx/seed20", "arm": "btx", "directory": "btx", "tokens": 7}
        start = {"run": "s/seed20", "arm": "btx_start", "directory": "s", "tokens": 0}
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
    measured = {"dense": {"read": 1.0}}
    monkeypatch.setattr(experiment, "_session", lambda folder, seed: {**measured, "seed": seed})
    parts = ["synthetic", "latency"]
    out = experiment.run(model_dir=str(tmp_path), seeds=3, workers=2, parts=parts)
    assert asked == [((tmp_path / "synthetic", "bam/experiment", "synthetic,3"), {"workers": 2})]
    trained, made = out["synthetic"]["rows"]
    assert trained["curve"] == [(5, {"lag_4": 1.5})] and made["curve"] == []
    assert out["synthetic"]["planned"] == {
        "btx": {20: ("routing", "held_out")},
        "btx_start": {20: ("held_out",)},
    }
    assert (trained["parameters"], made["parameters"]) == (12, None)
    floors = out["synthetic"]["floors"]
    assert floors["lag_4"] == lag_domains.entropy_floor(lag_domains.DOMAINS["lag_4"])
    sessions = out["latency"]
    assert [*sessions] == ["20", "21", "22"] and sessions["21"]["result"]["seed"] == 21
    assert domain_runs.entropy_floors(["prose"]) == {}


def test_dots_have_a_row_for_each_arm_that_has_runs():
    drawn = domain_panels.dots(Runs.of(part()), {"btx": "red", "none": "blue"}, "mean loss")
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["BTX"]
    np.testing.assert_allclose(axes.lines[1].get_xdata(), 1.185 + 0.45 + 0.04, atol=1e-3)
    assert domain_panels.dots(Runs.of(part()), {"none": "blue"}, "mean loss") is None


def test_the_paper_s_sizes_are_on_the_axis_of_ours():
    (axes,) = figures._sizes(Runs.of(part()), Runs.of(everything()["sizes"])).axes
    lines = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert len(lines["here"]) == 3 and list(lines["paper, equal data"]) == [587_209_728, 1.991e9]


def test_every_arm_that_is_compared_is_in_the_sweep_and_equal_compute_is_at_the_papers_size(
    monkeypatch,
):
    cost = {arm: 1.0 for arm in experiment.MIXTURES} | {"bam": 4 / 3}
    monkeypatch.setattr(experiment, "paper_flops", lambda arm, context: cost[arm])
    assert (experiment.equal_compute("bam"), experiment.equal_compute("btx")) == (450, 600)
    planned = experiment.get_config("synthetic,3").arms
    twins = [
        *map(matched, (*experiment.BAM, *experiment.CHOSEN)),
        *map(long, experiment.LONG),
        experiment.DENSE_LONG,
    ]
    compared = {*experiment.BTX, *experiment.BAM, *experiment.CONTROLS, *twins, experiment.SEED}
    assert compared | set(map(experiment.specialist, DOMAINS[1:])) <= set(planned)
    assert {"seed", "btx", "bam", experiment.DENSE} < set(experiment.get_config("text,3").arms)
    assert set(AT_WIDTHS) < set(experiment.get_config("sizes,3").arms)


def test_costs_at_the_papers_size_are_those_of_its_layers_with_the_head():
    ratios = [
        experiment.paper_flops(arm, 1024) / experiment.paper_flops("btx", 1024)
        for arm in ("bam", "bam_shared_kv")
    ]
    assert 1.25 < ratios[0] < 1.34 and 1.13 < ratios[1] < 1.22
    assert [experiment.equal_compute(arm) for arm in ("bam", "moa_top1")] == [467, 512]
