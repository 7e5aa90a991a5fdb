"""Routing against loops in float64 and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.moe import routing

E, K = 5, 2


@pytest.fixture(scope="module")
def routed():
    """Logits of two rows of tokens, some of them padding, and what routing makes of them."""
    logits = 2.0 * jax.random.normal(jax.random.key(0), (2, 9, E))
    probs = jax.nn.softmax(logits)
    real = jnp.arange(9).reshape(1, -1) < jnp.array([[9], [4]])
    return logits, probs, routing.route(probs, top_k=K), real


def tokens(routed):
    """(logits, probabilities, experts) of each real token, in float64."""
    logits, _, routes, real = routed
    for at in zip(*np.nonzero(real), strict=True):
        exp = np.exp(np.asarray(logits[at], np.float64))
        yield np.asarray(logits[at], np.float64), exp / exp.sum(), np.asarray(routes.experts_MK[at])


def test_the_most_probable_experts_are_chosen(routed):
    _, probs, routes, _ = routed
    want = np.argsort(-np.asarray(probs), axis=-1, kind="stable")[..., :K]
    np.testing.assert_array_equal(routes.experts_MK, want)
    raw = routing.route(probs, top_k=K, renormalise=False)
    np.testing.assert_array_equal(raw.experts_MK, want)
    np.testing.assert_array_equal(raw.weights_MK, np.take_along_axis(np.asarray(probs), want, -1))


def test_renormalised_weights_are_the_softmax_over_the_chosen(routed):
    """The two orders, softmax before and after the choice, are one."""
    logits, _, routes, _ = routed
    chosen = np.take_along_axis(np.asarray(logits, np.float64), np.asarray(routes.experts_MK), -1)
    want = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    np.testing.assert_allclose(routes.weights_MK, want, rtol=1e-5)


def test_soft_routing_mixes_all_by_their_probabilities(routed):
    _, probs, _, _ = routed
    routes = routing.route(probs, top_k=E, renormalise=False)
    back = np.zeros(probs.shape)
    np.put_along_axis(back, np.asarray(routes.experts_MK), np.asarray(routes.weights_MK), -1)
    np.testing.assert_array_equal(back.astype(np.float32), probs)


def test_an_order_chooses_and_does_not_weigh(routed):
    _, probs, _, _ = routed
    order = -probs
    want = np.argsort(np.asarray(probs), axis=-1, kind="stable")[..., :K]
    routes = routing.route(probs, top_k=K, renormalise=False, order_ME=order)
    np.testing.assert_array_equal(routes.experts_MK, want)
    np.testing.assert_array_equal(
        routes.weights_MK, np.take_along_axis(np.asarray(probs), want, -1)
    )
    gone = routing.route(jnp.zeros((1, E)), top_k=K, order_ME=order[0, :1])
    np.testing.assert_array_equal(gone.weights_MK, 0.0)  # sums of 0 divide nothing


@pytest.mark.parametrize(("renormalise", "learns"), [(False, True), (True, False)])
def test_renormalised_top_1_teaches_the_router_nothing(routed, renormalise, learns):
    def weight(logits):
        routes = routing.route(jax.nn.softmax(logits), top_k=1, renormalise=renormalise)
        return routes.weights_MK.sum()

    largest = float(jnp.abs(jax.grad(weight)(routed[0])).max())
    assert largest > 1e-3 if learns else largest < 2e-7  # float32's rounding of 1 - 1


def test_losses_and_statistics_of_real_tokens(routed):
    logits, probs, routes, real = routed
    kept = routes.experts_MK != 3
    every = list(tokens(routed))
    load, mean_probs = np.zeros(E), np.zeros(E)
    z_loss = entropy = top = dropped = 0.0
    for token_logits, token_probs, experts in every:
        mean_probs += token_probs / len(every)
        z_loss += np.log(np.exp(token_logits).sum()) ** 2 / len(every)
        entropy -= (token_probs * np.log(token_probs)).sum() / len(every)
        top += token_probs.max() / len(every)
        for expert in experts:
            load[expert] += 1 / (len(every) * K)
            dropped += (expert == 3) / (len(every) * K)
    balance = routing.balance_loss(probs, routes.experts_MK, real)
    assert float(balance) == pytest.approx(E * (load * mean_probs).sum(), rel=1e-5)
    assert float(routing.z_loss(logits, real)) == pytest.approx(z_loss, rel=1e-5)
    found = routing.statistics(probs, routes.experts_MK, kept, real)
    np.testing.assert_allclose(found["load"], load, atol=1e-6)
    want = {"load_max": load.max(), "entropy": entropy, "top_probability": top, "dropped": dropped}
    assert {name: float(found[name]) for name in want} == pytest.approx(want, rel=1e-5)
    assert 0 < dropped < 1


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_uniform_router_has_balance_1_and_z_loss_log_e_squared(top_k):
    logits, real = jnp.zeros((7, E)), jnp.ones(7, bool)
    probs = jax.nn.softmax(logits)
    experts = routing.route(probs, top_k=top_k).experts_MK
    assert float(routing.balance_loss(probs, experts, real)) == pytest.approx(1.0, rel=1e-6)
    assert float(routing.z_loss(logits, real)) == pytest.approx(np.log(E) ** 2, rel=1e-6)


def test_a_collapsed_router_has_balance_e():
    probs = jax.nn.one_hot(jnp.full(7, 2), E)
    experts = routing.route(probs, top_k=1).experts_MK
    found = routing.statistics(probs, experts, experts < E, jnp.ones(7, bool))
    assert float(routing.balance_loss(probs, experts, jnp.ones(7, bool))) == E
    assert float(found["load_max"]) == 1.0 and float(found["entropy"]) == 0.0


def test_the_balance_loss_pushes_probability_away_from_the_loaded_expert():
    def loss(logits):
        probs = jax.nn.softmax(logits)
        return routing.balance_loss(probs, jnp.full((7, 1), 2), jnp.ones(7, bool))

    gradient = jax.grad(loss)(jnp.zeros((7, E)))
    assert (gradient[:, 2] > 0).all() and (np.delete(gradient, 2, axis=1) < 0).all()


def test_padding_alone_is_zero_everywhere(routed):
    logits, probs, routes, _ = routed
    none = jnp.zeros(logits.shape[:-1], bool)
    assert float(routing.balance_loss(probs, routes.experts_MK, none)) == 0.0
    assert float(routing.z_loss(logits, none)) == 0.0


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_the_first_in_line_are_kept_row_by_row(count):
    experts = np.random.default_rng(0).integers(0, 4, (3, 8, K))
    got = routing.first_in_line(jnp.asarray(experts), count, none=4)
    for row, got_row in zip(experts, np.asarray(got), strict=True):
        taken = dict.fromkeys(range(4), 0)
        for token, got_token in zip(row, got_row, strict=True):
            for expert, found in zip(token, got_token, strict=True):
                assert found == (expert if taken[expert] < count else 4)
                taken[expert] += 1
