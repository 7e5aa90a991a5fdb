"""The projection router against float64, its limits, and that embeddings of domains are never trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from espalier.model.bam.moa import MixtureOfAttention
from espalier.model.config import TransformerConfig
from espalier.model.linear import Dense
from espalier.model.mlp import GatedMlp
from espalier.model.moe import moe, routing
from espalier.model.moe.moe import MoeMlp
from espalier.model.nexus.domain_router import (
    DomainRouter,
    down_std,
    expert_vectors,
    level,
    random_directions,
)
from espalier.model.transformer import Block, Transformer
from espalier.trainers.recipe import Recipe

WIDTH, DOMAIN_DIM, EXPERTS = 8, 5, 4
CONFIG = TransformerConfig(num_layers=2, embed_dim=WIDTH, num_heads=2, mlp_dim=6, vocab_size=16)
X_BTD = jax.random.normal(jax.random.key(0), (2, 6, WIDTH))


def make_router(experts=EXPERTS, **settings):
    return DomainRouter(
        features=experts, axes=("embed", "unmodeled"), domain_dim=DOMAIN_DIM, **settings
    )


@pytest.fixture(scope="module")
def params():
    """A router's, of logits that are not small."""
    found = jax.jit(make_router(logit_std=2.0).init)(jax.random.key(1), X_BTD)["params"]
    return jax.tree.map(
        lambda x: getattr(x, "value", x), found, is_leaf=lambda x: hasattr(x, "value")
    )


def logits(params, experts=EXPERTS, x=X_BTD):
    return np.asarray(jax.jit(make_router(experts).apply)({"params": params}, x))


def projection_router(**given):
    return DomainRouter(**given, domain_dim=DOMAIN_DIM)


def moe_of(params, kernels, router=projection_router, x=X_BTD):
    """What a layer of given experts [E, ...], the first of which is also shared, makes of a router's parameters."""
    experts = len(kernels["gate"]["kernel"])
    mlp = MoeMlp(
        config=CONFIG,
        num_experts=experts,
        top_k=1,
        renormalise=False,
        router=router,
        shared=GatedMlp,
    )
    shared = {name: {"kernel": tree["kernel"][0]} for name, tree in kernels.items()}
    return jax.jit(mlp.apply)({"params": {**kernels, "shared": shared, "router": params}}, x)


def ffns(seed, experts=EXPERTS):
    shapes = {"gate": (WIDTH, 6), "up": (WIDTH, 6), "down": (6, WIDTH)}
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        name: {"kernel": jax.random.normal(key, (experts, *shape))}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def test_logits_are_those_of_the_vectors_computed_in_float64(params):
    vectors_ED = expert_vectors(params, params["domains"])
    gate, up, down = (np.asarray(params[x]["kernel"], np.float64) for x in ("gate", "up", "down"))
    for vector, domain in zip(vectors_ED, np.asarray(params["domains"], np.float64), strict=True):
        inner = domain @ gate
        np.testing.assert_allclose(vector, (inner / (1 + np.exp(-inner)) * (domain @ up)) @ down)
    np.testing.assert_allclose(logits(params), np.asarray(X_BTD) @ vectors_ED.T, atol=1e-5)


def test_one_more_domain_changes_no_logit_and_scales_the_old_probabilities_alike(params):
    old = logits({**params, "domains": params["domains"][:-1]}, EXPERTS - 1)
    new = logits(params)
    np.testing.assert_array_equal(new[..., :-1], old)
    before, after = jax.nn.softmax(old), jax.nn.softmax(new)
    np.testing.assert_allclose(after[..., :-1], before * (1 - after[..., -1:]), atol=1e-6)
    chosen, was = after.argmax(-1), before.argmax(-1)
    assert np.all((chosen == was) | (chosen == EXPERTS - 1))


def test_equal_domains_have_equal_logits_and_none_has_none(params):
    domains = params["domains"].at[2].set(params["domains"][0]).at[1].set(0.0)
    found = logits({**params, "domains": domains})
    np.testing.assert_array_equal(found[..., 2], found[..., 0])
    np.testing.assert_array_equal(found[..., 1], 0.0)


def test_experts_and_domains_in_another_order_are_the_same_layer(params):
    kernels, order = ffns(3), np.array([2, 0, 3, 1])
    there = jax.tree.map(lambda x: x[order], kernels)
    shared_first = {name: {"kernel": tree["kernel"]} for name, tree in there.items()}
    mlp = MoeMlp(
        config=CONFIG,
        num_experts=EXPERTS,
        top_k=1,
        renormalise=False,
        router=projection_router,
    )
    apply = jax.jit(mlp.apply)
    here = apply({"params": {**kernels, "router": params}}, X_BTD)
    moved = {**shared_first, "router": {**params, "domains": params["domains"][order]}}
    np.testing.assert_allclose(apply({"params": moved}, X_BTD), here, atol=1e-5)


def test_copies_of_one_ffn_give_it_once_and_by_the_gate(params, monkeypatch):
    small = jax.tree.map(lambda x: x / 4, ffns(4, 1))  # outputs of about 1
    kernels = jax.tree.map(lambda x: jnp.repeat(x, EXPERTS, axis=0), small)
    dense = {name: {"kernel": tree["kernel"][0]} for name, tree in small.items()}
    ffn = jax.jit(GatedMlp(config=CONFIG).apply)({"params": dense}, X_BTD)
    assert np.abs(ffn).max() > 0.1
    largest = jax.nn.softmax(logits(params)).max(-1, keepdims=True)
    want = (1 + largest) * ffn
    np.testing.assert_allclose(moe_of(params, kernels), want, rtol=0, atol=1e-5)

    def closed(probs_ME, **settings):
        routes = routing.route(probs_ME, **settings)
        return routes.replace(weights_MK=jnp.zeros_like(routes.weights_MK))

    monkeypatch.setattr(moe, "route", closed)
    np.testing.assert_allclose(moe_of(params, kernels), ffn, rtol=0, atol=1e-5)


def test_vectors_computed_once_are_a_linear_router_of_the_same_layer(params):
    """They are what a gated MLP of the domains gives; as columns of a kernel they route without the projection."""
    kernels = jax.tree.map(lambda x: x / 4, ffns(6))
    projection = GatedMlp(config=dataclasses.replace(CONFIG, mlp_dim=WIDTH))
    learned = {name: params[name] for name in ("gate", "up", "down")}
    found_ED = projection.apply({"params": learned}, params["domains"])
    np.testing.assert_allclose(
        found_ED, expert_vectors(params, params["domains"]), rtol=0, atol=1e-6
    )
    want = moe_of(params, kernels)
    linear = moe_of({"kernel": found_ED.T}, kernels, router=Dense)
    np.testing.assert_allclose(linear, want, rtol=0, atol=1e-6)
    others = moe_of({"kernel": found_ED[::-1].T}, kernels, router=Dense)
    assert np.abs(others - want).max() > 1e-2


def test_of_the_log_loss_domains_have_no_gradient_and_the_projection_has(params):
    """Of a layer and a head, with no other loss."""
    kernels, head_DV = ffns(5), jax.random.normal(jax.random.key(7), (WIDTH, 16)) / WIDTH**0.5
    targets_BT1 = jax.random.randint(jax.random.key(8), (*X_BTD.shape[:2], 1), 0, 16)

    def mean_nll(params):
        log_probs_BTV = jax.nn.log_softmax((X_BTD + moe_of(params, kernels)) @ head_DV)
        return -jnp.take_along_axis(log_probs_BTV, targets_BT1, -1).mean()

    grads = jax.jit(jax.grad(mean_nll))(params)
    np.testing.assert_array_equal(grads["domains"], 0.0)
    assert all(np.abs(grads[name]["kernel"]).max() > 1e-4 for name in ("gate", "up", "down"))


def test_the_projection_is_as_large_whatever_the_number_of_experts(params):
    more = jax.tree.leaves(jax.jit(make_router(9).init)(jax.random.key(1), X_BTD)["params"])
    assert sum(leaf.size for leaf in more) - 9 * DOMAIN_DIM == sum(
        params[name]["kernel"].size for name in ("gate", "up", "down")
    )


@pytest.mark.parametrize("domain_dim", [4, 64])
def test_logits_begin_with_the_deviation_that_is_asked_for(domain_dim):
    width = 64
    x = jax.random.normal(jax.random.key(0), (512, width))
    router = DomainRouter(
        features=32, axes=("embed", "unmodeled"), domain_dim=domain_dim, logit_std=0.1
    )
    found = router.init_with_output(jax.random.key(2), x)[0]
    assert 0.08 < float(found.std()) < 0.12
    assert down_std(domain_dim, width, 0.2) == pytest.approx(2 * down_std(domain_dim, width, 0.1))


def cosines(vectors_ED):
    vectors_ED = np.asarray(vectors_ED, np.float64)
    unit_ED = vectors_ED / np.linalg.norm(vectors_ED, axis=-1, keepdims=True)
    return (unit_ED @ unit_ED.T)[np.triu_indices(len(unit_ED), 1)]


def graded_domains(rng, *, dim, count=16):
    """Directions on an arc around a common one: their cosines are positive and fall with their distance."""
    angles = np.linspace(0, np.pi / 2, count)[:, None]
    plane = np.linalg.qr(rng.normal(size=(dim, 3)))[0].T
    on_arc = np.cos(angles) * plane[:1] + np.sin(angles) * plane[1:2]
    return on_arc + 1.2 * plane[2:] + 0.02 * rng.normal(size=(count, dim))


@pytest.mark.parametrize(
    ("centred", "length", "low", "high"),
    [(False, 1.0, 0.9, 1.0), (True, 1.0, -1.0, 0.3), (True, 24.0, 0.5, 0.9)],
)
def test_the_order_of_similarities_survives_a_new_projection_unless_unit_vectors_are_centred(
    centred, length, low, high
):
    """A projection of short vectors is even: opposite ones come to lie together. Of long ones similar pairs keep it."""
    dim, width, rng = 64, 256, np.random.default_rng(0)
    rhos = []
    for _ in range(5):
        domains_EM = graded_domains(rng, dim=dim)
        domains_EM -= domains_EM.mean(0, keepdims=True) if centred else 0.0
        domains_EM *= length / np.linalg.norm(domains_EM, axis=-1, keepdims=True)
        shapes = {"gate": (dim, width), "up": (dim, width), "down": (width, width)}
        router = {
            name: {"kernel": rng.normal(0, shape[0] ** -0.5, shape)}
            for name, shape in shapes.items()
        }
        vectors_ED = expert_vectors(router, domains_EM)
        rhos.append(stats.spearmanr(cosines(domains_EM), cosines(vectors_ED)).statistic)
    assert low <= np.mean(rhos) <= high, rhos


def test_subtracting_the_mean_of_the_old_vectors_from_every_one_changes_no_gate(params):
    """Not even the new expert's: a softmax has no level."""
    vectors_ED = expert_vectors(params, params["domains"])
    states = np.asarray(X_BTD, np.float64)
    moved_ED = vectors_ED - vectors_ED[:-1].mean(0, keepdims=True)
    before, after = (jax.nn.softmax(jnp.asarray(states @ e.T)) for e in (vectors_ED, moved_ED))
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_levelling_moves_the_later_experts_alone(params):
    levelled, plain = (
        jax.jit(make_router(levelled=n).apply)({"params": params}, X_BTD) for n in (3, None)
    )
    np.testing.assert_allclose(levelled[..., :3], plain[..., :3], rtol=1e-5, atol=1e-5)
    old, new = jax.nn.softmax(plain[..., :3]), jax.nn.softmax(levelled)
    np.testing.assert_allclose(new[..., :3], old * (1 - new[..., 3:]), atol=1e-6)
    assert np.abs(levelled[..., 3] - plain[..., 3]).max() > 1e-2
    for n in (EXPERTS, 9):  # there is no later one
        same = jax.jit(make_router(levelled=n).apply)({"params": params}, X_BTD)
        np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-5)


def test_a_levelled_vector_is_an_affine_combination_of_the_first_ones_as_far_from_their_mean():
    rng = np.random.default_rng(0)
    vectors_ED = jnp.asarray(rng.normal(size=(7, 20)), jnp.float32)
    found_ED = np.asarray(jax.jit(level, static_argnums=1)(vectors_ED, 5), np.float64)
    np.testing.assert_array_equal(found_ED[:5], vectors_ED[:5])
    first_ND, apart_ND = found_ED[:5], found_ED[:5] - found_ED[:5].mean(0)
    length = np.linalg.norm(apart_ND, axis=-1).mean()
    for later_D, before_D in zip(found_ED[5:], np.asarray(vectors_ED[5:], np.float64), strict=True):
        moved_D = later_D - first_ND.mean(0)
        assert np.linalg.norm(moved_D) == pytest.approx(length, rel=1e-4)
        weights_N, *_ = np.linalg.lstsq(apart_ND.T, moved_D, rcond=None)
        np.testing.assert_allclose(apart_ND.T @ weights_N, moved_D, atol=1e-4)
        want_N, *_ = np.linalg.lstsq(apart_ND.T, before_D - first_ND.mean(0), rcond=None)
        want_D = apart_ND.T @ want_N
        np.testing.assert_allclose(moved_D, length * want_D / np.linalg.norm(want_D), atol=1e-4)


def test_two_experts_are_too_few_to_level_others_to():
    with pytest.raises(ValueError, match="levelled = 2: .* has the logits of one of them"):
        jax.eval_shape(functools.partial(level, first=2), jnp.ones((4, 8)))


def test_a_levelled_router_has_finite_gradients(params):
    router = make_router(levelled=3)
    grads = jax.jit(jax.grad(lambda p: router.apply({"params": p}, X_BTD).sum()))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert np.abs(grads["down"]["kernel"]).max() > 0


def test_logits_of_long_embeddings_begin_with_the_deviation_that_is_asked_for():
    width, dim, rng = 64, 64, np.random.default_rng(0)
    domains_EM = rng.normal(size=(32, dim))
    domains_EM *= 24 / np.linalg.norm(domains_EM, axis=-1, keepdims=True)
    std = {"gate": dim**-0.5, "up": dim**-0.5, "down": down_std(dim, width, 0.1, 24.0)}
    router = {name: {"kernel": rng.normal(0, x, (width, width))} for name, x in std.items()}
    found = rng.normal(size=(512, width)) @ expert_vectors(router, domains_EM).T
    assert 0.08 < found.std() < 0.12


def mixture(**attention):
    """A transformer with attention experts and experts, both behind projection routers."""

    router = projection_router

    def block(**given):
        return Block(
            **given,
            layout="parallel",
            attention=lambda **g: MixtureOfAttention(
                **g, num_experts=3, router=router, **attention
            ),
            mlp=lambda **g: MoeMlp(
                **g, num_experts=3, top_k=1, renormalise=False, router=router, shared=GatedMlp
            ),
        )

    return Transformer(config=CONFIG, block=block)


def test_training_leaves_domains_alone_and_keeps_them_from_the_optimiser():
    recipe = Recipe(
        model=mixture(),
        batch_size=2,
        feature_lengths={"targets": 8},
        optimizer=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.5),
        learning_rate=lambda step: 0.1,
        ema_decay=0.9,
        rules="dp",
    )
    program = recipe.program(devices=jax.devices()[:1])
    state = program.init()
    paths = [
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    ]
    assert not any("domains" in path for path in paths) and any("router" in path for path in paths)
    data = 2 * CONFIG.num_layers * 3 * DOMAIN_DIM
    everything = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert program.num_params() == program.num_params(trained_only=True) == everything - data
    kept = jax.tree.map(np.asarray, state.params)
    tokens = jnp.ones((2, 8), jnp.int32)
    names = recipe.abstract_batch(program.batch_sharding)
    batch = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in names.items()}
    batch["decoder_target_tokens"] = tokens if "decoder_target_tokens" in batch else None
    batch = {name: value for name, value in batch.items() if value is not None}
    state, _ = program.steps(1).train(state, batch)
    for where in ("attention", "mlp"):
        router = state.params["layers"]["block_0"][where]["router"]
        was = kept["layers"]["block_0"][where]["router"]
        np.testing.assert_array_equal(router["domains"], was["domains"])
        assert not np.array_equal(router["down"]["kernel"], was["down"]["kernel"])


def test_random_directions_have_length_one():
    found = random_directions(jax.random.key(0), (3, 7), jnp.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, atol=1e-6)
