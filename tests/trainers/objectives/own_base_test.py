"""The policy without its adapters as the reference: the values of a second model, without its parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.adapters import adapter
from espalier.model.adapters.lora import Lora
from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.mov.mov import Mov
from espalier.model.transformer import Block, Transformer
from espalier.trainers import partitioning, trainable
from espalier.trainers.checkpoints import base_step, state_tree
from espalier.trainers.inputs import PackedPairs
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint, FrozenModel
from espalier.trainers.objectives.own_base import OwnBase, without_adapters
from espalier.trainers.preference.losses import direct
from espalier.trainers.preference.objectives.preference import preference
from espalier.trainers.recipe import Recipe
from tests.trainers.preference.objectives.preference_test import VOCAB, batch_of, pairs

CONFIG = TransformerConfig(
    vocab_size=VOCAB, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, scan_layers=False
)
# A mixture too: its router runs in the policy and not in the reference.
ADAPTERS = adapter.named(
    lora=functools.partial(Lora, layers=(".*/attention/.*",), rank=2),
    mov=functools.partial(Mov, outputs=(), num_experts=3),
)
POLICY = Transformer(
    config=CONFIG,
    block=functools.partial(
        Block,
        attention=functools.partial(Attention, adapters=ADAPTERS),
        mlp=functools.partial(GatedMlp, adapters=ADAPTERS),
    ),
)
BASE = Transformer(config=CONFIG)


def parameters():
    init = jax.jit(POLICY.init)(jax.random.key(0), jnp.zeros((1, 4), int))
    params = nn.meta.unbox(init)["params"]
    return jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)


def test_the_base_of_the_policy_is_the_reference_of_dpo_and_gets_no_gradient():
    params, batch = parameters(), batch_of([[pair] for pair in pairs()], slots=1)
    losses = [functools.partial(direct.dpo, beta=0.5)]
    own = preference(model=POLICY, losses=losses, reference=OwnBase(model=POLICY))
    checkpoint = FrozenCheckpoint(macro="REFERENCE", path="x", model_dir="y")
    frozen = FrozenModel(model=BASE, checkpoint=checkpoint)
    other = preference(model=POLICY, losses=losses, reference=frozen)
    base = without_adapters(params)
    assert set(state_tree.flatten(base)) == {
        name for name in state_tree.flatten(params) if "adapter_" not in name
    }

    def loss(objective, extras, params):
        out = objective(params, batch, None, extras=extras)
        return out.sum, out.metrics["log_ratio/margin"][0]

    extras = own.stored_extras.read(None, None)
    assert not jax.tree.leaves(extras)
    of_own = jax.jit(jax.value_and_grad(functools.partial(loss, own, extras), has_aux=True))
    of_other = jax.jit(jax.value_and_grad(functools.partial(loss, other, base), has_aux=True))
    (value, margin), gradients = of_own(params)
    (expected, _), wanted = of_other(params)
    assert abs(margin) > 0.01
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), gradients, wanted)


def test_a_policy_without_adapters_is_no_reference_of_itself():
    OwnBase(model=POLICY).check(None, None, {})
    with pytest.raises(ValueError, match=r"methods/adapters/"):
        OwnBase(model=BASE).check(None, None, {})


def test_a_reference_does_not_move_with_the_base_of_a_policy():
    reference, params = OwnBase(model=POLICY), parameters()
    reference.check_trained(params, trainable.match([adapter.LEAVES], params))
    for mask in (None, trainable.match([adapter.LEAVES, ".*norm/scale"], params)):
        with pytest.raises(ValueError, match="would move with .*: train adapters alone"):
            reference.check_trained(params, mask)
    losses = [functools.partial(direct.dpo, beta=0.5)]
    recipe = Recipe(
        model=POLICY,
        batch_size=1,
        inputs=PackedPairs({"targets": 8}, stored_reference=False),
        optimizer=optax.sgd,
        learning_rate=0.1,
        objective=functools.partial(preference, losses=losses, reference=reference),
    )
    with pytest.raises(ValueError, match="would move with"):
        recipe.program(devices=jax.devices()[:1]).check_extras()


def test_a_reference_without_a_checkpoint_yet_is_the_base():
    """So that a step can be compiled; with one, adapters are read that it has."""
    checkpoint = FrozenCheckpoint(macro="REFERENCE", path="/no/such/run", model_dir="y")
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    rules = partitioning.rules_named("dp")
    abstract = FrozenModel(model=POLICY, checkpoint=checkpoint).abstract(mesh, rules)
    leaves = state_tree.flatten(abstract)
    assert leaves and not any("adapter_" in name for name in leaves)
    everything = {
        trainable.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(parameters())
    }
    assert set(
        state_tree.flatten(base_step.present(parameters(), everything, base_step.added({})))
    ) == set(everything)
