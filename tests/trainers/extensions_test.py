"""An extension of a method that the step does not know: its part of the state, its gate, and the extras that it replaces."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.trainers import extensions, initialise
from espalier.trainers.extensions import StepExtension
from espalier.trainers.objectives.base import LossOut, Objective
from espalier.trainers.optim.averages import MovingAverage
from espalier.trainers.step import make_eval_step, make_train_step

BATCH = {"x": jnp.ones((4,))}
PARAMS = {"w": jnp.array([1.0, 2.0])}


class Counts(StepExtension):
    """Counts updates, refuses every third one, and gives the objective the count as its extras."""

    name = "counts"

    def init(self, params, mask):
        del params, mask
        return {"seen": jnp.zeros((), jnp.int32), "applied": jnp.zeros((), jnp.int32)}

    def objective_extras(self, extras, part):
        return (extras, part["applied"])

    def update(self, part, update):
        del update
        return {**part, "applied": part["applied"] + 1}

    def gate(self, part, update):
        del update
        good = part["seen"] % 3 != 2
        return good, {"seen": part["seen"] + 1, "applied": part["applied"] + good}


def loss_fn(params, batch, rng, *, variables, extras):
    del rng
    assert "counts" not in variables
    stored, applied = extras
    total = (params["w"] * stored).sum() * batch["x"].sum()
    weight = batch["x"].sum()
    return LossOut(sum=total, weight=weight, metrics={"applied": (applied * weight, weight)})


def begun(own, optimizer):
    states = initialise.StateMaker(optimizer=optimizer, extensions=own)
    return states, states({"params": PARAMS, "batch_stats": {"mean": jnp.zeros(2)}})


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_part_of_the_state_is_made_updated_and_judged(microbatches):
    own, optimizer = [Counts(), MovingAverage(0.5)], optax.sgd(0.1)
    _, state = begun(own, optimizer)
    assert set(state.variables) == {"batch_stats", "counts"}
    options = {"loss_fn": Objective(loss_fn=loss_fn), "microbatches": microbatches}
    options["extensions"] = own
    step = jax.jit(make_train_step(optimizer=optimizer, **options))
    for number in range(6):
        before = state
        state, metrics = step(state, BATCH, extras=jnp.ones(2))
        refused = number % 3 == 2
        assert float(metrics["anomaly"][0]) == refused
        assert (float(metrics["update_norm"][0]) == 0) == refused
        applied = int(before.variables["counts"]["applied"])
        assert float(metrics["applied"][0] / metrics["applied"][1]) == applied
        for name in ("params", "ema_params", "opt_state"):
            same = [
                np.array_equal(new, old)
                for new, old in zip(
                    *(jax.tree.leaves(getattr(one, name)) for one in (state, before)), strict=True
                )
            ]
            assert all(same) if refused else not any(same)
    assert {name: int(x) for name, x in state.variables["counts"].items()} == {
        "seen": 6,
        "applied": 4,
    }
    evaluated = make_eval_step(**options)(state.params, BATCH, state.variables, jnp.ones(2))
    assert float(evaluated["applied"][0] / evaluated["applied"][1]) == 4


def test_parts_like_parameters_are_split_as_they_are():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
    states, state = begun([MovingAverage(0.5), Counts()], optax.sgd(0.1, momentum=0.9))
    found = states.shardings(jax.eval_shape(lambda: state), {"w": split}, mesh)
    assert found.params == found.ema_params == found.opt_state[0].trace == {"w": split}
    assert set(jax.tree.leaves(found.variables)) == {whole}


def test_slots_are_in_the_order_of_their_names():
    one, other = Counts(), MovingAverage(0.5)
    assert extensions.named(b=one, a=other, c=None) == (other, one)
