"""One gin file makes existing experiments low-rank: parameters, optimiser and a few steps that learn."""

import gin
import jax
import jax.numpy as jnp
import pytest

from launch import gin_config
from launch.host_metrics import flops_per_token
from model import factors
from trainers import initialise
from trainers.metric_writers import read_jsonl

LOW_RANK = "t5x_configs/methods/low_rank.gin"


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config(clear_constants=True)


def recipe(*files, bindings=()):
    given = ["MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=()", *bindings]
    paths = [f"t5x_configs/{name}.gin" for name in files]
    config = gin_config.load([*paths, LOW_RANK], given, entry="launch.train:train")
    return config.arguments()["recipe"]


@pytest.mark.parametrize(
    ("name", "layers"),
    [("tiny", 7), ("gpt2", 6), ("mixtral_8x7b", 7), ("gemma2_2b", 14), ("qwen2p5_0p5b", 7)],
)
def test_every_projection_of_a_model_is_factorised(name, layers):
    model = recipe(f"models/{name}", "runs/pretrain", bindings=("RANK=0.125",)).model
    params = initialise.abstract_variables(model)["params"]
    found = factors.find_factors(
        jax.tree.map(lambda box: box.value, params, is_leaf=lambda x: hasattr(x, "names"))
    )
    assert len(found) == layers and all(one.factors < one.dense for one in found)
    assert {one.rank for one in found} == {round(0.125 * min(one.shape)) for one in found}


@pytest.mark.parametrize("rank", [0.125, 0.5])
def test_moments_are_of_the_factors_alone(rank):
    state = (
        recipe("models/tiny", "runs/pretrain", bindings=(f"RANK={rank}",)).program().abstract_state
    )
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_settings_of_adamw_reach_it():
    def update(*bindings):
        made = recipe("models/tiny", "runs/pretrain", bindings=("FACTOR_DECAY='none'", *bindings))
        optimizer = made.optimizer(learning_rate=1.0)
        params = {"kernel": jnp.ones(3), "u": jnp.ones(3)}
        updates, _ = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
        gin.clear_config(clear_constants=True)
        return {name: float(value[0]) for name, value in updates.items()}

    assert update("optimizers.adamw.weight_decay=0.25") == {"kernel": -0.25, "u": 0.0}


@pytest.mark.parametrize("name", ["tiny", "mixtral_8x7b"])
def test_a_tokens_flops_are_those_of_the_factors(name):
    def flops(rank):
        made = recipe(f"models/{name}", "runs/pretrain", bindings=(f"RANK={rank}", "MESH=None"))
        found = flops_per_token(made, made.program())
        gin.clear_config(clear_constants=True)
        return found

    config = recipe(f"models/{name}", "runs/pretrain").model.config
    sides = [(config.embed_dim, config.num_heads * config.per_head_dim)] * 2
    sides += [(config.embed_dim, config.kv_heads * config.per_head_dim)] * 2
    sides += [(config.embed_dim, config.mlp_dim)] * 3 * (2 if name == "mixtral_8x7b" else 1)
    eighth = sum(round(min(pair) / 8) * sum(pair) for pair in sides)
    half = sum(round(min(pair) / 2) * sum(pair) for pair in sides)
    assert flops(0.5) - flops(0.125) == pytest.approx(6 * config.num_layers * (half - eighth))


def test_a_low_rank_run_trains_and_its_loss_falls(train, tmp_path):
    bindings = (
        f"MODEL_DIR={str(tmp_path)!r}",
        f"DIRECTORY={train.cache + '/text'!r}",
        "TRAIN_STEPS=12",
        "schedules.cosine.total_steps=12",
        "train.train.log_period=1",
        "FACTOR_INIT='spectral_ones'",
    )
    result = train(
        f"--gin_file={train.programs}/local_text.gin",
        f"--gin_file={LOW_RANK}",
        *[f"--gin.{binding}" for binding in bindings],
    )
    assert result.status == 0, result.err
    losses = [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    written = (tmp_path / "parameters.txt").read_text()
    assert "layers/block_0/attention/query/u" in written and "query/kernel" not in written
