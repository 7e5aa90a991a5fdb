"""A reference that moves to the policy, against its formula and a run that is interrupted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.trainers import initialise
from espalier.trainers.checkpoints import restore
from espalier.trainers.extensions import Update
from espalier.trainers.moving_reference import MOVES, MovingReference
from espalier.trainers.objectives.base import LossOut, Objective
from espalier.trainers.step import make_eval_step, make_train_step
from espalier.trainers.train_state import TrainState

START = {"a": jnp.array([1.0, -2.0, 0.5]), "b": {"c": jnp.array(3.0)}}
BATCH = {"x": jnp.arange(4.0)}


def loss_fn(params, batch, rng, *, variables, extras):
    """The policy is drawn to a target and held by the reference."""
    del rng
    assert MOVES not in variables
    target = jax.tree.map(lambda p: ((p - 4.0) ** 2).sum(), params)
    held = jax.tree.map(lambda p, r: ((p - r) ** 2).sum(), params, extras)
    total = sum(jax.tree.leaves(target)) + sum(jax.tree.leaves(held))
    weight = batch["x"].size / 4.0
    return LossOut(
        sum=total * weight, weight=jnp.float32(weight), metrics={"loss": (total, jnp.ones(()))}
    )


OBJECTIVE = Objective(loss_fn=loss_fn)


def trained(moving, steps, state=None, **settings):
    optimizer = optax.sgd(0.05)
    extensions = [] if moving is None else [moving]
    step = jax.jit(
        make_train_step(loss_fn=OBJECTIVE, optimizer=optimizer, extensions=extensions, **settings)
    )
    if state is None:
        variables = {} if moving is None else {MOVES: moving.init(START)}
        state = TrainState(
            jnp.zeros((), jnp.int32), START, optimizer.init(START), variables=variables
        )
    for _ in range(steps):
        state, _ = step(state, BATCH, extras=START)
    return state


@pytest.mark.parametrize(("every", "mix"), [(1, 0.1), (3, 0.6), (2, 1.0)])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_reference_is_mixed_with_the_policy_every_so_many_updates(every, mix, microbatches):
    moving = MovingReference(every=every, mix=mix)
    state = trained(moving, 7, microbatches=microbatches)
    policy = np.array([1.0, -2.0, 0.5])
    reference = policy.copy()
    for update in range(1, 8):
        policy = policy - 0.05 * (2 * (policy - 4.0) + 2 * (policy - reference))
        if update % every == 0:
            reference = mix * policy + (1 - mix) * reference
    np.testing.assert_allclose(state.params["a"], policy, rtol=1e-5)
    now = moving.objective_extras(START, state.variables[MOVES])
    np.testing.assert_allclose(now["a"], reference, rtol=1e-5)
    evaluate = make_eval_step(loss_fn=OBJECTIVE, extensions=[moving])
    total, _ = evaluate(state.params, BATCH, state.variables, extras=START)["loss"]
    expected, _ = OBJECTIVE(state.params, BATCH, None, extras=now).metrics["loss"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_a_reference_that_is_never_due_is_a_fixed_one():
    moved, fixed = trained(MovingReference(every=100), 6), trained(None, 6)
    jax.tree.map(np.testing.assert_array_equal, moved.params, fixed.params)


def test_a_state_is_all_that_a_run_needs_to_go_on():
    moving = MovingReference(every=2, mix=0.7)
    whole = trained(moving, 7)
    parts = trained(moving, 4, trained(moving, 3))
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    jax.tree.map(np.testing.assert_array_equal, whole.variables, parts.variables)


def test_a_new_phase_begins_with_the_reference_that_its_checkpoint_has():
    moving = MovingReference(every=2)
    state = trained(moving, 4)
    assert any(np.any(x) for x in jax.tree.leaves(state.variables[MOVES]))
    start = restore._at_phase_start(state, [moving])
    now = moving.objective_extras(state.params, start.variables[MOVES])
    jax.tree.map(np.testing.assert_array_equal, now, state.params)


def test_moves_are_split_over_devices_as_their_parameters_are():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
    shardings = {"a": split, "b": {"c": whole}}
    optimizer = optax.sgd(0.1)
    variables = {MOVES: MovingReference().init(START), "other": {"x": jnp.zeros(3)}}
    state = TrainState(jnp.zeros((), jnp.int32), START, optimizer.init(START), None, variables)
    abstract = jax.eval_shape(lambda: state)
    states = initialise.StateMaker(optimizer=optimizer, extensions=[MovingReference()])
    found = states.shardings(abstract, shardings, mesh).variables
    assert found == {MOVES: shardings, "other": {"x": whole}}


def test_what_cannot_move_is_refused():
    moving = MovingReference()
    moves = moving.init(START)
    for extras in (None, {"another": jnp.zeros(3)}):
        with pytest.raises(ValueError, match="methods/preference/tr_dpo.gin"):
            moving.objective_extras(extras, moves)
    for settings in ({"every": 0}, {"mix": 0.0}, {"mix": 1.5}):
        with pytest.raises(ValueError, match="MovingReference"):
            MovingReference(**settings)


def test_moves_that_bfloat16_cannot_hold_reach_the_reference():
    """A reference read in bfloat16 becomes a float32 policy exactly, with a mix of 1."""
    moving = MovingReference(every=1, mix=1.0)
    start = {"a": jnp.array([1.0, -2.0], jnp.bfloat16)}
    policy = {"a": jnp.array([1.0 + 2.0**-12, -2.0 - 2.0**-11], jnp.float32)}
    update = Update(
        **dict(step=jnp.int32(1), trained=policy, frozen={"a": None}, opt_state=None, extras=start),
        **dict(loss=jnp.zeros(()), grad_norm=jnp.zeros(())),
    )
    reference = moving.objective_extras(start, moving.update(moving.init(policy), update))
    np.testing.assert_array_equal(reference["a"], policy["a"])
