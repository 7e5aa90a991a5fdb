"""Policy gradients of a policy with two tokens, against closed forms."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.linear import dropped
from espalier.model.protocol import OfLayers
from espalier.trainers.inputs import pack
from espalier.trainers.online import losses
from espalier.trainers.online.policy_gradient import actor_critic, policy_gradient

START, A, B = 0, 0, 1
REWARD = {A: 2.0, B: -1.0}


class TwoTokens(OfLayers, nn.Module):
    """softcap(scale * logits) of two tokens, whatever the prefix."""

    logit_scale = 0.5
    logit_softcap: float | None = None

    def setup(self):
        self.table = self.param("table", nn.initializers.zeros, (2, 1))

    def layer_settings(self):
        return ()

    def hidden(self, tokens_BT, positions_BT=None, segments_BT=None):
        del positions_BT, segments_BT
        return types.SimpleNamespace(hidden_BTD=jnp.ones((*tokens_BT.shape, 1)))

    def head_VD(self):
        return self.table

    def values(self, hidden_BTD):
        return jnp.zeros(hidden_BTD.shape[:2])


def batch_of(tokens, advantages):
    """One completion of one token in each row."""
    rows = pack([[([START], [token])] for token in tokens], np.zeros(len(tokens)), length=1)
    zeros = np.zeros((len(tokens), 1), np.float32)
    return {
        **rows,
        "advantages": np.asarray(advantages, np.float32),
        "rewards": np.asarray([REWARD[token] for token in tokens], np.float32),
        "ended": np.ones(len(tokens), np.float32),
        "old_values": zeros,
        "returns": zeros,
    }


OBJECTIVES = {
    "grpo": functools.partial(policy_gradient, loss=losses.grpo),
    "rloo": functools.partial(policy_gradient, loss=losses.rloo),
    "ppo": actor_critic,
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_expected_reward_of_the_sampled_policy(
    name, temperature, softcap
):
    """d E[R] / d table_a, with p = sigmoid((z_a - z_b) / t): p (1 - p) (R_a - R_b) / t times dz_a / d table_a."""
    # p = 1/4, so that four rows are the distribution itself.
    log_odds, model = -np.log(3.0), TwoTokens(logit_softcap=softcap)
    z = np.array([log_odds * temperature, 0.0])
    slope = model.logit_scale * (1.0 if softcap is None else 1 - (z[0] / softcap) ** 2)
    before = z if softcap is None else softcap * np.arctanh(z / softcap)
    params = {"table": jnp.asarray(before / model.logit_scale, jnp.float32)[:, None]}
    tokens = [A, B, B, B]
    mean = np.mean([REWARD[token] for token in tokens])
    batch = batch_of(tokens, [REWARD[token] - mean for token in tokens])
    objective = OBJECTIVES[name](model=model, temperature=temperature)

    def loss(params):
        out = objective(params, batch, None)
        return out.sum / out.weight

    expected = 0.25 * 0.75 * (REWARD[A] - REWARD[B]) / temperature * slope
    np.testing.assert_allclose(-jax.grad(loss)(params)["table"][A, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_ratio_is_that_of_the_sampled_policies(name):
    """exp of the difference of log softmax(z / t); at temperature 1 it would be another."""
    temperature = 0.5
    model = TwoTokens()
    params = {"table": jnp.array([[0.3], [-0.4]])}
    z = model.logit_scale * np.asarray(params["table"], np.float64)[:, 0] / temperature
    log_probs = z - np.log(np.exp(z).sum())
    old = np.log(np.array([0.6, 0.4]))
    batch = batch_of([A, B], [1.0, -1.0])
    batch["old_log_probs"] = old.astype(np.float32)[:, None]
    out = OBJECTIVES[name](model=model, temperature=temperature)(params, batch, None)
    ratio = out.metrics["ratio"]
    np.testing.assert_allclose(ratio[0] / ratio[1], np.exp(log_probs - old).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dropout_is_refused_since_the_sampler_has_none(name):
    class Dropping(TwoTokens):
        rate: float = 0.1

        def hidden(self, tokens_BT, positions_BT=None, segments_BT=None):
            out = super().hidden(tokens_BT)
            return types.SimpleNamespace(hidden_BTD=dropped(self, out.hidden_BTD, self.rate))

    params, batch = {"table": jnp.zeros((2, 1))}, batch_of([A, B], [1.0, -1.0])
    batch["old_log_probs"] = np.full((2, 1), np.log(0.5), np.float32)
    refusing = OBJECTIVES[name](model=Dropping())
    with pytest.raises(ValueError, match="^The model draws .*DROPOUT_RATE = 0.0"):
        refusing(params, batch, jax.random.key(0))
    out = OBJECTIVES[name](model=Dropping(rate=0.0))(params, batch, jax.random.key(0))
    assert float(out.metrics["ratio"][0] / out.metrics["ratio"][1]) == pytest.approx(1)
