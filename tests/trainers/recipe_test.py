"""Every optimiser, trainable set and dtype through a recipe: sharded, one step taken, kept as documented."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import TransformerConfig
from model.transformer import Transformer
from trainers import optimizers, partitioning, schedules
from trainers.recipe import Recipe

OPTIMISERS = ("adamw", "lion", "adafactor", "muon", "sgd")
TRAINABLE = (".*/mlp/.*", ".*norm/scale")


def make_recipe(**changes):
    sizes = {"vocab_size": 256, "num_layers": 2, "embed_dim": 128, "num_heads": 4, "mlp_dim": 256}
    model = Transformer(config=TransformerConfig(**sizes, **changes.pop("sizes", {})))
    options = {
        "model": model,
        "batch_size": 8,
        "feature_lengths": {"targets": 16},
        "optimizer": optimizers.adamw,
        "learning_rate": schedules.constant(peak=1e-3),
        "rules": "fsdp_tp",
        "mesh": {"fsdp": 2, "tensor": 2},
    }
    return Recipe(**{**options, **changes})


def make_batch(recipe, sharding, seed=0):
    rng = np.random.default_rng(seed)
    like = recipe.abstract_batch(sharding)
    batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in like.items()}
    for name in ("decoder_input_tokens", "decoder_target_tokens"):
        batch[name] = rng.integers(0, 256, like[name].shape).astype(np.int32)
    batch["decoder_positions"][:] = np.arange(recipe.length)
    batch["source_ids"][:] = 0
    return jax.device_put(batch, sharding)


def one_step(recipe):
    """(program, state, metrics) after a step on four devices."""
    program = recipe.program(devices=jax.devices()[:4])
    with partitioning.use_mesh(program.mesh, program.rules):
        batch = make_batch(recipe, program.batch_sharding)
        state, metrics = program.steps(1).train(program.init(), batch)
    return program, state, metrics


@pytest.mark.parametrize("patterns", [(), TRAINABLE], ids=["all", "some"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_takes_a_sharded_step(name, patterns):
    optimizer = getattr(optimizers, name)
    if name == "sgd":
        optimizer = functools.partial(optimizer, momentum=0.9)
    recipe = make_recipe(optimizer=optimizer, trainable=patterns)
    program, state, metrics = one_step(recipe)
    assert np.isfinite(metrics["loss"][0])
    assert float(metrics["update_norm"][0]) > 0
    large = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 4096]
    assert large or name == "adafactor"
    assert not any(leaf.sharding.is_fully_replicated for leaf in large)
    # A second step would otherwise compile again.
    wanted = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted
