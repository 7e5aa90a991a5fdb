"""The reproduction of MoV and MoLORA: rows, verdicts, figures and report on hand-made results."""

import collections
import json
import re
import types

import numpy as np
import pytest

from espalier.data.instructions import templates
from espalier.launch.papers.mov import compositions, evaluations, experiment, report, rows, runs
from espalier.launch.papers.shared import sweeps
from espalier.trainers.checkpoints import step_dir
from tests.launch.papers.judged import verdict_of

FACTS = {"command": "a command", "versions": {"jax": "1"}}
TASKS = ("reverse_shift1", "shift1_reverse", "rotate_shift2")
# Scores with which all claims hold.
SCORES = {
    "base": 0.30,
    "full": 0.82,
    "ia3": 0.45,
    "lora4": 0.55,
    "lora45": 0.60,
    "mov10": 0.78,
    "mov30": 0.80,
    "molora10": 0.81,
    "mov10_top1": 0.55,
    "mov10_sentence": 0.60,
}
NARROW = {"base": 0.28, "full": 0.70, "ia3": 0.40, "mov10": 0.50}
FIRST = sweeps.FIRST_SEED


def measured(apart=0.1, seeds=5, narrow=NARROW, **changed):
    """Rows as `experiment.run` has them, each seed a little different."""
    noise, out = np.random.default_rng(0), []
    by_width = {"64": narrow, "128": {**SCORES, **changed}}
    for seed in range(FIRST, FIRST + seeds):
        for width, scores in by_width.items():
            for arm, value in scores.items():
                score = value + 0.005 * (seed - FIRST) + float(noise.normal(0, 1e-4))
                task = {"accuracy": score, "probability": score, "log_probability": np.log(score)}
                both = {**task, "tasks": dict.fromkeys(TASKS, task)}
                evaluated = {"ranks": {"seen": both, "unseen": both}}
                if arm in runs.ROUTED:
                    evaluated["routing"] = routing(apart + float(noise.normal(0, 1e-4)))
                out.append(
                    {
                        **{"run": f"{arm}/{width}/seed{seed}", "arm": arm, "size": width},
                        **{"seed": seed, "seconds": 60.0, "step": 500, "tokens": 1000},
                        **{"evaluations": evaluated, "parameters": 1000 * int(width)},
                        **{"trained_parameters": 100, "trained_loss": 0.1},
                    }
                )
    return {"operations": out}


def routing(apart):
    even = [[0.5, 0.5]] * 4
    chosen = {task: {"mlp": even, "attention": even} for task in TASKS[1:]}
    layers = [{"tasks": 0.1 + apart, "wordings": 0.1, "rows": 0.1}] * 4
    return {"chosen": chosen, "distances": dict.fromkeys(evaluations.KINDS, layers)}


def by_name(found):
    return {one.name: one for one in report.REPORT.judge(found)}


def judged(**changed):
    return by_name(measured(**changed))


def test_all_claims_hold_where_they_should():
    found = {name: claim.verdict for name, claim in judged().items()}
    assert found == {claim.name: "holds" for claim in report.CLAIMS}


@pytest.mark.parametrize(
    ("changed", "name", "verdict"),
    [
        ({"mov10": 0.44}, "M1", "fails"),
        ({"mov10": 0.62}, "M2", "fails"),
        ({"molora10": 0.54}, "M3", "fails"),
        ({"mov10_top1": 0.79}, "M4", "fails"),
        ({"molora10": 0.75}, "M5", "fails"),
        ({"mov10": 0.74}, "M6", "fails"),
        ({"lora4": 0.79}, "M7", "fails"),
        ({"narrow": {**NARROW, "mov10": 0.79}}, "M8", "fails"),
        ({"lora45": 0.83}, "M9", "fails"),
        ({"mov10_sentence": 0.79}, "M10", "fails"),
        ({"apart": 0.01}, "M11", "fails"),
    ],
)
def test_each_claim_is_judged_by_its_arms(changed, name, verdict):
    assert verdict_of(report.REPORT, measured(**changed), name) == verdict


def test_reach_is_a_share_of_what_full_tuning_gains():
    (claim,) = (one for one in report.REPORT.judge(measured()) if one.name == "M5")
    assert claim.range["value"] == pytest.approx((0.81 - 0.82) / (0.82 - 0.30), abs=0.001)


def test_an_adapter_that_is_as_good_as_full_tuning_leaves_nothing_to_gain():
    found = judged(ia3=0.76)
    assert found["M1"].verdict == found["M2"].verdict == found["M8"].verdict == "not measured"
    assert "(IA)3 has 0.9" in found["M1"].why and "width 128" in found["M1"].why
    assert found["M3"].verdict == "holds"
    # Where all models guess, they are not compared.
    guessing = dict.fromkeys(SCORES, 0.26)
    assert judged(**guessing)["M3"].why == "all arms are at the floor of probability"


def test_a_frozen_model_that_never_learned_and_a_collapsed_router_give_no_verdict():
    rows_ = measured(seeds=6)["operations"]

    def without(width, *seeds):
        changed = [
            {**row, "trained_loss": 0.7}
            if row["arm"] == "base" and row["seed"] in seeds and row["size"] == width
            else row
            for row in rows_
        ]
        return by_name({"operations": changed})

    one_less = without("128", FIRST + 2)["M1"]
    assert one_less.verdict == "holds"
    assert sorted(one_less.primary.by_seed) == [FIRST + i for i in (0, 1, 3, 4, 5)]
    verdicts = {name: claim.verdict for name, claim in without("128", FIRST, FIRST + 1).items()}
    assert set(verdicts.values()) == {"not measured"}
    narrow = {name: claim.verdict for name, claim in without("64", FIRST, FIRST + 1).items()}
    assert narrow["M8"] == "not measured" and narrow["M1"] == "holds"
    one = [[0.9, 0.1]] * 4
    collapsed = {task: {"mlp": one, "attention": one} for task in TASKS}
    for row in rows_:
        if row["arm"] in ("mov10_top1", "mov30"):
            row["evaluations"]["routing"]["chosen"] = collapsed
    found = {name: one.verdict for name, one in by_name({"operations": rows_}).items()}
    assert found["M4"] == "not measured" and found["M1"] == found["M6"] == "holds"


def test_shuffled_arms_leave_no_claim():
    held, rows = collections.Counter(), measured()
    for draw in range(20):
        shuffled = report.REPORT.shuffle(rows, np.random.default_rng(draw))
        for claim in report.REPORT.judge(shuffled, secondary=False):
            held[claim.name] += claim.verdict == "holds"
    assert max(held.values()) <= 3, held


def test_the_report_has_every_figure_and_names_what_is_missing(tmp_path):
    found = measured()
    one = [[0.9, 0.1]] * 4
    for row in found["operations"]:
        if row["arm"] == "mov30":
            row["evaluations"]["routing"]["chosen"] = {
                task: {"mlp": one, "attention": one} for task in TASKS
            }
    report.REPORT.write(found, tmp_path, FACTS)
    text = (tmp_path / "mov.md").read_text()
    drawn = {path.name for path in (tmp_path / "mov").glob("*.png")}
    kinds = ("scores", "sizes", "paper_sizes", "tasks", "specialisation", "choices", "loads")
    assert drawn == {"claims.png", *(f"{kind}.png" for kind in kinds)}
    assert all(f"](mov/{name})" in text for name in drawn)
    assert "| MoLORA-15 | 8.26 | 4.42 | 2.26 | 4.69 (3B) |" in text
    assert "| MoV-30 | 51.22 | 60.61 | 62.22 |" in text
    assert "| MoV-10, top-1 (`mov10_top1`) | FFN | top-1 | 0.50 (0.50) |" in text
    assert "mean over seeds: MoV-30, FFN router of layer 0 (0.90); MoV-30, FFN router of" in text
    written = json.loads((tmp_path / "mov" / "results.json").read_text())
    headline = written["headline"]
    assert (headline["value"], headline["word"]) == (pytest.approx(33.0, abs=0.1), "reproduced")
    some = [row for row in measured()["operations"] if row["arm"] in ("base", "ia3", "full")]
    found = by_name({"operations": some})
    assert found["M1"].verdict == found["M2"].verdict == "not measured"
    missing = report.REPORT.setup(report.REPORT.read({"operations": some}))[-1]
    assert missing.startswith("- Missing") and "`molora10`" in missing
    assert report.draw({}) == {}


def test_a_row_has_the_parameters_of_its_adapters_or_of_the_whole_model(tmp_path, monkeypatch):
    arrays = {"params/decoder/layers/block_0/mlp/down/kernel": (2, 3, 4), "opt_state/mu": (9,)}
    monkeypatch.setattr(step_dir, "resolve", lambda path: path)
    row = {"run": "a/seed10", "arm": "a", "seed": 10, "step": 5, "tokens": 9, "evaluations": {}}
    row["held_out"] = {"one": {"loss": 1.0}, "two": {"loss": 2.0}}
    counts = []
    for own in (
        {},
        {"params/decoder/layers/block_0/mlp/down/adapter_mov/router/kernel": (2, 3, 5)},
    ):
        entries = {name: types.SimpleNamespace(shape=x) for name, x in (arrays | own).items()}
        manifest = types.SimpleNamespace(arrays=entries)
        monkeypatch.setattr(step_dir, "read_manifest", lambda path, manifest=manifest: manifest)
        done = experiment.completed(row, tmp_path)
        counts.append((done["parameters"], done["trained_parameters"]))
        assert done["trained_loss"] == 1.5
    assert counts == [(24, 24), (24, 30)]
    made = experiment.completed({**row, "step": 0, "held_out": {}}, tmp_path)
    assert "parameters" not in made and made["trained_loss"] is None


def test_every_arm_that_is_compared_is_in_the_sweep():
    planned = {run.arm: run for run in sweeps.planned("mov/experiment", "1") if run.size == "128"}
    assert set(planned) == {"rows", "pretrained", "single", runs.BASE, *runs.TUNED}
    routed = {arm for arm, run in planned.items() if "routing" in run.evaluations}
    assert routed == set(runs.ROUTED)
    every = sweeps.planned("mov/experiment", experiment.SEEDS[-1])
    assert {run.seed for run in every} == set(range(25, 37))
    narrow = {run.arm for run in every if run.size == "64" and run.evaluations}
    assert narrow == {runs.BASE, *runs.BY_WIDTH}


def test_rows_have_the_right_choice_and_templates_that_read_them(tmp_path, monkeypatch):
    for name in ("FIRST_ROWS", "TRAIN_ROWS", "VALIDATION_ROWS"):
        monkeypatch.setattr(rows, name, 3)
    rows.write(tmp_path, 0)
    words = (*rows.KNOWN_WORDS.items(), *rows.NEW_WORDS.items())
    operations = {word: letter for letter, word in words}
    assert len(operations) == len(words) == 2 * len(compositions.OPERATIONS)
    unseen = compositions.split_pairs(0)[1]
    for name in (rows.SINGLE, rows.KNOWN, rows.PAIRS):
        lines = (tmp_path / name / "validation.jsonl").read_text().splitlines()
        assert len(lines) == 3 + (name == rows.KNOWN)  # and one of a single operation
        for line in lines:
            row = json.loads(line)
            numbers = np.array([*map(compositions.LETTERS.index, row["letters"][::2])])
            assert row["letters"][1::2] == "1234"
            assert set(re.findall("..", row["letters"])) <= {*rows.pieces()}
            pair = operations[row["first"]], operations[row["second"]]
            known = {row["first"], row["second"]} <= {*rows.KNOWN_WORDS.values()}
            alone = pair[1] == compositions.COPY
            assert known == (name in (rows.SINGLE, rows.KNOWN)) or (alone and name == rows.KNOWN)
            assert row["choices"][row["label"]] == rows.text(compositions.solve(pair, numbers))
            assert name != rows.PAIRS or pair not in unseen
            assert len(set(row["choices"])) == len(row["choices"]) == rows.CHOICES
    made = templates.read(tmp_path / rows.FOLDER / "templates.yaml")
    assert {each.name for each in made} == {*rows.TEMPLATES}
    assert all(each.original_task for each in made)
    (after,) = (each for each in made if each.name == "after")
    ((_, rendered),) = after.render([templates.Row("r", "a row", row)])
    assert rendered.inputs == f"{row['second']} after {row['first']} of {row['letters']}"
    assert rendered.target == row["choices"][row["label"]] and len(rendered.choices) == 4
