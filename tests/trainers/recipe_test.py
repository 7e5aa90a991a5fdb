"""Every optimiser, trainable set and dtype through a recipe: sharded, one step taken, kept as documented."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.transformer import Block, Transformer
from espalier.trainers import partitioning
from espalier.trainers.anomaly import STATISTICS
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.initial import InitialCheckpoint
from espalier.trainers.checkpoints.restore import restore_or_initialise
from espalier.trainers.checkpoints.restore_params import restore_params
from espalier.trainers.objectives.base import Objective
from espalier.trainers.objectives.lm import language_modelling
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.recipe import Recipe

OPTIMISERS = ("adamw", "lion", "adafactor", "muon", "sgd")
TRAINABLE = (".*/mlp/.*", ".*norm/scale")
ONE_LAYER = {"num_layers": 1, "scan_layers": False}  # for what has nothing to do with layers


def make_recipe(**changes):
    sizes = {"vocab_size": 256, "num_layers": 2, "embed_dim": 128, "num_heads": 4, "mlp_dim": 256}
    model = Transformer(config=TransformerConfig(**{**sizes, **changes.pop("sizes", {})}))
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


@pytest.mark.parametrize(
    ("name", "patterns"),
    [*((name, ()) for name in OPTIMISERS), ("adamw", TRAINABLE), ("muon", TRAINABLE)],
    ids=[*OPTIMISERS, "adamw of some", "muon of some"],
)
def test_every_optimiser_takes_a_sharded_step(name, patterns):
    optimizer = getattr(optimizers, name)
    if name == "sgd":
        optimizer = functools.partial(optimizer, momentum=0.9)
    sizes = ONE_LAYER if patterns else {}  # all parameters in stacks of layers, some alone
    recipe = make_recipe(optimizer=optimizer, trainable=patterns, sizes=sizes)
    program, state, metrics = one_step(recipe)
    assert np.isfinite(metrics["loss"][0])
    assert float(metrics["update_norm"][0]) > 0
    large = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 4096]
    assert large or name == "adafactor"
    assert not any(leaf.sharding.is_fully_replicated for leaf in large)
    # A second step would otherwise compile again.
    wanted = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted


SMALL = {"embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "num_layers": 2, "vocab_size": 256}


def test_averages_of_bfloat16_parameters_are_wide_and_serve_as_parameters(tmp_path):
    recipe = make_recipe(
        sizes={**SMALL, **ONE_LAYER, "param_dtype": "bfloat16"},
        ema_decay=0.5,
        trainable=TRAINABLE,
        rounding="stochastic",
    )
    program, state, _ = one_step(recipe)
    flat = jax.tree_util.tree_leaves_with_path(state.ema_params)
    params, mask = jax.tree.leaves(state.params), jax.tree.leaves(program.mask)
    for (path, average), param, trained in zip(flat, params, mask, strict=True):
        assert average.dtype == (jnp.float32 if trained else param.dtype), path
    frozen = state.params["token_embed"]["embedding"]
    np.testing.assert_array_equal(state.ema_params["token_embed"]["embedding"], frozen)
    with partitioning.use_mesh(program.mesh, program.rules):
        batch = make_batch(recipe, program.batch_sharding)
        metrics = program.steps(1).evaluate(state.ema_params, batch)
        assert np.isfinite(metrics["loss"][0])
        with Checkpointer(tmp_path / "a") as checkpointer:
            checkpointer.save(1, state)
        abstract = program.abstract_state
        served = restore_params(tmp_path / "a", abstract.params, use_ema=True)
        with Checkpointer(tmp_path / "b") as other:
            begun = restore_or_initialise(
                other, abstract, program.init, initial=InitialCheckpoint(path=tmp_path / "a")
            ).state
    rounded = jax.tree.map(lambda e, p: e.astype(p.dtype), state.ema_params, state.params)
    jax.tree.map(np.testing.assert_array_equal, served, rounded)
    jax.tree.map(np.testing.assert_array_equal, begun.ema_params, begun.params)
    for leaf, like in zip(*map(jax.tree.leaves, (begun, abstract)), strict=True):
        assert (leaf.dtype, leaf.sharding) == (like.dtype, like.sharding)


class _Router(GatedMlp):
    """Sows an auxiliary loss and a tap for gradients, and counts its calls."""

    @nn.compact
    def __call__(self, x_BTD, **context):
        y_BTD = super().__call__(x_BTD, **context)
        self.sow("losses", "balance", jnp.mean(y_BTD**2))
        self.sow("metrics", "load", jnp.ones(4))
        calls = self.variable("batch_stats", "calls", jnp.zeros, ())
        self.sow("losses", "calls", calls.value)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            calls.value += 1
        return self.perturb("tap", y_BTD)


def test_only_collections_that_last_are_kept_and_they_are_read_and_written():
    block = functools.partial(Block, mlp=_Router)
    model = Transformer(config=TransformerConfig(**SMALL), block=block)
    recipe = make_recipe(model=model, microbatches=2)
    program, state, metrics = one_step(recipe)
    assert set(state.variables) == {"batch_stats", STATISTICS}
    assert float(metrics["auxiliary_loss"][0]) > 0
    (calls_L,) = jax.tree.leaves(state.variables["batch_stats"])
    np.testing.assert_array_equal(calls_L, [2, 2])
    with partitioning.use_mesh(program.mesh, program.rules):
        batch, evaluate = make_batch(recipe, program.batch_sharding), program.steps(1).evaluate
        found = []
        for calls in (0.0, 2.0):
            variables = jax.tree.map(lambda x, c=calls: jnp.full_like(x, c), state.variables)
            total, weight = evaluate(state.params, batch, variables)["auxiliary_loss"]
            found.append(float(total / weight))
    assert found[1] - found[0] == pytest.approx(2 * SMALL["num_layers"], rel=1e-4)


def rows_objective(*, model, num_sources):
    """Also reports the loss of each row."""
    loss_fn = language_modelling(model=model, num_sources=num_sources)

    def with_rows(params, batch, rng):
        out = loss_fn(params, batch, rng)
        rows_B = batch["decoder_loss_weights"].sum(-1)
        return out.replace(metrics={**out.metrics, "rows": (rows_B, jnp.ones_like(rows_B))})

    return with_rows


def test_metrics_of_any_shape_are_whole_on_every_device():
    recipe = make_recipe(sizes={**SMALL, **ONE_LAYER}, objective=rows_objective)
    program, state, metrics = one_step(recipe)
    assert metrics["rows"][0].shape == (8,)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(metrics))
    with partitioning.use_mesh(program.mesh, program.rules):
        batch = make_batch(recipe, program.batch_sharding)
        metrics = program.steps(1).evaluate(state.params, batch)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(metrics))


def test_evaluation_in_microbatches_needs_the_memory_of_one():
    def temporaries(microbatches):
        recipe = make_recipe(sizes=SMALL, batch_size=128, microbatches=microbatches)
        program = recipe.program(devices=jax.devices()[:4])
        with partitioning.use_mesh(program.mesh, program.rules):
            batch = recipe.abstract_batch(program.batch_sharding)
            evaluate = program.steps(1).evaluate.lower(program.abstract_state.params, batch)
            return evaluate.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < 0.25 * temporaries(1)


class Held:
    """Stored extras that are at hand."""

    def __init__(self, array):
        self.array = array

    def abstract(self, mesh, rules):
        return jax.ShapeDtypeStruct(
            self.array.shape, self.array.dtype, sharding=self.array.sharding
        )

    def read(self, mesh, rules):
        return self.array


def anchored(*, model, num_sources, reference):
    """Language modelling, and the squared distance of the head from a reference."""
    loss_fn = language_modelling(model=model, num_sources=num_sources)

    def with_distance(params, batch, rng, *, variables, extras):
        out = loss_fn(params, batch, rng, variables=variables)
        distance = ((params["token_embed"]["embedding"] - extras) ** 2).sum()
        metrics = {**out.metrics, "distance": (distance, jnp.ones(()))}
        return out.replace(sum=out.sum + out.weight * distance, metrics=metrics)

    return Objective(loss_fn=with_distance, stored_extras=Held(reference))


def test_extras_of_an_objective_are_an_argument_of_the_step():
    plain = make_recipe(sizes={**SMALL, **ONE_LAYER})
    program = plain.program(devices=jax.devices()[:4])
    shape = program.abstract_state.params["token_embed"]["embedding"]
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
        reference = jax.device_put(jnp.ones(shape.shape), shape.sharding)
        objective = functools.partial(anchored, reference=reference)
        program = dataclasses.replace(plain, objective=objective).program(devices=jax.devices()[:4])
        steps, batch = program.steps(1), make_batch(plain, program.batch_sharding)
        want = float(((state.params["token_embed"]["embedding"] - 1) ** 2).sum())
        traced = steps.train.trace(program.abstract_state, batch)
        # A constant this large would be of every process's devices.
        assert max((np.size(c) for c in traced.jaxpr.consts), default=0) < reference.size
        steps.train.lower(program.abstract_state, batch).compile()
        found = steps.evaluate(state.params, batch)["distance"][0]
        assert float(found) == pytest.approx(want, rel=1e-4)
        for _ in range(2):  # the extras are not donated
            state, metrics = steps.train(state, batch)
        assert 0 < float(metrics["distance"][0]) < want


def test_a_number_is_a_constant_schedule_and_a_span_changes_no_shape():
    recipe = make_recipe(learning_rate=0.25)
    assert float(recipe.learning_rate(0)) == float(recipe.learning_rate(10**6)) == 0.25
    waits = make_recipe(learning_rate=schedules.linear(peak=0.5, total_steps=None))
    program = waits.program(devices=jax.devices()[:4])
    spanned = program.with_span(schedules.Span(total_steps=4))
    assert spanned.abstract_state is program.abstract_state
    assert float(spanned.recipe.learning_rate(0)) == 0.5
    with pytest.raises(ValueError, match="no value before the run knows"):
        program.recipe.learning_rate(0)
