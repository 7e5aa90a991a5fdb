"""One gin file makes existing experiments low-rank: parameters, optimiser and a few steps that learn."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.model.low_rank import factors
from espalier.trainers import initialise, partitioning
from espalier.trainers.batches import global_batch
from espalier.trainers.checkpoints import state_tree, step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.hooks import RunContext
from espalier.trainers.low_rank import spectrum
from espalier.trainers.optim.gradient_terms import make_optimizer
from espalier.trainers.telemetry.metric_writers import read_jsonl
from tests.benchmarks.case import RandomRows

LOW_RANK = "t5x_configs/methods/low_rank/low_rank.gin"


def recipe(*files, bindings=(), more=()):
    given = ["MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=()", *bindings]
    paths = [f"t5x_configs/{name}.gin" for name in files]
    config = gin_config.load([*paths, *more, LOW_RANK], given, entry="espalier.launch.train:train")
    return config.arguments()["recipe"]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("tiny", 7),
        ("gpt2", 6),
        ("mixtral_8x7b", 7),
        ("gemma2_2b", 14),
        ("code_mix_470m", 7),
        ("qwen2p5_0p5b", 7),
    ],
)
def test_every_projection_of_a_model_is_factorised(name, layers):
    model = recipe(f"models/{name}", "runs/pretrain", bindings=("RANK=0.125",)).model
    params = initialise.abstract_variables(model)["params"]
    found = factors.find_factors(
        jax.tree.map(lambda box: box.value, params, is_leaf=lambda x: hasattr(x, "names"))
    )
    assert len(found) == layers and all(one.factors < one.dense for one in found)
    assert {one.rank for one in found} == {round(0.125 * min(one.shape)) for one in found}


@pytest.mark.parametrize(
    "experiment",
    [
        "code_mix/quickstart_text",
        "code_mix/cpu/base",
        "snapkv/retrieval",
    ],
)
def test_every_experiment_becomes_low_rank_with_its_own_initialisers(experiment):
    model = recipe(f"experiments/{experiment}", bindings=("RANK=0.25",)).model
    shapes = initialise.abstract_variables(model)["params"]
    names = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    names = ["/".join(str(getattr(key, "key", key)) for key in path) for path in names]
    kernels = [name for name in names if "kernel" in name]
    assert not kernels and sum("/u" in name for name in names) >= 6


@pytest.mark.parametrize("init", ["he", "spectral"])
def test_factors_are_drawn_with_the_initialiser_of_the_layers_they_replace(init, tmp_path):
    bindings = ("RANK=32", "RANK_RULE='absolute'", f"FACTOR_INIT={init!r}")
    (tmp_path / "halves.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "import jax\n"
        "from espalier.model import linear\n"
        "linear.Dense.kernel_init = @jax.nn.initializers.constant()\n"
        "jax.nn.initializers.constant.value = 0.5\n"
    )
    made = recipe(
        "models/tiny", "runs/pretrain", bindings=bindings, more=[str(tmp_path / "halves.gin")]
    )
    up = made.program().init().params["layers"]["block_0"]["mlp"]["up"]
    if init == "he":  # U is columns of the constant kernel
        assert np.unique(up["u"]).tolist() == [0.5]
    else:
        np.testing.assert_allclose(up["u"] @ up["v"], np.full((2, 64, 192), 0.5), atol=1e-5)


@pytest.mark.parametrize("rank", [0.125, 0.5])
def test_moments_are_of_the_factors_alone(rank):
    state = (
        recipe("models/tiny", "runs/pretrain", bindings=(f"RANK={rank}",)).program().abstract_state
    )
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_on_a_mesh_every_factor_is_split_and_a_step_is_that_of_one_device():
    bindings = ("RANK=0.25", "BATCH_SIZE=8", "TASK_FEATURE_LENGTHS={'targets': 32}")
    bindings += ("MESH={'fsdp': 4, 'tensor': 2}", "recipe.Recipe.rules='fsdp_tp'", "WARMUP_STEPS=0")
    sharded = recipe("models/tiny", "runs/pretrain", bindings=bindings)
    alone = dataclasses.replace(sharded, mesh={"data": 1}, rules="dp")
    programs = sharded.program(), alone.program(devices=jax.devices()[:1])
    params = programs[0].abstract_state.params
    leaves = state_tree.flatten(params)
    for path in (factor.path for factor in factors.find_factors(params)):
        for leaf in (leaves[f"{path}/u"], leaves[f"{path}/v"]):
            part = np.prod(leaf.sharding.shard_shape(leaf.shape))
            assert leaf.size / part >= 4, (path, leaf.sharding.spec)
    rows = RandomRows(8, 32, 256)
    losses = []
    for program in programs:
        with partitioning.use_mesh(program.mesh, program.rules):
            state, step = program.init(), program.steps(1).train
            losses.append([])
            for index in range(3):
                batch = global_batch(rows, index, program.batch_sharding)
                state, metrics = step(state, batch)
                losses[-1].append(float(metrics["loss"][0] / metrics["loss"][1]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][2] != losses[0][0]


def test_a_rank_that_devices_do_not_divide_is_whole_on_each_unless_it_is_rounded():
    def specs(*bindings):
        given = ("RANK=0.3", "MESH={'fsdp': 8}", "BATCH_SIZE=8", *bindings)
        state = recipe("models/tiny", "runs/pretrain", bindings=given).program().abstract_state
        return state.params["layers"]["block_0"]["mlp"]["up"]["v"]

    odd, even = specs(), specs("RANK_MULTIPLE=8")
    assert odd.shape == (2, 19, 192) and odd.sharding.shard_shape(odd.shape) == odd.shape
    assert even.shape == (2, 16, 192) and even.sharding.shard_shape(even.shape) == (2, 2, 192)


def test_settings_of_adamw_reach_it():
    def update(*bindings):
        made = recipe("models/tiny", "runs/pretrain", bindings=("FACTOR_DECAY='none'", *bindings))
        params = {"kernel": jnp.ones((3, 3)), "u": jnp.ones((3, 3))}
        boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, ("embed", "rank")), params)
        optimizer = make_optimizer(
            made.optimizer, learning_rate=1.0, boxed_params=boxed, terms=made.gradient_terms
        )
        updates, _ = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
        return {name: float(value[0, 0]) for name, value in updates.items()}

    assert update("optimizers.adamw.weight_decay=0.25") == {"kernel": -0.25, "u": 0.0}


@pytest.mark.parametrize("name", ["tiny", "mixtral_8x7b"])
def test_a_tokens_flops_are_those_of_the_factors(name):
    def flops(rank):
        made = recipe(f"models/{name}", "runs/pretrain", bindings=(f"RANK={rank}", "MESH=None"))
        return made.program().train_flops_per_unit

    config = recipe(f"models/{name}", "runs/pretrain").model.config
    sides = [(config.embed_dim, config.num_heads * config.per_head_dim)] * 2
    sides += [(config.embed_dim, config.kv_heads * config.per_head_dim)] * 2
    sides += [(config.embed_dim, config.mlp_dim)] * 3 * (2 if name == "mixtral_8x7b" else 1)
    eighth = sum(round(min(pair) / 8) * sum(pair) for pair in sides)
    half = sum(round(min(pair) / 2) * sum(pair) for pair in sides)
    assert flops(0.5) - flops(0.125) == pytest.approx(6 * config.num_layers * (half - eighth))


def test_a_low_rank_run_trains_and_its_spectra_are_those_of_its_products(train, tmp_path):
    bindings = (
        f"MODEL_DIR={str(tmp_path)!r}",
        f"DIRECTORY={train.cache + '/text'!r}",
        "schedules.cosine.total_steps=14",
        "train.train.log_period=1",
        "FACTOR_INIT='spectral_ones'",
        "SPECTRUM_PERIOD=5",
        "LENGTH=32",
        "config.TransformerConfig.num_layers=2",
        "config.TransformerConfig.scan_layers=True",
    )

    def run(steps):
        return train(
            f"--gin_file={train.programs}/small_text.gin",
            f"--gin_file={LOW_RANK}",
            "--gin_file=t5x_configs/methods/low_rank/spectrum.gin",
            *[f"--gin.{binding}" for binding in bindings],
            f"--gin.TRAIN_STEPS={steps}",
        )

    assert (result := run(12)).status == 0, result.err
    losses = [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert "layers/block_0/mlp/down" in result.out and "LARGER" not in result.out
    written = (tmp_path / "parameters.txt").read_text()
    assert "layers/block_0/attention/query/u" in written and "query/kernel" not in written

    assert run(14).status == 0
    readings = spectrum.read(tmp_path)
    assert [line["step"] for line in readings] == [0, 5, 10, 12, 14]
    first, last = readings[0]["layers"], readings[-1]["layers"]
    assert all(np.allclose(values, 1.0, atol=1e-5) for values in first.values())
    step = step_dir.resolve(tmp_path)
    names = ("u", "v")
    stored = {
        path: [StoredArray(step, f"params/{path}/{n}").read() for n in names] for path in last
    }
    ranks, norms = [], []
    for path, (u, v) in stored.items():
        products = np.asarray(u, np.float64) @ np.asarray(v, np.float64)
        want = np.linalg.svd(products, compute_uv=False)[:, : u.shape[-1]]
        np.testing.assert_allclose(last[path], want, rtol=1e-4)
        ranks += list(want.sum(-1) / want.max(-1))
        norms += list(np.square(products).sum((-2, -1)))
    (row,) = (row for row in read_jsonl(tmp_path / "metrics.jsonl")
              if row["step"] == 14 and "spectrum/nuclear" in row)  # fmt: skip
    assert row["spectrum/effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-4)
    rate = readings[-1]["learning_rate"]
    assert row["spectrum/effective_step"] == pytest.approx(rate / np.mean(norms), rel=1e-3)


def test_spectra_of_dense_kernels_and_of_none():
    files = ("models/tiny", "runs/pretrain")

    def hook(made, **settings):
        run = RunContext(path="", writer=False, step=0, program=made.program(),
                         learning_rate=lambda step: 0.5)  # fmt: skip
        return spectrum.Spectrum(run=run, **settings)

    low_rank = recipe(*files)
    with pytest.raises(ValueError, match="'.*/nothing' matches no kernel"):
        hook(low_rank, kernels=(".*/nothing",))
    with pytest.raises(ValueError, match=r"Spectrum.kernels '\*' is not a regular expression"):
        hook(low_rank, kernels=("*",))
    given = ["MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=()"]
    paths = [f"t5x_configs/{name}.gin" for name in files]
    dense = gin_config.load(paths, given, entry="espalier.launch.train:train").arguments()["recipe"]
    with pytest.raises(ValueError, match="no factorised matrices"):
        hook(dense)
    state = dense.program().init()
    found = hook(dense, kernels=(".*/query/kernel",))(0, state, {})
    kernels = np.asarray(state.params["layers"]["block_0"]["attention"]["query"]["kernel"])
    values = np.linalg.svd(np.asarray(kernels, np.float64), compute_uv=False)
    want = np.mean(values.sum(-1) / values.max(-1))
    assert found["spectrum/effective_rank"] == pytest.approx(want, rel=1e-5)
    squares = np.square(kernels).sum((-2, -1))
    assert found["spectrum/effective_step"] == pytest.approx(0.5 / squares.mean(), rel=1e-5)


def test_a_matrix_that_has_vanished_does_not_decide_the_effective_step():
    found = spectrum.summary([np.array([1.0, 1.0]), np.zeros(2), np.array([2.0])], 0.3)
    assert found["effective_step"] == pytest.approx(0.3 / ((2 + 0 + 4) / 3))
    assert found["effective_rank"] == pytest.approx((2 + 0 + 1) / 3)
    assert found["nuclear"] == pytest.approx(4 / 3) and found["operator"] == pytest.approx(1.0)
