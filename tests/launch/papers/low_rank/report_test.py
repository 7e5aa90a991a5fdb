"""The low-rank reproduction: verdicts and report on hand-made results, its sweep, and its arms as gin has them."""

import json
import math
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.launch.papers.low_rank import experiment, measures, report
from espalier.launch.papers.low_rank import experiment as lm
from espalier.launch.papers.shared import claim as shared_claim
from espalier.launch.papers.shared import criteria
from espalier.launch.sweep import file
from espalier.trainers import initialise

SWEEP = "launch/papers/low_rank/experiment.py"
FACTS = {"command": "a command", "versions": {"jax": "1"}}
RATES = {"full": 0.0, "half": 0.05}


def score_of(arm):
    """(perplexity, effective rank, effective step) with which all claims hold, about as a pilot had them."""
    scores = {"dense": 6.0, "dense_start": 9.0}
    starts = {"he": 0.8, "spectral": 0.5, "spectral_ones": 0.55}
    scores |= {
        lm.arm(init, rank): 6.0 + gap + (lm.MAIN - rank)
        for init, gap in starts.items()
        for rank in lm.RANKS
    }
    for rate, more in RATES.items():
        scores |= {lm.long(rate): 5.6 + 0.4 * more, lm.warm(rate): 6.3 + more}
    scores |= {lm.spectral("half"): 6.7, lm.spectral("full", "_ratio"): 7.0}
    scores[lm.warm("full", "_ratio")] = 6.8
    if arm in scores:
        half = arm.endswith("half")
        return scores[arm], 19.0 if half else 14.0, 6e-6 if half else 1.3e-5
    _, kind, weight = arm.split("_")
    strength, l2 = 5 + math.log10(float(weight)), kind == "l2"
    rank = 14 * math.exp(-(0.5 if l2 else 0.3) * strength)
    # Of one line over the effective rank; at an effective step that of the product is better.
    return 6.5 * (14 / rank) ** 0.2, rank, 1.3e-5 * 10 ** (0.5 * strength)


def score_of_decay(arm):
    """The same of the part `decays`: each decay is best at the second weight of its grid."""
    if arm == "spectral":
        return 10.2, 14.0, 1e-5
    _, kind, weight = arm.split("_")
    least, rank = (9.8, 6.0) if kind == "l2" else (9.3, 9.0)
    away = math.log10(float(weight) / float(lm.GRIDS[kind][1]))
    return least * (1 + 0.05 * away**2), rank - away, 1e-5


def rows(seeds=5, before=""):
    """Rows of the sweep as `experiment.run` has them, each seed and arm a little different."""
    out, rng = [], np.random.default_rng(0)
    for run in file.read(f"{SWEEP}:{before}{seeds}"):
        perplexity, rank, step = (score_of_decay if before == "decays," else score_of)(run.arm)
        shift = 0.03 * (run.seed % 20) + 0.002 * rng.normal()
        first = 250 if run.arm.startswith("warm") else 0
        last = 250 if run.arm == "dense_start" else 4500 if "long" in run.arm else 1500
        at = [at for at in range(50, last + 1, 50) if at > first]
        end = perplexity * (1 + shift / 10)
        out.append(
            _row(run)
            | {
                "step": last,
                "parents": [run.parent] if run.parent else [],
                "held_out": {"python": {"perplexity": end}},
                "curve": [(s, end + 4000 / s**1.4 - 4000 / last**1.4) for s in at],
                "parameters": 100_864,
                **_course(run.arm, rank * (1 + shift / 10), step * (1 + shift)),
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


LEVELS = {
    "vision": {"narrow": 0.80, "he_frobenius_full": 0.81, "he_frobenius_half": 0.81},
    "ranks": {"dense": 0.856, lm.arm("he", lm.HE_RANK): 0.83}
    | {lm.arm("spectral", rank): 0.82 + 0.05 * math.log10(10 * rank) for rank in lm.IMAGE_RANKS},
}


def image_rows(seeds=5, part="vision", **levels):
    """Rows of images with which all claims hold; `levels` are other accuracies of arms."""
    out, rng = [], np.random.default_rng(0)
    levels = LEVELS[part] | levels
    for run in file.read(f"{SWEEP}:{part},{seeds}"):
        level = levels.get(run.arm, 0.83 if "l2" in run.arm else 0.845)
        level = levels.get(run.arm, 0.86) if run.arm.startswith("dense") else level
        rank = 5.0 if "l2" in run.arm else 7.0
        step = 1.1e-3 if run.arm.endswith("half") else 2e-3
        accuracy = level + 0.004 * (run.seed % 20) + 0.001 * rng.normal()
        end = {"step": 2400, "effective_step": step, "effective_rank": rank + 0.01 * rng.normal()}
        out.append(
            _row(run)
            | {
                "step": 2400,
                "parents": [],
                "parameters": 50_000,
                "held_out": {"textures": {"accuracy": accuracy, "loss": 1.3 - accuracy}},
                "curve": [],
                "spectrum": [end] if run.arm.startswith(("he", "spectral")) else [],
                "first_profile": [],
                "last_profile": [],
            }
        )
    return out


def times(factor=0.8, part="timing"):
    timed = experiment.TIMING[part]
    rounds = [0.010 + 1e-4 * (i % 4) for i in range(timed["rounds"])]
    seconds = dict.fromkeys(timed["arms"], rounds)
    for arm in seconds:
        if arm.startswith("spectral"):
            seconds[arm] = [factor * s + 1e-5 * (i % 3) for i, s in enumerate(rounds)]
    return {"seconds": seconds}


def everything():
    sweeps = {part: rows(before=f"{part},") for part in ("wide", "decays")}
    images = {part: image_rows(part=part) for part in LEVELS}
    timed = {part: times(part=part) for part in experiment.TIMING}
    return {"lm": rows(), **sweeps, **images, **timed}


def judged(found):
    return {claim.name: claim for claim in report.REPORT.judge(found)}


def verdicts(found):
    return {name: claim.verdict for name, claim in judged(found).items()}


def change(found, arm, part="lm", **scores):
    """Sets perplexities, or what is said of the end of runs; values of one arm differ a little by seed."""
    for row in found[part]:
        if row["arm"] == arm:
            for name, value in scores.items():
                where = row["held_out"]["python"] if name == "perplexity" else row["spectrum"][-1]
                where[name] = value * (1 + 1e-3 * row["seed"])


NAMES = (
    *(f"L{n}" for n in (*range(1, 11), *range(12, 17))),
    *(f"V{n}" for n in range(1, 7)),
)


def test_all_claims_hold_where_they_should():
    assert verdicts(everything()) == dict.fromkeys(NAMES, "holds")
    required = {claim.name for claim in report.REPORT.claims if claim.required}
    assert required == {"L1", "L2", "L3", "L5", "L6", "L7", "L10"}


def test_claims_fail_where_their_primary_effect_does():
    found = everything()
    change(found, "dense", perplexity=10.0)
    change(found, "spectral", perplexity=8.5)
    change(found, "spectral_ones", perplexity=9.5)
    change(found, lm.arm("spectral", 0.3), perplexity=9.5)
    change(found, lm.decayed("frobenius", "1e-3"), perplexity=9.9, effective_rank=4.0)
    change(found, lm.long("half"), perplexity=6.0)
    for ranks in lm.RANK_RULES:
        change(found, lm.warm("full", ranks), perplexity=9.0)
    found |= {part: times(1.1, part) for part in experiment.TIMING}
    levels = {lm.image_arm("spectral", "frobenius", rate): 0.815 for rate in lm.IMAGE_RATES}
    levels |= {"spectral_frobenius_half": 0.80, "dense": 0.88, "dense_half": 0.88}
    found["vision"] = image_rows(**levels)
    for row in found["vision"]:
        if row["arm"] == "spectral_frobenius_full":
            row["spectrum"][-1]["effective_rank"] = 3.0 + 0.01 * row["seed"]
    levels = {lm.arm("spectral", rank): 0.81 - 0.05 * rank for rank in lm.IMAGE_RANKS}
    found["ranks"] = image_rows(part="ranks", **levels)
    for at, weight in enumerate(lm.GRIDS["frobenius"]):
        arm = lm.decayed("frobenius", weight)
        change(found, arm, "decays", perplexity=10.5 + 0.2 * abs(at - 1), effective_rank=4.0)
    assert verdicts(found) == dict.fromkeys(NAMES, "fails")


def test_a_cause_is_compared_on_the_line_of_the_other_decay():
    # Perplexity 2 x^0.5, and a point below it by a tenth.
    xs = [4.0, 1.0, 16.0, 2.0]
    ys = [2 * x**0.5 for x in xs]
    assert measures.gap_to_line([3.0, *xs], [0.9 * 2 * 3**0.5, *ys]) == pytest.approx(10.0)
    assert measures.gap_to_line([4.0, *xs], [1.2 * 4, *ys]) == pytest.approx(-20.0)
    assert math.isnan(measures.gap_to_line([17.0, *xs], [8.0, *ys]))
    assert math.isnan(measures.gap_to_line([0.5, *xs], [8.0, *ys]))


def grid_rows(**perplexities):
    """Rows of the part `decays`: by arm the perplexity of each seed; arms that are not named have 20."""
    arms = [one.arm for one in file.read(f"{SWEEP}:decays,1")]
    seeds = range(len(next(iter(perplexities.values()))))
    return experiment.Results(
        [
            {"arm": arm, "seed": seed, "held_out": {"python": {"perplexity": value}}}
            | {"spectrum": [], "parameters": 1}
            for arm in arms
            for seed, value in zip(seeds, perplexities.get(arm, [20.0] * len(seeds)), strict=True)
        ]
    )


def test_the_best_weight_of_a_seed_is_that_of_the_other_seeds():
    l2, product = (
        [lm.decayed(kind, weight) for weight in weights[1:-1]] for kind, weights in lm.GRIDS.items()
    )
    # The first seed is best with the second weight, the others with the first; the fourth is beyond the first block.
    scores = {l2[0]: [9.0, 8.0, 8.0, 9.0], l2[1]: [8.0, 8.1, 8.1, 1.0], product[0]: [4.0] * 4}
    runs = grid_rows(**scores, spectral=[10.0] * 4)
    # Over seeds 1 and 2 the first weight is better; over two others, and over all three, the second.
    want = {0: l2[0], 1: l2[1], 2: l2[1], 3: l2[1]}
    assert measures.best_weights(runs, "l2") == want
    assert set(measures.best_weights(runs, "none").values()) == {"spectral"}
    assert measures.best_weights(grid_rows(**{l2[0]: [1.0]}), "l2") == {}
    (effect,) = measures.at_best("perplexity", "frobenius", "l2", unit="%")(runs, "here")
    assert effect.values == pytest.approx([100 * 5 / 9, 100 * 4.1 / 8.1, 100 * 4.1 / 8.1, -300.0])
    assert not effect.unmet and effect.what.endswith(
        "gain of Frobenius over L2 with the best weights"
    )
    (effect,) = measures.at_best("perplexity", "l2", "none")(runs, "here")
    assert effect.values == pytest.approx([1.0, 1.9, 1.9, 9.0]) and "no decay" in effect.what
    # Of a decided claim no further seeds are trained.
    some = experiment.Results([r for r in runs.rows if r["seed"] < 3 or "l2" not in r["arm"]])
    (effect,) = measures.at_best("perplexity", "frobenius", "l2")(some, "here")
    assert [*effect.by_seed] == [0, 1, 2] and not effect.unmet


def test_a_best_weight_at_the_end_of_its_grid_gives_no_verdict():
    first, second = (lm.decayed("l2", weight) for weight in lm.GRIDS["l2"][:2])
    runs = grid_rows(**{first: [7.0, 8.0, 8.0], second: [9.0] * 3})
    (effect,) = measures.at_best("perplexity", "l2", "none")(runs, "here")
    assert effect.unmet == "the best weight of L2 is an end of its grid"


def test_parts_that_were_judged_keep_their_designs_and_later_ones_have_seeds_of_their_own():
    record = json.loads(pathlib.Path("docs/reproductions/low_rank/results.json").read_text())
    parts = [part for part in record["measured"] if part not in lm.LATER]
    criteria.kept(record["criteria"], parts, report.REPORT.claims, experiment)
    seeds = {part: {run.seed for run in file.read(f"{SWEEP}:{part},12")} for part in lm.LATER}
    assert min(map(min, seeds.values())) > max(row["seed"] for row in record["measured"]["vision"])
    for part in lm.LATER:
        runs = [len({run.seed for run in file.read(f"{SWEEP}:{part},{n}")}) for n in lm.SEEDS]
        assert tuple(runs) == lm.looks(part) == (3, 6, 12)


def test_a_cause_beyond_the_other_decays_gives_no_verdict():
    found = everything()
    change(found, lm.decayed("frobenius", "1e-3"), effective_step=1.0)
    one = judged(found)["L7"]
    assert one.verdict == "not measured"
    assert one.why == "no weight of L2 gives that effective step (seed 20, 21, 22, 23, 24)"


def test_a_share_of_a_gap_is_judged_by_the_middle_and_needs_a_gap():
    rows_of = [
        {"arm": arm, "seed": seed, "held_out": {"x": {"accuracy": level + 0.01 * seed}}}
        for seed in range(3)
        for arm, level in (("low", 0.5), ("high", 0.7), ("mine", 0.65 + 0.01 * seed))
    ]
    runs = experiment.Results([{**row, "spectrum": [], "parameters": 1} for row in rows_of])
    (effect,) = measures.above_the_middle("accuracy", "mine", "low", "high")(runs, "here")
    assert effect.values == pytest.approx([0.05, 0.06, 0.07]) and not effect.unmet
    assert effect.note.startswith("80 % of a gap of 0.200")
    (none,) = measures.above_the_middle("accuracy", "mine", "high", "low")(runs, "here")
    assert none.unmet == "no gap to close: low is not certainly better than high"
    found = {"vision": image_rows(dense=0.81, dense_half=0.81)}
    assert verdicts(found)["V1"] == "not measured"


def test_a_share_of_the_gap_to_the_dense_model():
    (effect,) = measures.closed("spectral", "he")(experiment.Results(rows()), "here")
    assert np.mean(effect.values) == pytest.approx((0.8 - 0.5) / 0.8, abs=0.02)


def test_models_that_have_not_learned_give_no_verdict():
    levels = {row["arm"]: 0.11 for row in image_rows(1)}
    assert verdicts({"vision": image_rows(**levels)})["V2"] == "not measured"
    found = everything()
    for arm in ("dense", "spectral"):
        change(found, arm, perplexity=22.0)
    assert judged(found)["L1"].why == "all arms are at the ceiling of perplexity"
    assert verdicts({"lm": rows(seeds=3)})["L1"] == "not measured"


def test_the_main_effect_is_shown_at_a_second_size_and_judges_nothing_there():
    found = everything()
    del found["lm"]
    one = judged(found)["L2"]
    assert one.verdict == "not measured" and one.part == "lm"
    assert {effect.where for effect in one.others} == {"characters, twice as wide"}
    (gain, share) = one.others
    assert gain.unit == "%" and len(gain.by_seed) == 5 and np.mean(share.values) > 0.3


def test_the_headline_is_what_a_spectral_start_saves():
    found = everything()
    parts = report.REPORT.read(found)
    said = report.REPORT.headline.record(list(judged(found).values()), parts, "characters")
    assert said["word"] == "reproduced" and said["value"] == pytest.approx(100 * 0.3 / 6.8, abs=0.1)


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
    names = (
        *("claims", "ranks", "spectra", "effective_rank", "explanations", "warm_start", "images"),
        *("image_ranks", "decays"),
    )
    assert drawn == {f"{name}.png" for name in names}
    assert all(f"](low_rank/{name})" in text for name in drawn) and "Missing" not in text
    written = json.loads((tmp_path / "low_rank" / "results.json").read_text())
    assert [c["verdict"] for c in written["claims"]] == [c.verdict for c in judged]
    again = report.REPORT.judge(written["measured"])
    assert [c.verdict for c in again] == [c.verdict for c in judged]


def test_a_report_of_partial_results_names_what_is_missing(tmp_path, unsaved):
    kept = [row for row in rows() if row["arm"] in ("dense", "he", "spectral")]
    partial = {"lm": [row for row in kept if row["run"] != "he/seed21"]}
    judged = {claim.name: claim for claim in report.REPORT.write(partial, tmp_path, FACTS)}
    text = (tmp_path / "low_rank.md").read_text()
    assert "`he` (seed 21)" in text and "`spectral_ones`" in text and "`warm_start_full`" in text
    missing = ("vision", "timing", "gpt2", "wide", "ranks", "decays")
    assert all(f"all of the part `{part}`" in text for part in missing)
    assert judged["L1"].verdict == "holds" and judged["L2"].seeds == 4
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
    held_out = {"python": {"perplexity": math.e, "loss": 1.0, "tokens": 9.0}}
    row = experiment.with_course({"held_out": held_out, "arm": "a", "log": "x"}, tmp_path)
    assert row["curve"] == [(2, 2.7183)] and row["parameters"] == 12 and "log" not in row
    assert row["held_out"] == {"python": {"perplexity": math.e, "loss": 1.0}}
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
    found = experiment.measure_times(experiment.TIMING["timing"])
    assert turns == [*experiment.timed_arms()] * experiment.ROUNDS
    assert found["seconds"]["dense"] == [0.25 * experiment.TIMED_STEPS] * experiment.ROUNDS


def test_gpt2s_arms_have_the_shares_of_parameters_that_the_page_says():
    blocks = {}
    for name, arm in experiment.gpt2_arms().items():
        bindings = (*arm["bindings"], "MODEL_DIR=''")
        config = gin_config.load(arm["gin_files"], bindings, entry="espalier.launch.train:train")
        params = initialise.abstract_variables(config.arguments()["recipe"].model)["params"]
        kernels = [
            leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(params))
            if "layers" in jax.tree_util.keystr(path) and leaf.ndim > 2
        ]
        blocks[name] = sum(kernels)
    assert blocks["dense"] == 12 * 12 * 768**2
    assert blocks["spectral"] / blocks["dense"] == pytest.approx(0.93, abs=0.005)
    assert blocks["spectral_ratio"] / blocks["dense"] == pytest.approx(0.62, abs=0.005)


def test_a_step_is_timed_as_it_is_compiled_for_a_run():
    settings = experiment.timed_arms()["spectral_rank30"]
    assert settings["bindings"][-2:] == ["WIDTH=256", "MLP_WIDTH=1024"]
    small = ("WIDTH=16", "MLP_WIDTH=16", "TASK_FEATURE_LENGTHS={'targets': 4}", "BATCH_SIZE=8")
    side = experiment._Side.of({**settings, "bindings": [*settings["bindings"], *small]})
    assert side.median(2) > 0
    assert int(side.state.step) == 3  # the first to warm up
