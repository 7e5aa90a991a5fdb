"""The Aya 23 reproduction: verdicts and report on hand-made results, its sweep and stages as gin has them."""

import json

import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.launch.papers.aya23 import experiment, report, toy_languages
from espalier.launch.papers.aya23.fertility import LANGUAGES, TOTAL, Ranked
from espalier.launch.sweep import file

SWEEP = "launch/papers/aya23/experiment.py"
FACTS = {"command": "a command", "versions": {"jax": "1"}}
FULL = "t5x_configs/experiments/aya23/full/"


def loss_of(arm):
    """A loss with which all claims hold."""
    if arm.startswith("languages"):
        count, width, *few = arm.removeprefix("languages").split("_")
        cost = 0.3 if width == "narrow" else 0.1
        lowest = 1.6 if width == "narrow" else 1.2
        return lowest + cost * np.log2(int(count) / 4) + (0.7 if few else 0.0)
    return {"gelu": 1.402, "sequential": 1.398, "kv1": 1.405}.get(arm, 1.4)


def answers_of(arm, shift):
    """Losses of answers by task, and the shares of right ones, with which all claims hold."""
    loss = 1.5 if arm.startswith("scratch") else 0.5
    losses = {
        task: loss + shift + (2.0 if "plain" in task else 0.0) + (0.2 if "translate" in task else 0)
        for task in toy_languages.instruction_tasks()
    }
    return losses, {"copy": 0.9 - loss / 2, "translate": 0.8 - loss / 2}


def rows(seeds=5):
    """Rows of the sweep as `experiment.run` has them, each seed and arm a little different."""
    out, rng = [], np.random.default_rng(0)
    for run in file.read(f"{SWEEP}:{seeds}"):
        row = {"run": run.name, "arm": run.arm, "seed": run.seed, "seconds": 30.0, "step": 800}
        row |= {"evaluations": {}, "parents": [run.parent] if run.parent else [], "tokens": 1e6}
        shift = 0.01 * (run.seed - 22)
        if run.evaluations:
            losses, right = answers_of(run.arm, shift + 0.01 * rng.normal())
            row |= {"evaluations": {"answers": right}, "held_out": losses}
            row |= {"curve": [(200, 0.5)]}
        else:
            loss = loss_of(run.arm) + shift + 0.001 * rng.normal()
            row |= {"held_out": {f"toy_{i}": loss for i in range(4)}}
            row |= {"curve": [(150, loss + 1), (600, loss)]}
        out.append(row)
    return out


def parities(seeds=5):
    out = {}
    for seed in range(20, 20 + seeds):
        balanced = {code: 1 + 0.05 * i for i, code in enumerate(LANGUAGES)}
        raw = {code: 1 + (0.1 + 0.01 * (seed - 10)) * i for i, code in enumerate(LANGUAGES)}
        out[str(seed)] = {
            name: {**one, "spread": np.std(np.log(list(one.values())), ddof=1)}
            for name, one in (("raw", raw), ("balanced", balanced))
        } | {"seconds": 3.0}
    return out


def everything():
    return {"toy": rows(), "fertility": parities()}


def verdicts(found):
    return {claim.name: claim.verdict for claim in report.REPORT.judge(found)}


def change(found, arm, loss):
    for row in found["toy"]:
        if row["arm"] == arm:
            value = loss + 0.001 * row["seed"]
            row["held_out"] = {f"toy_{i}": value for i in range(4)}


def test_all_claims_hold_where_they_should():
    found = verdicts(everything())
    assert found == {f"Y{n}": "holds" for n in range(1, 9)}
    required = {claim.name for claim in report.REPORT.claims if claim.required}
    assert required == {"Y1", "Y2", "Y3", "Y5", "Y6", "Y7"}


def test_claims_fail_where_their_primary_effect_does():
    found = everything()
    for width in experiment.WIDTHS:
        for count in (8, 16):
            more = (
                0.02 if width == "narrow" else 0.04
            )  # a cost that is no cost, and more of the wide model
            change(found, experiment.breadth(count, width), loss_of(f"languages4_{width}") + more)
    change(found, "sequential", 1.3)
    change(found, "gelu", 1.3)
    change(found, "kv1", 1.5)
    for row in found["toy"]:
        if row["arm"] in experiment.TUNED:
            loss = 0.1 if row["arm"] == "scratch" else 0.5
            row["held_out"] = {task: loss + 0.001 * row["seed"] for task in row["held_out"]}
    found["fertility"] = {
        seed: {"raw": one["balanced"], "balanced": one["raw"]} for seed, one in parities().items()
    }
    assert verdicts(found) == {f"Y{n}": "fails" for n in range(1, 9)}


def test_models_that_have_not_learned_give_no_verdict():
    found = everything()
    change(found, experiment.breadth(16, "narrow"), 4.0)
    judged = {claim.name: claim for claim in report.REPORT.judge(found)}
    assert judged["Y2"].verdict == judged["Y1"].verdict == "not measured"
    assert "it has not learned" in judged["Y2"].why
    assert verdicts({**everything(), "toy": rows(seeds=3)})["Y1"] == "not measured"


def test_a_kind_of_instruction_that_no_arm_learns_gives_no_verdict():
    found = everything()
    for row in found["toy"]:
        if row["arm"] in experiment.TUNED:
            row["held_out"] |= {task: 4.0 for task in row["held_out"] if "translate" in task}
    judged = {claim.name: claim for claim in report.REPORT.judge(found)}
    assert judged["Y3"].verdict == "not measured"
    assert judged["Y3"].why == "all arms are at the ceiling of loss of the answers, translations"


def test_scores_of_answers_are_means_of_copies_and_translations():
    losses = {"toy_copy_0": 1.0, "toy_copy_1": 3.0, "toy_translate_0_1": 4.0}
    losses |= {"toy_plain_copy_0": 6.0, "toy_plain_translate_0_1": 8.0}
    row = {"arm": "tuned", "seed": 20, "held_out": losses}
    row["evaluations"] = {"answers": {"copy": 0.5, "translate": 0.25}}
    scores = experiment.Runs([row]).row_scores(row)
    assert [scores[name] for name in experiment.SCORES] == [3.0, 7.0, 0.375]
    assert scores[experiment.part_of(experiment.ANSWERS, "copy")] == 2.0
    unasked = experiment.Runs([row]).row_scores({**row, "evaluations": {}})
    assert unasked[experiment.RIGHT] is None


def test_the_report_has_every_figure(tmp_path):
    report.REPORT.write(everything(), tmp_path, FACTS)
    text = (tmp_path / "aya23.md").read_text()
    drawn = {path.name for path in (tmp_path / "aya23").glob("*.png")}
    names = ("claims", "languages", "blocks", "answers", "fertility")
    assert drawn == {f"{name}.png" for name in names} and "Missing" not in text
    written = json.loads((tmp_path / "aya23" / "results.json").read_text())
    assert verdicts(written["measured"]) == verdicts(everything())


def test_a_report_of_partial_results_names_what_is_missing(tmp_path, unsaved):
    partial = [row for row in rows() if row["arm"] in ("base", "gelu")]
    report.REPORT.write({"toy": partial}, tmp_path, FACTS)
    text = (tmp_path / "aya23.md").read_text()
    assert "`sequential`" in text and "all of the part `fertility`" in text


def test_a_row_is_read_with_its_losses_and_curve(tmp_path):
    lines = [
        {"step": 150, "eval/toy_0/loss": 2.0, "eval/toy_1/loss": 4.0},
        {"step": 150, "loss": 9.0},
        {"step": 800, "eval/toy_0/loss": 1.0, "eval/toy_1/loss": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    held_out = {"toy_0": {"loss": 1.0, "perplexity": 2.7}}
    row = experiment.with_losses({"arm": "base", "held_out": held_out, "log": "x"}, tmp_path)
    assert row["curve"] == [(150, 3.0), (800, 2.0)] and row["held_out"] == {"toy_0": 1.0}
    assert "log" not in row


def test_amounts_of_text_fall_with_the_rank():
    order = ("lang_cs", "lang_hi", "lang_ja")
    falling, even = (Ranked(corpus=None, order=order, exponent=x) for x in (1.0, 0.0))
    sizes = [falling.size(source) for source in order]
    assert sizes[0] == pytest.approx(2 * sizes[1], abs=3) == pytest.approx(3 * sizes[2], abs=3)
    assert sum(sizes) == pytest.approx(TOTAL, abs=2) == 3 * even.size("lang_ja")


def test_arms_of_the_sweep_are_valid_configurations_that_differ_in_what_they_say():
    runs = {run.arm: run for run in file.read(f"{SWEEP}:1")}
    assert len(runs) == 18 and {run.seed for run in runs.values()} == {20}
    assert runs["tuned"].parent == "base/seed20" and runs["scratch"].parent is None
    assert runs["tuned_wide"].parent == "languages8_wide/seed20"
    sizes = {}
    for arm, run in runs.items():
        bindings = (*run.bindings, "MODEL_DIR='/run'")
        bindings += ("INITIAL_CHECKPOINT_PATH='/before'",) if run.parent else ()
        config = gin_config.load(run.gin_files, bindings, entry="espalier.launch.train:train")
        arguments = config.arguments()
        sizes[arm] = arguments["recipe"].program().num_params()
        tuned = arm in experiment.TUNED
        assert arguments["total_steps"] == (200 if tuned or arm.endswith("little") else 800)
        if tuned:
            assert config.macros["REQUESTS"] == (512 if arm in ("tuned", "tuned_wide") else 2048)
            assert list(arguments["eval_tasks"]) == toy_languages.instruction_tasks()
    assert sizes["gelu"] == sizes["base"]
    assert sizes["scratch_wide"] == sizes["tuned_wide"] == sizes["languages8_wide"]
    assert sizes["sequential"] - sizes["base"] == 2 * 64  # a norm in each layer
    assert sizes["kv4"] - sizes["base"] == 2 * 2 * 64 * 2 * 16


@pytest.mark.parametrize(("size", "width"), [("8b", 4096), ("35b", 8192)])
def test_the_full_stages_have_the_papers_settings(size, width):
    bindings = ["MODEL_DIR='/run'", "INITIAL_CHECKPOINT_PATH='/base'", "TOKENIZER='/t'"]
    bindings += ["INSTRUCTIONS_DIR='/data'", "MESH=None"]
    config = gin_config.load([f"{FULL}{size}.gin"], bindings, entry="espalier.launch.train:train")
    assert [str(warning) for warning in config.warnings] == []
    arguments = config.arguments()
    recipe = arguments["recipe"]
    assert arguments["total_steps"] == 13_200 and recipe.model.config.embed_dim == width
    assert (recipe.batch_size, recipe.length) == (64, 8192)
    settings = {
        **{"LEARNING_RATE": 6e-4, "WARMUP_STEPS": 132, "WEIGHT_DECAY": 0.1},
        **{"schedules.cosine.final_fraction": 0.1, "optimizers.adamw.b2": 0.95},
    }
    assert {name: config.value(name) for name in settings if "." in name} == {
        name: value for name, value in settings.items() if "." in name
    }
    assert all(
        f"{name} = {value}" in config.text for name, value in settings.items() if "." not in name
    )
