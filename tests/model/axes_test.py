"""Activation axes: constrained by the active rules, and no misspelt name passes silently."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import axes
from espalier.trainers import partitioning

RULES = partitioning.RULE_SETS["fsdp_tp_sp"]


@pytest.fixture
def mesh():
    return partitioning.make_mesh(shape={"fsdp": 2, "tensor": 4})


def test_constrained_activations_are_split_as_the_rules_say(mesh):
    x_BTD = jnp.arange(4 * 8 * 16.0).reshape(4, 8, 16)
    with partitioning.use_mesh(mesh, RULES):
        found = jax.jit(lambda x: axes.constrain(x, axes.BATCH, axes.LENGTH, axes.ACT_EMBED))(x_BTD)
    assert found.sharding.shard_shape(found.shape) == (2, 2, 16)
    np.testing.assert_array_equal(found, x_BTD)


@pytest.mark.parametrize("name", axes.ACTIVATION_AXES)
def test_every_activation_axis_is_constrained_by_its_own_rule(mesh, name):
    x = jnp.arange(8.0)
    with partitioning.use_mesh(mesh, RULES):
        found = jax.jit(lambda x: axes.constrain(x, name))(x)
    whole = (axes.LOOKUP_BATCH, axes.INNER_LENGTH, axes.ACT_EMBED)
    split = 2 if name == axes.BATCH else 1 if name in whole else 4
    assert found.sharding.shard_shape(found.shape) == (8 // split,)


@pytest.mark.parametrize("set_name", sorted(partitioning.RULE_SETS))
def test_an_unknown_name_is_one_error_that_says_what_is_known(mesh, set_name):
    rules = partitioning.rules_named(set_name)
    x_BTD = jnp.zeros((4, 8, 16))
    with partitioning.use_mesh(mesh, rules), pytest.raises(ValueError) as raised:
        jax.jit(lambda x: axes.constrain(x, axes.BATCH, "act_lenght", None))(x_BTD)
    message = str(raised.value)
    assert message.startswith("Activation axes ['act_lenght'] have no rule")
    assert f"'{axes.LENGTH}'" in message


def test_all_unknown_names_come_at_once(mesh):
    with (
        partitioning.use_mesh(mesh, RULES),
        pytest.raises(ValueError, match=r"\['act_batsh', 'act_emed'\]"),
    ):
        axes.constrain(jnp.zeros((4, 8, 16)), "act_batsh", axes.LENGTH, "act_emed")


def test_without_rules_nothing_is_constrained():
    x = jnp.arange(8.0)
    assert not nn.get_logical_axis_rules()
    assert axes.constrain(x, axes.BATCH) is x


def test_no_two_axes_have_one_name_and_activations_are_told_from_parameters():
    assert len(set(axes.ALL_AXES)) == len(axes.ALL_AXES)
    assert all(name.startswith("act_") for name in axes.ACTIVATION_AXES)
    assert not any(name.startswith("act_") for name in axes.PARAMETER_AXES)
