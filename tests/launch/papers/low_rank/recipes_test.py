"""The arms of 'Exploring Low Rank Training' (arXiv 2209.13569), small and full size, as gin has them."""

import dataclasses

import jax
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.launch.papers.low_rank import experiment as lm
from espalier.launch.sweep import check, file
from espalier.launch.sweep.folder import SweepFolder
from espalier.model.low_rank import factors
from espalier.trainers.optim.schedules import Span

FULL = "t5x_configs/experiments/low_rank/full/"
RUNS = {run.arm: run for run in file.read("launch/papers/low_rank/experiment.py:1")}
SIDES = [(64, 64)] * 4 + [(64, 256), (256, 64)]  # of the projections of a block
TABLES = (99 + 32) * 64 + 5 * 64  # tokens and positions, and five norms


def configuration(files, *bindings):
    return gin_config.load(
        files, ["MODEL_DIR='/run'", *bindings], entry="espalier.launch.train:train"
    )


def load(files, *bindings):
    return configuration(files, *bindings).arguments()


def of_arm(arm):
    run = RUNS[arm]
    parent = ["INITIAL_CHECKPOINT_PATH='/before'"] if run.parent else []
    return load(run.gin_files, *run.bindings, *parent)


def parameters(arguments):
    """All, and those of the factorised matrices."""
    params = arguments["recipe"].program().abstract_state.params
    found = factors.find_factors(params)
    return sum(leaf.size for leaf in jax.tree.leaves(params)), found


@pytest.mark.parametrize("rank", lm.RANKS)
def test_an_arm_has_the_parameters_of_its_ranks(rank):
    total, found = parameters(of_arm(lm.arm("spectral", rank)))
    blocks = 2 * sum(round(rank * min(sides)) * sum(sides) for sides in SIDES)
    assert total == TABLES + blocks
    assert len(found) == len(SIDES) and all(one.count == 2 for one in found)


def test_the_dense_arm_has_the_pilots_size_and_three_ids_more():
    total, found = parameters(of_arm("dense"))
    assert total == TABLES + 2 * sum(a * b for a, b in SIDES) == 106_816 + 3 * 64
    assert not found


def test_wide_arms_have_the_settings_of_the_narrow_ones_but_the_width():
    for run in file.read("launch/papers/low_rank/experiment.py:wide,1"):
        wide, narrow = (configuration(one.gin_files, *one.bindings) for one in (run, RUNS[run.arm]))
        sizes = {"WIDTH": 128, "MLP_WIDTH": 512, "EVAL_PERIOD": 1500}
        assert {**narrow.macros, **sizes} == {**wide.macros, **sizes}
        assert {name: wide.macros[name] for name in sizes} == sizes


@pytest.mark.parametrize("kind", lm.DECAYS)
def test_arms_with_decay_differ_in_it_alone(kind):
    def said(arm):
        run = RUNS[arm]
        names = ("FACTOR_DECAY", "FACTOR_DECAY_WEIGHT", "LEARNING_RATE", "RANK", "FACTOR_INIT")
        macros = configuration(run.gin_files, *run.bindings).macros
        return {name: macros[name] for name in names}

    plain = said("spectral")
    assert plain["FACTOR_DECAY"] == "none" and plain["LEARNING_RATE"] == 3e-3
    for weight in lm.WEIGHTS:
        changed = {"FACTOR_DECAY": kind, "FACTOR_DECAY_WEIGHT": float(weight)}
        assert said(lm.decayed(kind, weight)) == plain | changed


def test_runs_that_read_often_differ_from_those_that_read_once_in_the_text_alone():
    grid = {run.arm: run for run in file.read("launch/papers/low_rank/experiment.py:decays,1")}
    often, once = (
        configuration(run.gin_files, *run.bindings) for run in (grid["spectral"], RUNS["spectral"])
    )
    changed = {name for name in once.macros if once.macros[name] != often.macros[name]}
    assert changed == {"BYTES_PER_SOURCE", "SPECTRUM_PERIOD", "EVAL_PERIOD", "SEED"}
    assert {*often.macros} == {*once.macros}
    held_out = "espalier.data.text.corpus.assemble.validation_fraction"
    assert (often.value(held_out), often.macros["BYTES_PER_SOURCE"]) == (0.8, 200_000)
    for kind, weights in lm.GRIDS.items():
        assert [float(weight) for weight in weights] == sorted(map(float, weights))
        run = grid[lm.decayed(kind, weights[0])]
        macros = configuration(run.gin_files, *run.bindings).macros
        assert (macros["FACTOR_DECAY"], macros["FACTOR_DECAY_WEIGHT"]) == (kind, float(weights[0]))


def test_arms_by_rank_are_those_of_textures_with_decay_of_the_product():
    images, ranks = (
        {run.arm: run for run in file.read(f"launch/papers/low_rank/experiment.py:{part},1")}
        for part in ("vision", "ranks")
    )
    starts = [*(("spectral", rank) for rank in lm.IMAGE_RANKS), ("he", lm.HE_RANK)]
    pairs = {
        lm.arm(init, rank): (lm.image_arm(init, "frobenius", "full"), {"RANK": rank})
        for init, rank in starts
    }
    pairs["dense"] = "dense", {}
    assert [*ranks] == ["dense", *(arm for arm in pairs if arm != "dense")]
    for arm, (same, changed) in pairs.items():
        given, other = (
            configuration(run.gin_files, *run.bindings).macros for run in (ranks[arm], images[same])
        )
        assert given == {**other, "SEED": 40, **changed}


def test_arms_that_are_compared_over_dense_updates_end_with_the_same_rate_and_rule():
    for rate, ranks in (("full", ""), ("full", "_ratio"), ("half", "")):
        warm, cold = (of_arm(name(rate, ranks)) for name in (lm.warm, lm.spectral))
        np.testing.assert_allclose(rates(warm, [800, 1499], 250), rates(cold, [800, 1499]))
        found = [[one.rank for one in parameters(arguments)[1]] for arguments in (warm, cold)]
        assert found[0] == found[1]


def test_the_narrow_network_is_the_smallest_that_has_no_fewer_parameters_than_factors():
    images = {run.arm: run for run in file.read("launch/papers/low_rank/experiment.py:vision,1")}

    def size(arm, *more):
        run = images[arm]
        recipe = load(run.gin_files, *run.bindings, *more)["recipe"]
        return recipe.program(devices=jax.devices()[:1]).num_params()

    narrower = size("narrow", "resnet.ResNetConfig.widths=(6, 12, 24)")
    assert narrower < size("spectral_frobenius_full") == 15_722 <= size("narrow") == 16_231


def rates(arguments, steps, first=0):
    """Of a run that begins at step `first`."""
    recipe = arguments["recipe"].with_span(Span(arguments["total_steps"], None, first))
    return np.array([float(recipe.learning_rate(step)) for step in steps])


def cosine(step, peak, warmup, total):
    """Half a cosine from the peak to a tenth of it, after a line up, in float64."""
    step = np.asarray(step, float)
    fall = peak * (0.1 + 0.9 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2)
    return np.where(step < warmup, peak * step / warmup, fall)


SMALL_STEPS = (0, 50, 100, 249, 250, 255, 270, 800, 1499)
FULL_STEPS = (0, 2000, 4000, 39_999, 40_000, 41_000, 42_000, 140_000, 239_999)


@pytest.mark.parametrize("size", ["cpu", "full"])
def test_a_dense_start_has_the_schedule_of_the_whole_run(size):
    if size == "cpu":
        arguments, steps, shape = of_arm("dense_start"), SMALL_STEPS, (3e-3, 100, 1500)
    else:
        arguments = load([f"{FULL}gpt2_lm1b_dense_start.gin"])
        steps, shape = FULL_STEPS, (1e-3, 4000, 240_000)
    assert arguments["total_steps"] == {"cpu": 250, "full": 40_000}[size]
    np.testing.assert_allclose(rates(arguments, steps), cosine(steps, *shape), rtol=1e-5)


@pytest.mark.parametrize("size", ["cpu", "full"])
def test_a_warm_start_goes_on_at_half_the_rate_after_a_line_up(size):
    if size == "cpu":
        arguments, steps = of_arm(lm.warm("half")), SMALL_STEPS
        shape, first, warmup = (3e-3, 100, 1500), 250, 20
    else:
        arguments = load([f"{FULL}gpt2_lm1b_warm_start.gin"], "INITIAL_CHECKPOINT_PATH='/before'")
        steps, shape, first, warmup = FULL_STEPS, (1e-3, 4000, 240_000), 40_000, 2000
    assert arguments["initial"].scope == "state" and arguments["total_steps"] == shape[2]
    steps = np.array([step for step in steps if step >= first])
    rise = np.clip((steps - first) / warmup, 0, 1)
    wanted = cosine(steps, *shape) * 0.5 * rise
    np.testing.assert_allclose(rates(arguments, steps, first), wanted, rtol=1e-5, atol=1e-12)


def test_gpt2_at_full_size_has_the_papers_rank_and_lengths():
    config = configuration([f"{FULL}gpt2_lm1b.gin"])
    dense = config.arguments()
    total, _ = parameters(dense)
    # GPT-2 small, of which the vocabulary and the number of positions are others.
    assert total == 124_439_808 + 768 * (32_000 - 50_257 + 1152 - 1024)
    assert (dense["recipe"].batch_size, dense["recipe"].length) == (512, 256)
    lengths = config.value("espalier.data.stream.stream.make_eval_stream.task_feature_lengths")
    assert lengths == {"targets": 1152}
    _, found = parameters(load([f"{FULL}gpt2_lm1b_low_rank.gin"]))
    assert {one.rank for one in found} == {476} and len(found) == 6
    ratio = sum(one.factors for one in found) / sum(one.dense for one in found)
    assert ratio == pytest.approx(0.93, abs=0.005)
    ratio_rule = load([f"{FULL}gpt2_lm1b_low_rank.gin"], "RANK_RULE='param_ratio'")
    assert sorted({one.rank for one in parameters(ratio_rule)[1]}) == [238, 381]


def test_a_sweep_knows_what_a_warm_start_takes_of_its_parent(tmp_path):
    chosen = [RUNS[arm] for arm in ("dense_start", lm.warm("half"), lm.warm("full", "_ratio"))]
    plan = check.plan("low_rank_lm.py", chosen, SweepFolder(tmp_path))
    assert [(entry.first_step, entry.total_steps) for entry in plan] == [
        (0, 250),
        (250, 1500),
        (250, 1500),
    ]
    assert plan[1].start["initial_transform"] == "Decompose()"
    from_factors = dataclasses.replace(RUNS[lm.warm("half")], parent=RUNS["spectral"].name)
    with pytest.raises(file.SweepError, match="is factorised already"):
        check.plan("x.py", [RUNS["spectral"], from_factors], SweepFolder(tmp_path))
    narrow = dataclasses.replace(
        RUNS["dense"], name="narrow/seed20", arm="narrow", bindings=("MLP_WIDTH=43",)
    )
    narrower = dataclasses.replace(RUNS[lm.warm("half")], parent=narrow.name)
    with pytest.raises(
        file.SweepError, match=r"mlp/down/kernel is \[2, 43, 64\] in the parent and \[2, 256"
    ):
        check.plan("x.py", [narrow, narrower], SweepFolder(tmp_path))
