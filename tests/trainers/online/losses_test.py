"""Losses and advantages of policy gradients against TRL's numbers, float64 and limits."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.trainers.online import losses as pg
from espalier.trainers.online.losses import PolicyTokens

GOLDENS = json.loads(
    (pathlib.Path(__file__).parents[1] / "goldens" / "trl_policy_gradient.json").read_text()
)
MASK = np.array(GOLDENS["mask"])
RNG = np.random.default_rng(0)


def tokens():
    arrays = {
        name: jnp.asarray(GOLDENS[name], jnp.float32)
        for name in ("log_probs", "old_log_probs", "reference_log_probs", "mask")
    }
    advantages = jnp.asarray(GOLDENS["advantages"], jnp.float32)[:, None] * arrays["mask"]
    return PolicyTokens(advantages=advantages, **arrays)


@pytest.mark.parametrize("name", GOLDENS["cases"])
def test_losses_and_gradients_are_those_of_trl(name):
    case = GOLDENS["cases"][name]

    def mean(log_probs):
        given = tokens().replace(log_probs=log_probs)
        settings = case["settings"]
        if name == "rloo":
            total, weight = pg.rloo(given)
        elif name == "cispo":
            # TRL's epsilon_high is the largest weight there.
            total, weight = pg.cispo(
                given, clip_high=settings["epsilon_high"] - 1, beta=settings["beta"]
            )
        else:
            total, weight = pg.grpo(
                given,
                beta=settings.get("beta", 0.0),
                clip=settings.get("epsilon_low", 0.2),
                clip_high=settings.get("epsilon_high"),
                reduction=settings.get("loss_type", "grpo"),
                max_length=MASK.shape[1] + 2,
                ratio="completion" if name == "gspo" else "token",
            )
        return total / weight

    loss, gradient = jax.value_and_grad(mean)(tokens().log_probs)
    np.testing.assert_allclose(loss, case["loss"], rtol=2e-6)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=2e-5, atol=1e-7)


def test_microbatches_change_no_loss():
    """Numerators and weights add up, except where each microbatch counts its own tokens."""
    whole = tokens()
    parts = [jax.tree.map(lambda x, at=at: x[at::2], whole) for at in (0, 1)]
    for loss in (
        pg.rloo,
        pg.cispo,
        lambda given: pg.grpo(given, ratio="completion"),
        *(
            lambda given, r=r: pg.grpo(given, reduction=r, max_length=9)
            for r in ("grpo", "dapo", "dr_grpo")
        ),
    ):
        total, weight = loss(whole)
        halves = [loss(part) for part in parts]
        np.testing.assert_allclose(sum(h[0] for h in halves), total, rtol=1e-5)
        np.testing.assert_allclose(sum(h[1] for h in halves), weight, rtol=1e-6)
    own = [pg.grpo(part, reduction="dapo") for part in parts]
    expected = np.mean([float(total / weight) for total, weight in own])
    halves = [pg.grpo(part, reduction="bnpo") for part in parts]
    found = sum(h[0] for h in halves) / sum(h[1] for h in halves)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rows_without_tokens_count_nothing():
    whole = tokens()
    wider = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), whole)
    for loss in (pg.rloo, pg.ppo, lambda given: pg.grpo(given, reduction="bnpo")):
        np.testing.assert_allclose(loss(wider), loss(whole), rtol=1e-6)


def test_the_first_update_has_the_gradient_of_reinforce():
    """Where policy and sampler are one, d loss / d log p = -A / tokens, whatever the clip."""
    given = tokens()

    def mean(log_probs):
        total, weight = pg.grpo(
            given.replace(log_probs=log_probs, old_log_probs=given.log_probs), reduction="dapo"
        )
        return total / weight

    gradient = jax.grad(mean)(given.log_probs)
    np.testing.assert_allclose(gradient, -given.advantages / MASK.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "slope"),
    [(0.5, 1.0, 0.0), (-0.5, 1.0, 1.0), (0.5, -1.0, 1.0), (-0.5, -1.0, 0.0)],
)
def test_clips_stop_what_has_gone_far_enough(log_ratio, advantage, slope):
    gradient = jax.grad(lambda x: pg.clipped(x, advantage, 0.2, 0.2))(jnp.float32(log_ratio))
    assert gradient == pytest.approx(-slope * advantage * np.exp(log_ratio), rel=1e-6)


def test_advantages_against_float64():
    rewards = RNG.normal(size=(5, 4))
    mean, std = rewards.mean(1, keepdims=True), rewards.std(1, ddof=1, keepdims=True)
    single = jnp.asarray(rewards, jnp.float32)
    np.testing.assert_allclose(
        pg.group_normalised(single), (rewards - mean) / (std + 1e-4), rtol=1e-5
    )
    np.testing.assert_allclose(pg.group_centred(single), rewards - mean, atol=1e-6)
    others = [[np.delete(row, i).mean() for i in range(4)] for row in rewards]
    np.testing.assert_allclose(pg.leave_one_out(single), rewards - others, rtol=1e-5, atol=1e-6)
    equal = jnp.full((2, 3), 0.7)
    for advantages in (pg.group_normalised, pg.group_centred, pg.leave_one_out):
        np.testing.assert_allclose(advantages(equal), 0, atol=1e-3)


def returns_of(rewards, gamma):
    found = np.zeros(len(rewards) + 1)
    for t in range(len(rewards) - 1, -1, -1):
        found[t] = rewards[t] + gamma * found[t + 1]
    return found[:-1]


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_generalised_advantages_against_sums_of_errors(decay):
    """By definition the sum over l of (gamma lambda)^l delta_{t+l}; returns less values for lambda = 1."""
    gamma, lengths, first = 0.9, (5, 1, 3), (0, 2, 1)
    mask = np.zeros((3, 6))
    for row, (size, at) in enumerate(zip(lengths, first, strict=True)):
        mask[row, at : at + size] = 1
    rewards, values = RNG.normal(size=(2, 3, 6))
    expected = np.zeros_like(mask)
    for row in range(3):
        at = np.flatnonzero(mask[row])
        r, v = rewards[row, at], np.append(values[row, at], 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        expected[row, at] = returns_of(delta, gamma * decay)
        if decay == 1:
            np.testing.assert_allclose(expected[row, at], returns_of(r, gamma) - v[:-1])
    single = [jnp.asarray(x, jnp.float32) for x in (rewards, values, mask)]
    found = pg.generalised_advantages(*single, gamma=gamma, decay=decay)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    white = np.asarray(pg.whitened(found, single[2]))[mask > 0]
    np.testing.assert_allclose([white.mean(), white.var()], [0, 1], atol=1e-5)


def test_values_and_divergence_against_float64():
    new, old, target = RNG.normal(size=(3, 4, 5))
    near = old + np.clip(new - old, -0.2, 0.2)
    expected = 0.5 * np.maximum((new - target) ** 2, (near - target) ** 2)
    single = [jnp.asarray(x, jnp.float32) for x in (new, old, target)]
    np.testing.assert_allclose(pg.value_loss(*single), expected, rtol=1e-4, atol=1e-6)
    p, q = -np.abs(new), -np.abs(old)
    np.testing.assert_allclose(
        pg.k3(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)),
        np.exp(q - p) - (q - p) - 1,
        rtol=1e-3,
        atol=1e-6,
    )
    # Averaged over samples of p it is the divergence.
    probs, others = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    estimates = pg.k3(jnp.log(jnp.asarray(probs)), jnp.log(jnp.asarray(others)))
    np.testing.assert_allclose(
        (probs * np.asarray(estimates)).sum(), (probs * np.log(probs / others)).sum(), rtol=1e-5
    )


def test_settings_that_cannot_be():
    given = tokens()
    for settings, words in (
        ({"clip": 0.0}, "clip"),
        ({"reduction": "mean"}, "reduction"),
        ({"reduction": "dr_grpo"}, "max_length = None"),
        ({"beta": -1.0}, "beta"),
        ({"ratio": "sequence"}, "ratio"),
        ({"ratio": "completion", "reduction": "dapo"}, "weighs the one ratio"),
    ):
        with pytest.raises(ValueError, match=words):
            pg.grpo(given, **settings)
    with pytest.raises(ValueError, match="bind REFERENCE"):
        pg.grpo(given.replace(reference_log_probs=None), beta=0.1)
