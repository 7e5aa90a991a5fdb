"""What Cohere's models must obey whatever their weights (arXiv 2405.15032; Command R7B for Cohere2)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import LayerKind
from espalier.model.hf import registry
from espalier.model.kv_cache.full import FullCache
from espalier.model.transforms import layer_stack
from tests.drawn import drawn

WINDOW = 5
CONFIG = {
    "model_type": "cohere",
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rope_theta": 10000.0,
    "logit_scale": 0.25,
}
CONFIG2 = {**CONFIG, "model_type": "cohere2", "sliding_window": WINDOW}
TOKENS = jax.random.randint(jax.random.key(5), (2, 13), 0, 31)


@functools.cache
def made(model_type, **fields):
    """A model whose gains are not 1, with unrolled layers, and its program."""
    config = (CONFIG2 if model_type == "cohere2" else CONFIG) | fields
    if "layer_types" in config:
        config["layer_types"] = list(config["layer_types"])
    model = layer_stack.unrolled(registry.family_of_config(config).model(config))
    params = nn.unbox(drawn(model, TOKENS))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(tree, leaves), jax.jit(model.apply)


@pytest.mark.parametrize("prompt", [WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("model_type", ["cohere", "cohere2"])
def test_decoding_across_the_window_is_the_full_forward_pass(model_type, prompt):
    model, params, apply = made(model_type)
    want = apply({"params": params}, TOKENS)
    config, policy = model.config, FullCache()
    states = [
        policy.init(
            batch=2,
            length=TOKENS.shape[1],
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.per_head_dim,
            dtype="float32",
            layer=layer,
            num_layers=config.num_layers,
            kind=config.layer_kind(layer),
        )
        for layer in range(config.num_layers)
    ]

    @jax.jit
    def read(states, tokens_BT, positions_BT):
        out = model.apply(
            {"params": params},
            tokens_BT,
            positions_BT=positions_BT,
            caches=states,
            policy=policy,
            method="hidden",
        )
        logits = model.apply({"params": params}, out.hidden_BTD, method="logits")
        return logits, out.caches

    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    logits, states = read(states, TOKENS[:, :prompt], positions[:, :prompt])
    np.testing.assert_allclose(logits, want[:, :prompt], atol=1e-5)
    for i in range(prompt, TOKENS.shape[1]):
        logits, states = read(states, TOKENS[:, i : i + 1], positions[:, i : i + 1])
        np.testing.assert_allclose(logits[:, 0], want[:, i], atol=1e-5)


def test_windows_and_rotation_alternate_in_cohere2():
    model, _, _ = made("cohere2")
    sliding = LayerKind(window=WINDOW)
    kinds = [model.config.layer_kind(i) for i in range(4)]
    assert kinds == [sliding, sliding, sliding, LayerKind(rope=False)]


@pytest.mark.parametrize("fields", [{}, {"use_qk_norm": True}])
def test_shifting_all_positions_changes_nothing(fields):
    """Rotation is relative: scores depend on distances."""
    _, params, apply = made("cohere", **fields)
    positions = jnp.broadcast_to(jnp.arange(13), (2, 13))
    here, there, mixed = (
        apply({"params": params}, TOKENS, positions_BT=at)
        for at in (positions, positions + 77, positions[:, ::-1])
    )
    np.testing.assert_allclose(here, there, atol=1e-4)
    assert np.abs(here - mixed).max() > 1e-2


def test_layers_that_see_all_have_no_positions_in_cohere2():
    _, params, apply = made("cohere2", layer_types=("full_attention",) * 4)
    positions = jax.random.permutation(jax.random.key(3), 13)[None].repeat(2, 0)
    plain = apply({"params": params}, TOKENS)
    np.testing.assert_array_equal(apply({"params": params}, TOKENS, positions_BT=positions), plain)


def test_a_constant_added_to_a_blocks_input_passes_by_its_branches():
    """LayerNorm takes the mean away, so attention and MLP see nothing of it."""
    model, params, _ = made("cohere")
    block = model.block(config=model.config, kind=LayerKind(), name="block_0")
    x_BTD = jax.random.normal(jax.random.key(2), (2, 13, 24))
    positions = jnp.broadcast_to(jnp.arange(13), (2, 13))

    @jax.jit
    def branches(x_BTD):
        variables = {"params": params["layers"]["block_0"]}
        return block.apply(variables, x_BTD, positions_BT=positions)[0] - x_BTD

    np.testing.assert_allclose(branches(x_BTD + 3.0), branches(x_BTD), atol=1e-5)
    assert np.abs(branches(2.0 * x_BTD + x_BTD[:, :, ::-1]) - branches(x_BTD)).max() > 1e-2


def test_doubling_the_logit_scale_doubles_the_logits():
    _, params, apply = made("cohere")
    _, _, doubled = made("cohere", logit_scale=0.5)
    here, there = (f({"params": params}, TOKENS) for f in (apply, doubled))
    np.testing.assert_allclose(there, 2 * here, rtol=1e-6)
    np.testing.assert_array_equal(here.argmax(-1), there.argmax(-1))


def test_gains_of_query_and_key_norms_are_of_each_head():
    _, params, _ = made("cohere", use_qk_norm=True)
    attention = params["layers"]["block_0"]["attention"]
    assert attention["query_norm"]["scale"].shape == (3, 8)
    assert attention["key_norm"]["scale"].shape == (1, 8)
