"""Averages that an optimiser defines: schedule-free AdamW (arXiv 2405.15682) through a recipe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.trainers import partitioning
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.initial import InitialCheckpoint
from espalier.trainers.checkpoints.restore import restore_or_initialise
from espalier.trainers.checkpoints.restore_params import restore_params
from espalier.trainers.evaluate import Evaluation
from espalier.trainers.optim import optimizers, recent_mean, schedules
from espalier.trainers.recipe import Recipe
from espalier.trainers.trainable import path_name

B1, STEPS = 0.9, 3
AVERAGED = {"averaged": contrib.schedule_free_eval_params}
TRAINABLE = (".*/mlp/.*",)


def make_recipe(**changes):
    sizes = {"vocab_size": 32, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24}
    config = TransformerConfig(**sizes, scan_layers=False)
    options = {
        "model": Transformer(config=config),
        "batch_size": 4,
        "feature_lengths": {"targets": 8},
        "optimizer": functools.partial(contrib.schedule_free_adamw, b1=B1),
        "learning_rate": schedules.constant(peak=1e-2),
        "mesh": {"fsdp": 4},
    }
    return Recipe(**{**options, **changes})


def make_batch(recipe, sharding, seed=0):
    rng = np.random.default_rng(seed)
    like = recipe.abstract_batch(sharding)
    batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in like.items()}
    for name in ("decoder_input_tokens", "decoder_target_tokens"):
        batch[name] = rng.integers(0, 32, like[name].shape).astype(np.int32)
    batch["decoder_positions"][:] = np.arange(recipe.length)
    batch["source_ids"][:] = 0
    return jax.device_put(batch, sharding)


@functools.cache
def trained(averaged=True, trainable=()):
    """(program, states after 0, 1, ... steps on four devices)."""
    recipe = make_recipe(trainable=trainable, **(AVERAGED if averaged else {}))
    program = recipe.program(devices=jax.devices()[:4])
    with partitioning.use_mesh(program.mesh, program.rules):
        state, step, states = program.init(), program.steps(1).train, []
        for i in range(STEPS + 1):
            states.append(jax.tree.map(lambda x: x.copy(), state))  # the step consumes its own
            if i < STEPS:
                state, _ = step(state, make_batch(recipe, program.batch_sharding, i))
    return program, states


def assert_close(tree, expected, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), tree, expected)


def distance(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def test_what_is_released_is_the_mean_of_the_iterates_and_training_is_unchanged():
    """With a constant rate x_t is the mean of z_1 ... z_t; y, at which gradients are taken, is another point."""
    _, states = trained()
    _, without = trained(averaged=False)
    jax.tree.map(np.testing.assert_array_equal, states[-1].params, without[-1].params)
    jax.tree.map(np.testing.assert_array_equal, states[-1].opt_state, without[-1].opt_state)
    assert without[-1].ema_params is None
    assert without[-1].released_params is without[-1].params

    iterates = [state.opt_state.z for state in states[1:]]
    last = states[-1]
    assert_close(last.released_params, jax.tree.map(lambda *zs: sum(zs) / STEPS, *iterates), 1e-5)
    closed = jax.tree.map(lambda y, z: (y - (1 - B1) * z) / B1, last.params, last.opt_state.z)
    assert_close(last.released_params, closed)
    assert distance(last.released_params, last.params) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, states[0].ema_params, states[0].params)


def test_the_mean_of_the_last_states_is_released():
    optimizer = functools.partial(
        recent_mean.recent_mean, optimizer=optimizers.adamw, every=1, window=2
    )
    recipe = make_recipe(optimizer=optimizer, averaged=recent_mean.mean_of)
    program = recipe.program(devices=jax.devices()[:4])
    with partitioning.use_mesh(program.mesh, program.rules):
        state, step, params = program.init(), program.steps(1).train, []
        for i in range(STEPS):
            state, _ = step(state, make_batch(recipe, program.batch_sharding, i))
            params.append(jax.tree.map(np.asarray, state.params))
    assert_close(state.released_params, jax.tree.map(lambda a, b: (a + b) / 2, *params[-2:]))
    kernel = state.opt_state.states[0]["token_embed"]["embedding"]
    assert kernel.sharding == state.params["token_embed"]["embedding"].sharding


def test_frozen_parameters_are_released_as_they_are():
    program, states = trained(trainable=TRAINABLE)
    leaves = jax.tree_util.tree_leaves_with_path(states[-1].released_params)
    begun = dict(jax.tree_util.tree_leaves_with_path(states[0].params))
    moved = {path_name(path) for path, leaf in leaves if np.abs(leaf - begun[path]).max() > 0}
    assert moved and all("/mlp/" in name for name in moved)
    assert program.abstract_state.ema_params["token_embed"]["embedding"].sharding is not None


def test_evaluation_and_checkpoints_have_the_average(tmp_path):
    program, states = trained()
    seen = []

    class Split:
        name, num_steps, batch_size, bytes_per_token = "split", 1, 4, 0.0

        def batch(self, step, lo, hi):
            return {"x": np.zeros((hi - lo, 1), np.float32)}

    def eval_step(params, batch, variables):
        seen.append(params)
        return {"loss": (jnp.ones(()), jnp.ones(()))}

    hook = Evaluation(
        every=1, eval_step=eval_step, streams=(Split(),), sharding=program.batch_sharding
    )
    hook(STEPS, states[-1], {})
    assert seen[0] is states[-1].ema_params

    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(STEPS, states[-1], meta={})
    step = step_dir.resolve(tmp_path)
    recorded = step_dir.read_manifest(step)
    assert recorded.use_ema("auto") and not recorded.use_ema("raw")
    like = program.abstract_state.params
    for params, expected in (("auto", states[-1].ema_params), ("raw", states[-1].params)):
        found = restore_params(step, like, use_ema=recorded.use_ema(params))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_training_on_from_other_parameters_begins_the_iterates_there(tmp_path):
    """z is a copy of the parameters, which those of a checkpoint replace."""
    program, states = trained()
    with Checkpointer(tmp_path / "first" / "checkpoints") as checkpointer:
        checkpointer.save(STEPS, states[-1], meta={})

    def begin(restart):
        with (
            partitioning.use_mesh(program.mesh, program.rules),
            Checkpointer(tmp_path / "second" / "checkpoints") as checkpointer,
        ):
            start = restore_or_initialise(
                checkpointer,
                program.abstract_state,
                program.init,
                initial=InitialCheckpoint(path=tmp_path / "first"),
                restart=restart,
            )
        return jax.device_get(start.state)

    state = begin(program.restart)
    jax.tree.map(np.testing.assert_array_equal, state.params, states[-1].params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state.z, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)
    assert distance(begin(None).opt_state.z, state.params) > 1e-3


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_moments_fit_any_parameters(name):
    recipe = make_recipe(optimizer=getattr(optimizers, name))
    assert recipe.program(devices=jax.devices()[:4]).restart is None


def test_one_average_is_released():
    with pytest.raises(ValueError, match="Recipe.ema_decay and Recipe.averaged .* bind one"):
        make_recipe(ema_decay=0.99, **AVERAGED)
