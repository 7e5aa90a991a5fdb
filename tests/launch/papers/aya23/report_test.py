"""The Aya 23 reproduction: verdicts and report on hand-made results, its sweep and stages as gin has them."""

import json

import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.launch.papers.aya23 import answers, experiment, report
from espalier.launch.papers.aya23.experiment import LANGUAGES, TOTAL, Ranked
from espalier.launch.sweep import file

SWEEP = "launch/papers/aya23/experiment.py"
FACTS = {"command": "a command", "versions": {"jax": "1"}}
FULL = "t5x_configs/experiments/aya23/full/"


def loss_of(arm):
    """A loss with which all claims hold."""
    if arm.startswith("languages"):
        count, width = arm.removeprefix("languages").split("_")
        cost = 0.3 if width == "narrow" else 0.1
        return (1.6 if width == "narrow" else 1.2) + cost * np.log2(int(count) / 4)
    return {"gelu": 1.402, "sequential": 1.398, "kv1": 1.405}.get(arm, 1.4)


def right_of(arm):
    turns = {"scratch": 0.2, "tuned": 0.6, "tuned_full": 0.8}[arm]
    return {
        f"{kind}_{name}": turns * (1 if name == "turns" else 0.3)
        for kind in answers.KINDS
        for name in answers.FORMATS
    }


def rows(seeds=5):
    """Rows of the sweep as `experiment.run` has them, each seed and arm a little different."""
    out, rng = [], np.random.default_rng(0)
    for run in file.read(f"{SWEEP}:{seeds}"):
        row = {"run": run.name, "arm": run.arm, "seed": run.seed, "seconds": 30.0, "step": 800}
        row |= {"evaluations": {}, "parents": [run.parent] if run.parent else [], "tokens": 1e6}
        if run.evaluations:
            scores = right_of(run.arm)
            shift = 0.01 * (run.seed - 12)
            row["evaluations"] = {"answers": {key: value + shift for key, value in scores.items()}}
            row |= {"held_out": {"toy_copy_0": 0.5}, "curve": [(400, 0.5)]}
        else:
            loss = loss_of(run.arm) + 0.01 * (run.seed - 12) + 0.001 * rng.normal()
            row |= {"held_out": {f"toy_{i}": loss for i in range(4)}}
            row |= {"curve": [(150, loss + 1), (600, loss)]}
        out.append(row)
    return out


def parities(seeds=5):
    out = {}
    for seed in range(10, 10 + seeds):
        balanced = {code: 1 + 0.05 * i for i, code in enumerate(LANGUAGES)}
        raw = {code: 1 + (0.1 + 0.01 * seed) * i for i, code in enumerate(LANGUAGES)}
        out[str(seed)] = {
            name: {**one, "spread": max(one.values()) / min(one.values())}
            for name, one in (("raw", raw), ("balanced", balanced))
        }
    return out


def everything():
    caches = {"4": 4096, "2": 2048, "1": 1024}
    return {"toy": rows(), "fertility": parities(), "caches": caches}


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
    assert required == {f"Y{n}" for n in range(1, 9)}


def test_claims_fail_where_all_of_their_effects_do():
    found = everything()
    for width in experiment.WIDTHS:
        for count in (8, 16):
            change(found, experiment.breadth(count, width), 1.2 - 0.2 * count / 8)
    change(found, "sequential", 1.3)
    change(found, "gelu", 1.3)
    for row in found["toy"]:
        if right := row["evaluations"].get("answers"):
            right |= {key: 0.9 if row["arm"] == "scratch" else 0.1 for key in right}
            right |= {f"{kind}_plain": 0.5 + 0.001 * row["seed"] for kind in answers.KINDS}
    found["fertility"] = {
        seed: {"raw": one["balanced"], "balanced": one["raw"]} for seed, one in parities().items()
    }
    failed = verdicts(found)
    assert {name for name, one in failed.items() if one == "fails"} >= {
        "Y1",
        "Y3",
        "Y4",
        "Y5",
        "Y7",
        "Y8",
    }
    found["caches"]["2"] = 4096
    assert verdicts(found)["Y6"] != "holds"


def test_models_that_have_not_learned_give_no_verdict():
    found = everything()
    change(found, experiment.breadth(16, "narrow"), 4.0)
    judged = {claim.name: claim for claim in report.REPORT.judge(found)}
    assert judged["Y2"].verdict == "not measured"
    assert "it has not learned" in judged["Y2"].effects[0].why
    assert verdicts({**everything(), "toy": rows(seeds=3)})["Y1"] == "not measured"


def test_shuffled_measurements_keep_their_numbers_and_hold_rarely():
    held = dict.fromkeys(verdicts(everything()), 0)
    for draw in range(20):
        shuffled = report.REPORT.shuffle(everything(), np.random.default_rng(draw))
        for name, verdict in verdicts(shuffled).items():
            held[name] += verdict == "holds"
    assert all(count <= 4 for count in held.values()), held


def test_the_report_has_every_figure_and_says_what_is_missing(tmp_path):
    report.REPORT.write(everything(), tmp_path, FACTS)
    text = (tmp_path / "aya23.md").read_text()
    drawn = {path.name for path in (tmp_path / "aya23").glob("*.png")}
    names = ("claims", "languages", "blocks", "answers", "fertility")
    assert drawn == {f"{name}.png" for name in names} and "Missing" not in text
    written = json.loads((tmp_path / "aya23" / "results.json").read_text())
    assert verdicts(written["measured"]) == verdicts(everything())
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


def test_bytes_of_caches_are_proportional_to_heads():
    assert experiment.cache_bytes() == {str(n): n * 2 * 2 * 64 * 16 * 4 for n in (4, 2, 1)}


def test_amounts_of_text_fall_with_the_rank():
    order = ("lang_cs", "lang_hi", "lang_ja")
    falling, even = (Ranked(corpus=None, order=order, exponent=x) for x in (1.0, 0.0))
    sizes = [falling.size(source) for source in order]
    assert sizes[0] == pytest.approx(2 * sizes[1], abs=3) == pytest.approx(3 * sizes[2], abs=3)
    assert sum(sizes) == pytest.approx(TOTAL, abs=2) == 3 * even.size("lang_ja")


def test_arms_of_the_sweep_are_valid_configurations_that_differ_in_what_they_say():
    runs = {run.arm: run for run in file.read(f"{SWEEP}:1")}
    assert len(runs) == 14 and {run.seed for run in runs.values()} == {10}
    assert runs["tuned"].parent == "base/seed10" and runs["scratch"].parent is None
    sizes = {}
    for arm, run in runs.items():
        bindings = (*run.bindings, "MODEL_DIR='/run'")
        bindings += ("INITIAL_CHECKPOINT_PATH='/before'",) if run.parent else ()
        config = gin_config.load(run.gin_files, bindings, entry="espalier.launch.train:train")
        arguments = config.arguments()
        sizes[arm] = arguments["recipe"].program().num_params()
        tuned = arm in ("scratch", "tuned", "tuned_full")
        assert arguments["total_steps"] == (200 if tuned else 800)
        if tuned:
            assert config.macros["REQUESTS"] == (512 if arm == "tuned" else 2048)
    assert sizes["gelu"] == sizes["base"]
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
