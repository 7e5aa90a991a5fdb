"""The step is compiled while something else is done, and not again when it is called."""

import functools

import jax
import jax.numpy as jnp
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.trainers import partitioning
from espalier.trainers.objectives.lm import language_modelling
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.recipe import Recipe

TRACES: list[str] = []


def objective(*, model, num_sources):
    loss_fn = language_modelling(model=model, num_sources=num_sources)

    def counting(params, batch, rng):
        TRACES.append("objective")
        return loss_fn(params, batch, rng)

    return counting


@pytest.fixture
def run():
    recipe = Recipe(
        model=Transformer(
            config=TransformerConfig(
                vocab_size=32, num_layers=1, scan_layers=False, embed_dim=8, num_heads=2, mlp_dim=8
            )
        ),
        batch_size=8,
        feature_lengths={"targets": 8},
        optimizer=functools.partial(optimizers.sgd),
        learning_rate=schedules.constant(peak=0.1),
        objective=objective,
        mesh={"fsdp": 4, "tensor": 2},
        rules="fsdp_tp",
    )
    program = recipe.program()
    TRACES.clear()
    with partitioning.use_mesh(program.mesh, program.rules):
        yield program, program.steps(1).train, recipe.abstract_batch(program.batch_sharding)


def test_the_first_call_finds_the_program(run):
    program, step, like = run
    with program.compiling(step, like):
        state = program.init()
    assert TRACES == ["objective"]
    batch = jax.tree.map(lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding), like)
    with pytest.MonkeyPatch.context() as patch:
        # A second compilation would need the backend.
        patch.setattr(jax._src.compiler, "compile_or_get_cached", None)
        _, metrics = step(state, batch)
    assert float(metrics["loss"][0]) > 0
    assert TRACES == ["objective"]


def test_what_fails_is_raised_when_the_body_is_done(run):
    program, step, like = run
    done = []
    with pytest.raises(KeyError, match="decoder_"):  # noqa: SIM117
        with program.compiling(step, {}):
            done.append("body")
    assert done == ["body"]
    with pytest.raises(OSError, match="the body's own"), program.compiling(step, {}):
        raise OSError("the body's own")
