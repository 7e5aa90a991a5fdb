"""Activations against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp, Mlp
from espalier.trainers import trainable

CONFIG = TransformerConfig(vocab_size=7, num_layers=1, embed_dim=4, num_heads=1, mlp_dim=4)


@pytest.mark.parametrize("target", [Mlp, GatedMlp])
def test_xielu_is_the_papers_function_and_its_two_parameters_are_trained(target):
    """arXiv 2411.13010, in float64, of identity projections; the constants have no gradient and are no parameters."""
    mlp = target(config=CONFIG, activation="xielu")
    x_BTD = jnp.linspace(-3, 3, 12).reshape(1, 3, 4)
    boxed = jax.eval_shape(mlp.init, jax.random.key(0), x_BTD)["params"]
    params = {name: {"kernel": jnp.eye(4)} for name in boxed if name in ("gate", "up", "down")}
    params |= {"alpha_p": jnp.array([0.3]), "alpha_n": jnp.array([-0.7])}
    params |= {"beta": jnp.array([0.5]), "eps": jnp.array([-1e-6])}

    def apply(params):
        return mlp.apply({"params": params}, x_BTD)

    x = np.asarray(x_BTD, np.float64)
    p, n = np.log1p(np.exp(0.3)), 0.5 + np.log1p(np.exp(-0.7))
    below = n * (np.expm1(np.minimum(x, -1e-6)) - x)
    want = np.where(x > 0, p * x * x, below) + 0.5 * x
    np.testing.assert_allclose(apply(params), want * x if mlp.gated else want, rtol=2e-6, atol=1e-6)
    gradients = jax.grad(lambda params: apply(params).sum())(params)
    trained = trainable.mask_of([], boxed)
    for name in ("alpha_p", "alpha_n", "beta", "eps"):
        assert trained[name] == bool(gradients[name][0]) == name.startswith("alpha"), name
