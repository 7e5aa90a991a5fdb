"""Biases that balance experts: against loads that are counted in numpy, over microbatches, meshes and restarts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.moe import moe
from espalier.model.transformer import Block, Transformer
from espalier.trainers import partitioning
from espalier.trainers.checkpoints import restore_params, state_tree
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.restore import restore_state
from espalier.trainers.extensions import Update, with_constants
from espalier.trainers.objectives.base import LossOut
from espalier.trainers.optim.balance_bias import BalanceBias, toward_mean
from espalier.trainers.recipe import Recipe

E, K, RATE, ROWS, LENGTH = 4, 2, 0.01, 16, 6
BIAS = "layers/block_0/mlp/choice_bias"
CONFIG = TransformerConfig(vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8)
MIXTURE = functools.partial(moe.MoeMlp, num_experts=E, top_k=K, score="sigmoid", balance_bias=True)
EIGHT = {"rules": "fsdp_ep", "mesh": {"fsdp": 4, "expert": 2}}


def recipe_of(*, mlp=MIXTURE, **settings):
    return Recipe(
        model=Transformer(config=CONFIG, block=functools.partial(Block, mlp=mlp)),
        batch_size=ROWS,
        feature_lengths={"targets": LENGTH},
        optimizer=optax.adamw,
        learning_rate=lambda step: 0.05,
        **{"extensions": [BalanceBias(rate=RATE)], "rules": "dp", **settings},
    )


def batch_at(step):
    """Random tokens; the last ones of some rows are padding, and the first ones have no weight in the loss."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(1, 16, (ROWS, LENGTH + 1)).astype(np.int32)
    real = np.arange(LENGTH).reshape(1, -1) < rng.integers(3, LENGTH + 1, (ROWS, 1))
    return {
        "decoder_input_tokens": tokens[:, :-1] * real,
        "decoder_target_tokens": tokens[:, 1:] * real,
        "decoder_loss_weights": (real * (np.arange(LENGTH) > 1)).astype(np.float32),
        "decoder_segment_ids": real.astype(np.int32),
        "decoder_positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), real.shape),
        "source_ids": np.zeros(ROWS, np.int32),
    }


@functools.cache
def program_of(microbatches=1, eight=False):
    more = EIGHT if eight else {}
    recipe = recipe_of(microbatches=microbatches, **more)
    program = recipe.program(devices=jax.devices()[: 8 if eight else 1])
    return program, program.steps(1).train


def steps(program, train, state, count, first=0):
    """Yields the states after each of some steps."""
    names = program.recipe.abstract_batch(program.batch_sharding)
    with partitioning.use_mesh(program.mesh, program.rules):
        for step in range(first, first + count):
            batch = {name: value for name, value in batch_at(step).items() if name in names}
            state, metrics = train(state, jax.device_put(batch, program.batch_sharding))
            yield state, metrics


def bias_of(state):
    return np.asarray(state_tree.flatten(state.params)[BIAS])


@jax.jit
def choices(params, batch):
    """The experts [L, B, T, K] that all tokens of a batch choose."""
    model = recipe_of().model
    _, sown = model.apply(
        {"params": params},
        batch["decoder_input_tokens"],
        segments_BT=batch["decoder_segment_ids"],
        positions_BT=batch["decoder_positions"],
        mutable=["intermediates"],
        method="hidden",
    )
    return sown["intermediates"]["layers"]["block_0"]["mlp"]["router_experts"][0]


@pytest.mark.parametrize(("microbatches", "eight"), [(1, False), (4, False), (2, True)])
def test_biases_follow_the_loads_of_the_whole_step(microbatches, eight):
    """In numpy, layer by layer, from the choices of one forward pass of the whole batch on one device."""
    program, train = program_of(microbatches, eight)
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
    want = np.zeros((CONFIG.num_layers, E), np.float32)
    np.testing.assert_array_equal(bias_of(state), want)
    moved = set()
    for step in range(4):
        before = jax.device_get(state.params)
        ((state, _),) = steps(program, train, state, 1, step)
        batch = batch_at(step)
        chosen = np.asarray(choices(before, batch))
        for layer in range(CONFIG.num_layers):
            load = np.bincount(chosen[layer][batch["decoder_segment_ids"] > 0].ravel(), minlength=E)
            sign = np.sign(load.mean() - load).astype(np.float32)
            want[layer] += np.float32(RATE) * sign
            moved |= {*sign.tolist()}
        np.testing.assert_array_equal(bias_of(state), want)
    assert {-1.0, 1.0} <= moved


def test_the_sign_is_of_whole_numbers():
    rng = np.random.default_rng(0)
    counts = np.concatenate([rng.integers(0, 9, (50, 5)), rng.integers(0, 2**28, (50, 5))])
    counts[:5] = counts[:5, :1]  # equal loads
    want = np.sign([sum(map(int, row)) - 5 * row for row in counts.astype(object)])
    np.testing.assert_array_equal(toward_mean(jnp.asarray(counts, jnp.int32)), want.astype(float))
    assert (want[:5] == 0).all() and {-1, 0, 1} <= {*want[5:].ravel()}
    # 2^24 + 1 and its neighbours, which float32 cannot tell apart
    near = jnp.array([2**24 + 1, 2**24, 2**24 - 1], jnp.int32)
    np.testing.assert_array_equal(toward_mean(near), [-1, 0, 1])


def test_no_optimiser_gradient_or_norm_knows_of_biases():
    program, train = program_of()
    state = program.init()
    assert not [name for name in state_tree.flatten(state.opt_state) if "choice_bias" in name]
    assert not state.variables.get("balance_bias")
    *_, (after, metrics) = steps(program, train, program.init(), 1)
    plain = recipe_of(mlp=functools.partial(MIXTURE, balance_bias=False), extensions=())
    plain = plain.program(devices=jax.devices()[:1])
    same = {n: x for n, x in state_tree.flatten(state.params).items() if n != BIAS}
    start = plain.init()
    start = start.replace(params=state_tree.unflatten(same, start.params))
    *_, (want, without) = steps(plain, plain.steps(1).train, start, 1)
    got = {n: x for n, x in state_tree.flatten(after.params).items() if n != BIAS}
    jax.tree.map(np.testing.assert_array_equal, got, state_tree.flatten(want.params))
    np.testing.assert_array_equal(metrics["grad_norm"][0], without["grad_norm"][0])


def test_a_restart_and_an_average_go_on_with_the_biases(tmp_path):
    recipe = recipe_of(ema_decay=0.5)
    program = recipe.program(devices=jax.devices()[:1])
    train = program.steps(1).train
    *_, (whole, _) = steps(program, train, program.init(), 4)
    average = np.zeros((CONFIG.num_layers, E), np.float32)
    for part, _ in steps(program, train, program.init(), 2):
        average = average + np.float32(0.5) * (bias_of(part) - average)
    np.testing.assert_array_equal(state_tree.flatten(part.ema_params)[BIAS], average)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, part, meta={})
    restored = restore_state(tmp_path, program.abstract_state)
    *_, (again, _) = steps(program, train, restored.state, 2, 2)
    assert np.abs(bias_of(again)).max() > RATE
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_checkpoint_without_biases_is_a_start(tmp_path):
    plain = recipe_of(mlp=functools.partial(MIXTURE, balance_bias=False), extensions=())
    plain = plain.program(devices=jax.devices()[:1]).init()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"params": plain.params}, meta={})
    program, _ = program_of()
    added = ["(.*/)?choice_bias"]  # as methods/moe/balance_bias.gin
    params = restore_params.restore_params(tmp_path, program.init().params, added=added)
    np.testing.assert_array_equal(state_tree.flatten(params)[BIAS], 0.0)
    with pytest.raises(restore_params.CheckpointMismatchError, match="lacks .*choice_bias"):
        restore_params.restore_params(tmp_path, program.init().params)


def test_a_dropped_update_moves_no_bias():
    program, train = program_of()
    state = program.init()
    params = state_tree.flatten(state.params)
    params["token_embed/embedding"] = params["token_embed/embedding"].at[3].set(jnp.nan)
    state = state.replace(params=state_tree.unflatten(params, state.params))
    *_, (after, metrics) = steps(program, train, state, 1)
    assert float(metrics["anomaly"][0]) == 1.0
    np.testing.assert_array_equal(bias_of(after), 0.0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loads_become_even_where_they_are_not_without_it(score):
    """A stream whose tokens all prefer one expert: with the router as it is, only biases spread them."""
    mlp = MIXTURE(config=CONFIG, score=score, top_k=1)

    def tokens(key):
        return 1.0 + jax.random.normal(key, (4, 64, 8))

    params = nn.unbox(mlp.init(jax.random.key(1), tokens(jax.random.key(0)))["params"])
    kernel = 0.2 * jax.random.normal(jax.random.key(2), (8, E))
    params = {**params, "router": {"kernel": kernel.at[:, 0].add(0.2)}}

    @functools.partial(jax.jit, static_argnums=0)
    def largest(rate, params):
        """The largest load of each step."""

        def step(params, key):
            _, sown = mlp.apply({"params": params}, tokens(key), mutable=["counts", "metrics"])
            rest = dict.fromkeys(("step", "trained", "opt_state", "extras", "loss", "grad_norm"))
            update = Update(**rest, frozen=params, counts=sown["counts"])
            return BalanceBias(rate=rate).constants(update), sown["metrics"]["router_load_max"][0]

        return jax.lax.scan(step, params, jax.random.split(jax.random.key(3), 200))[1]

    without, balanced = largest(0.0, params), largest(0.005, params)
    assert without[0] == balanced[0] and without.min() > 0.6
    assert balanced[-50:].mean() < 0.33  # 1/4 is even


def test_what_balances_nothing_is_refused():
    devices = jax.devices()[:1]
    dense = recipe_of(mlp=functools.partial(MIXTURE, balance_bias=False))
    with pytest.raises(ValueError, match="this model has none: set moe.MoeMlp.balance_bias = True"):
        dense.program(devices=devices)
    frozen = {"trainable": [".*/mlp/down/kernel"]}
    with pytest.raises(ValueError, match="its router is not trained: set BIAS_RATE = 0"):
        recipe_of(**frozen).program(devices=devices)
    recipe_of(**frozen, extensions=[BalanceBias(rate=0.0)]).program(devices=devices)

    update = Update(
        **dict.fromkeys(("step", "trained", "opt_state", "extras", "loss", "grad_norm")),
        frozen={"mlp": {"choice_bias": None}},
        counts={"mlp": {"choice_bias": jnp.ones(E, jnp.int32)}},
    )
    with pytest.raises(ValueError, match="give the train step the mask of trainable.mask_of"):
        BalanceBias().constants(update)
    with pytest.raises(
        ValueError, match="Layers count mlp/choice_bias for an extension of the step"
    ):
        with_constants((), update)

    def silent(*, model, num_sources):
        del model, num_sources
        return lambda params, batch, rng: LossOut(jnp.zeros(()), jnp.ones(()), {})

    program = recipe_of(objective=silent).program(devices=devices)
    with pytest.raises(ValueError, match="the objective reports none"):
        jax.eval_shape(
            program.steps(1).train,
            program.abstract_state,
            program.recipe.abstract_batch(program.batch_sharding),
        )
