"""The reproduction of Nexus: verdicts, figures and report on hand-made results."""

import json

import numpy as np
import pytest

from launch.papers.nexus import arms, claims, figures, measure, page
from launch.papers.nexus.arms import NEW, OLD
from launch.papers.shared import domains as domain_runs
from launch.papers.shared import sweeps

FACTS = {"command": "a command", "versions": {"jax": "1"}}
DOMAINS = ("lag_general", "lag_4", "lag_5", "lag_7", "lag_9", "lag_15")
REAL = ("prose", "code", "law", "maths", "news")
# Losses on the old domains after upcycling with which all claims hold.
UPCYCLED = {
    "seed": 2.0,
    "merged": 2.3,
    "nexus": 1.65,
    "linear": 1.66,
    "mlp_router": 1.66,
    "nexus_random": 1.70,
    "nexus_one_hot": 1.69,
    "nexus_low": 1.65,
    "linear_low": 1.72,
    "dense_continued": 1.75,
}
# Losses on the new domain at step 0, and on the old ones at the smallest budget.
EXTENDED = {
    "ext_nexus": (3.38, 1.67),
    "ext_linear_append": (3.73, 1.75),
    "ext_linear_reset": (3.96, 1.80),
    "ext_random": (3.6, 1.74),
}
STEPS, TOKENS = 400, 2048


def rows(domains=DOMAINS, seeds=3, own=0.6, attracted=0.15, **changed):
    """Rows of a part as `measure.run` has them, each seed a little different."""
    out = []
    for seed in range(seeds):
        for arm, value in {**UPCYCLED, **changed}.items():
            if arm in EXTENDED:
                continue
            losses = {d: value + 0.02 * seed for d in domains}
            out.append(row(arm, seed, losses, 0 if arm == "merged" else 600))
            if arm in ("nexus", "linear"):
                out[-1]["evaluations"]["routing"] = routing(domains, len(domains) - 2, own)
            if arm == "nexus":
                out[-1]["evaluations"]["structure"] = structure(domains[1:-1], seed)
        for home in domains[1:]:
            losses = {d: 1.3 if d == home else 3.0 for d in domains}
            out.append(row(arms.expert(home), seed, losses, 600))
        for arm in EXTENDED:
            start, old = changed.get(arm, EXTENDED[arm])
            out += extension(arm, seed, domains, start, old, attracted)
    return out


def extension(arm, seed, domains, start, old, attracted):
    """The start, without an update, and the run, whose gaps shrink as 1 / (1 + step / 20)."""
    shift = 0.02 * seed
    curve = []
    for step in range(50, STEPS + 1, 50):
        gap = (start - 3.3) / (1 + step / 20)
        losses = {d: old - 0.08 * (step - 50) / 350 + shift for d in domains[:-1]}
        losses[domains[-1]] = 1.5 + 1.8 / (1 + step / 20) + gap + shift
        curve.append((step, losses))
    made = row(
        arms.start(arm), seed, {**dict.fromkeys(domains, 2.2), domains[-1]: start + shift}, 0
    )
    made["evaluations"]["routing"] = routing(domains, len(domains) - 1, 0.5, attracted)
    trained = row(arm, seed, curve[-1][1], STEPS) | {"curve": curve}
    trained["evaluations"]["routing"] = routing(domains, len(domains) - 1, 0.7)
    return [made, trained]


def row(arm, seed, losses, steps):
    named = {task: {"loss": loss} for task, loss in losses.items()}
    return {
        "run": f"{arm}/seed{seed}",
        "arm": arm,
        "seed": seed,
        "parents": [],
        "step": steps,
        "tokens": steps * TOKENS,
        "parameters": 200_000 if steps else None,
        "seconds": 30.0,
        "held_out": named if steps else {},
        "evaluations": {} if steps else {"held_out": {"tasks": named}},
        "curve": [(steps, losses)] if steps else [],
    }


def routing(domains, experts, own, last=None):
    """Shares of first choices: `own` to the domain's expert, `last` to the last one where it is not that."""
    table = {}
    for i, domain in enumerate(domains):
        shares = np.full(experts, (1 - own) / (experts - 1))
        if i == 0 or i > experts:
            shares = np.full(experts, 1 / experts)
        else:
            shares[i - 1] = own
        if last is not None and i < experts:
            shares[-1] = last
            shares[:-1] *= (1 - last) / shares[:-1].sum()
        table[domain] = {"mlp": [shares.tolist()] * 2}
    return {"domains": table, "chosen": table}


def structure(names, seed, flip=1.0):
    rng = np.random.default_rng(seed)
    cosines = -0.25 + 0.05 * rng.standard_normal((len(names), len(names)))
    cosines[0, 1] = 0.5
    cosines = np.triu(cosines, 1) + np.triu(cosines, 1).T + np.eye(len(names))
    projected = np.where(np.eye(len(names)) == 1, 1.0, flip * 0.8 * cosines - 0.1)
    layers = {"0": projected.tolist(), "1": projected.tolist()}
    return {"domains": list(names), "vectors": cosines.tolist(), "projected": layers}


def part(domains, floors, **changed):
    found = rows(domains, **changed)
    planned = {}
    for one in found:
        routed = ("routing",) if "routing" in one["evaluations"] else ()
        planned.setdefault(one["arm"], {})[one["seed"]] = ("held_out", *routed)
    return {"rows": found, "domains": domains, "floors": floors, "planned": planned}


def everything(**changed):
    return {
        "synthetic": part(DOMAINS, dict.fromkeys(DOMAINS, 1.2), **changed),
        "real": part(REAL, {}, **changed),
    }


def judged(found):
    return page.REPORT.judge(found)


def verdicts(found):
    return {claim.name: claim.verdict for claim in judged(found)}


def test_all_claims_hold_where_they_should():
    found = verdicts(everything())
    assert list(found) == [f"N{n}" for n in range(1, 20)]
    assert {name: v for name, v in found.items() if v != "holds"} == {}


@pytest.mark.parametrize(
    ("changed", "name", "verdict"),
    [
        ({"nexus": 1.7}, "N1", "fails"),
        ({"seed": 1.5, "merged": 1.4}, "N2", "fails"),
        ({"nexus": 1.66}, "N3", "fails"),
        ({"nexus": 1.66}, "N1", "holds"),
        ({"ext_nexus": (4.2, 1.7)}, "N4", "fails"),
        ({"ext_nexus": (4.2, 1.7)}, "N5", "fails"),
        ({"ext_nexus": (4.2, 1.7)}, "N7", "fails"),
        ({"ext_nexus": (3.96, 1.7)}, "N6", "fails"),
        ({"ext_linear_append": (3.1, 1.7)}, "N8", "fails"),
        ({"ext_nexus": (3.38, 1.9)}, "N9", "fails"),
        ({"ext_nexus": (3.38, 1.70)}, "N9", "mixed"),  # at the smallest budget
        ({"ext_nexus": (3.38, 1.78)}, "N10", "mixed"),
        ({"own": 0.1}, "N11", "fails"),
        ({"attracted": 0.7}, "N13", "fails"),
        ({"linear_low": 1.6}, "N15", "fails"),
        ({"nexus_low": 1.7}, "N16", "fails"),
        ({"nexus_random": 1.6}, "N17", "mixed"),
        ({"mlp_router": 1.6}, "N18", "fails"),
        ({"dense_continued": 1.5}, "N19", "fails"),
    ],
)
def test_each_claim_is_judged_by_its_arms(changed, name, verdict):
    assert verdicts(everything(**changed))[name] == verdict


def test_the_new_expert_must_take_most_of_its_domain_in_every_seed():
    found = everything()
    for one in found["synthetic"]["rows"]:
        if one["run"] == "ext_nexus_start/seed1":
            tables = one["evaluations"]["routing"]["chosen"]
            tables[DOMAINS[-1]]["mlp"] = [[0.6, 0.1, 0.1, 0.1, 0.1]] * 2
    by_name = {claim.name: claim for claim in judged(found)}
    assert by_name["N12"].verdict == "mixed"
    assert "the largest in 2 of 3 seeds" in by_name["N12"].evidence[0].measured
    assert "row appended, extended 0.50" in by_name["N12"].evidence[0].measured


def test_structure_is_judged_by_rank_and_by_the_related_pair():
    found = everything()
    for part, domains in (("synthetic", DOMAINS), ("real", REAL)):
        for one in found[part]["rows"]:
            if one["arm"] == "nexus":
                one["evaluations"]["structure"] = structure(domains[1:-1], one["seed"], flip=-1.0)
    assert verdicts(found)["N14"] == "fails"
    (claim,) = (c for c in judged(everything()) if c.name == "N14")
    assert [e.where for e in claim.evidence] == ["synthetic"] * 2  # three experts are too few
    assert claims.related_pair(["lag_7", "lag_4", "lag_5"]) == (1, 2)
    assert claims.related_pair(["lag_5", "lag_7"]) is None
    assert claims.related_pair(["code", "law"]) is None


def test_over_attraction_is_of_all_old_domains():
    (claim,) = (c for c in judged(everything(attracted=0.3)) if c.name == "N13")
    assert (
        "over-attraction: 0.30 [0.30, 0.30] of the old domains' tokens, 0.50"
        in claim.evidence[0].measured
    )
    assert "z-loss" not in claim.evidence[0].measured  # which no run had


def test_what_a_z_loss_does_to_the_new_expert_stands_beside_it_and_judges_nothing():
    found = everything(attracted=0.3)
    for seed in range(3):
        made = row("ext_nexus_z_loss_start", seed, dict.fromkeys(DOMAINS, 2.2), 0)
        made["evaluations"]["routing"] = routing(DOMAINS, len(DOMAINS) - 1, 0.5, 0.9)
        found["synthetic"]["rows"].append(made)
    (claim,) = (c for c in judged(found) if c.name == "N13")
    told = claim.evidence[0].measured
    assert "0.30 [0.30, 0.30] of the old domains' tokens" in told
    assert told.endswith(
        "with a router z-loss of 0.001 before the extension 0.90 [0.90, 0.90] and 0.50 [0.50, 0.50]"
    )
    assert claim.verdict == "holds"


def test_scores_at_a_budget_are_those_of_the_one_run_and_step_0_those_of_its_start():
    results = arms.Runs.of(everything()["synthetic"])
    assert results.steps("ext_nexus")[:3] == [0, 50, 100]
    np.testing.assert_allclose(results.at(0).values("ext_nexus", NEW), [3.38, 3.40, 3.42])
    np.testing.assert_allclose(results.at(50).values("ext_nexus", OLD), [1.67, 1.69, 1.71])
    assert results.at(50).values("nexus", OLD).size == 0


def test_the_report_has_every_figure_and_says_what_is_missing(tmp_path):
    found = everything()
    written_claims = page.write({"synthetic": found["synthetic"]}, tmp_path, FACTS)
    text = (tmp_path / "nexus.md").read_text()
    drawn = {path.name for path in (tmp_path / "nexus").glob("*.png")}
    kinds = ("extension", "routing", "cosines", "balance", "loss")
    assert drawn == {f"synthetic_{kind}.png" for kind in kinds}
    assert all(f"](nexus/{name})" in text for name in drawn)
    assert "- Missing from this page: all of the part `real`." in text
    written = json.loads((tmp_path / "nexus" / "results.json").read_text())
    assert [c["verdict"] for c in written["claims"]] == [c.verdict for c in written_claims]


def test_a_report_of_partial_results_names_what_is_missing(tmp_path):
    found = part(DOMAINS, {})
    kept = [r for r in found["rows"] if r["arm"] in ("seed", "nexus", "linear")]
    partial = {"synthetic": {**found, "rows": kept}}
    by_name = {claim.name: claim for claim in page.write(partial, tmp_path, FACTS)}
    text = (tmp_path / "nexus.md").read_text()
    assert "synthetic `ext_nexus`," in text and "synthetic `ext_nexus_start`," in text
    assert "all of the part `real`" in text
    assert by_name["N1"].verdict == "holds" and by_name["N4"].verdict == "not measured"
    assert by_name["N2"].verdict == "holds" and len(by_name["N2"].evidence) == 2
    drawn = {path.name for path in (tmp_path / "nexus").glob("*.png")}
    assert drawn == {"synthetic_cosines.png", "synthetic_loss.png"}
    page.write({}, tmp_path, FACTS)
    assert "all of the part `synthetic`" in (tmp_path / "nexus.md").read_text()


def test_parts_are_those_that_are_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        domain_runs,
        "part",
        lambda *words, **options: asked.append((words, options)) or {},
    )
    measure.run(model_dir=str(tmp_path), seeds=5, minutes=3, parts=["real"])
    assert asked == [(("nexus", "real", str(tmp_path), 5), {"minutes": 3})]
    assert figures.figures({}) == {}


def test_every_arm_that_is_compared_is_in_the_sweep():
    planned = {run.arm: run for run in sweeps.planned("nexus/sweep", "synthetic,1")}
    starts = [arms.start(arm) for arm in arms.EXTENSIONS]
    compared = [arms.SEED, arms.MERGED, arms.CONTINUED, *arms.ROUTERS, *arms.LOW, *arms.EXTENSIONS]
    assert {*compared, *starts, *map(arms.expert, DOMAINS[1:])} <= set(planned)
    assert all(set(planned[arm].evaluations) == {"held_out", "routing"} for arm in starts)


def test_the_start_of_an_extension_stands_on_a_logarithmic_axis():
    results = arms.Runs.of(everything()["synthetic"])
    axes = figures._extension(results).axes[0]
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels[:3] == ["0", "102", "205"]
    assert axes.get_xticks()[0] == pytest.approx(25 * TOKENS / 1e3)
