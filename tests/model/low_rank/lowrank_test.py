"""Factorised projections: first values, the forward pass, ranks, experts, and what is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import axes
from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.linear import Dense, fan_in_normal
from espalier.model.low_rank import factors, lowrank
from espalier.model.low_rank.lowrank import Factorisation, LowRankDense, LowRankExpertDense
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import ExpertDense, MoeMlp
from espalier.model.transformer import Block, Transformer

KEY = jax.random.key(0)
EVERY = Factorisation(layers=(".*",))


def kernel(rows=24, columns=16, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, columns)) / rows**0.5


def dense(rank, *, features=16, **settings):
    which = Factorisation(rank=rank, layers=(".*",), **settings)
    return LowRankDense(features=features, axes=(axes.EMBED, axes.MLP), factorisation=which)


def test_full_rank_spectral_factors_are_the_kernel():
    w = kernel()
    u, v = factors.spectral_factors(w, 16)
    assert np.linalg.norm(u @ v - w) <= 1e-5 * np.linalg.norm(w)
    x = jax.random.normal(KEY, (8, 24))
    np.testing.assert_allclose(lowrank.product(x, u, v), x @ w, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 15])
def test_what_truncation_loses_is_the_sum_of_the_squares_left_out(rank):
    w = np.asarray(kernel(), np.float64)
    u, v = factors.spectral_factors(jnp.asarray(w), rank)
    lost = np.square(np.linalg.svd(w, compute_uv=False)[rank:]).sum()
    assert np.square(np.asarray(u @ v) - w).sum() == pytest.approx(lost, rel=1e-4)


def test_spectral_factors_are_balanced_and_those_of_ones_orthonormal():
    u, v = factors.spectral_factors(kernel(), 7)
    np.testing.assert_allclose(u.T @ u, v @ v.T, atol=1e-5)
    u, v = factors.spectral_factors(kernel(), 7, ones=1.0)
    np.testing.assert_allclose(u.T @ u, np.eye(7), atol=1e-5)
    np.testing.assert_allclose(v @ v.T, np.eye(7), atol=1e-5)
    values = np.linalg.svd(np.asarray(u @ v, np.float64), compute_uv=False)
    np.testing.assert_allclose(values[:7], 1, atol=1e-5)
    assert values[7:].max() <= 1e-6
    np.testing.assert_allclose(factors.effective_rank(factors.singular_values(u, v)), 7, atol=1e-3)


@pytest.mark.parametrize("rank", [4, 64, 256])
def test_he_factors_keep_the_variance_of_the_dense_outputs_at_any_rank(rank):
    # Of all inputs at once: W's entries have the variance of a fan-in draw, over many draws.
    keys = jax.random.split(KEY, 256)
    draw = jax.vmap(lambda key: factors.he_factors(key, fan_in_normal, (256, 512), rank))
    squares = jnp.mean(jnp.stack([(u @ v).var() for u, v in zip(*draw(keys[:64]), strict=True)]))
    assert float(squares) == pytest.approx(1 / 256, rel=0.1)


@pytest.mark.parametrize("init", lowrank.INITS)
def test_a_layer_computes_the_product_of_what_it_has_drawn(init):
    x = jax.random.normal(KEY, (3, 5, 24))
    layer = dense(0.5, init=init).clone(use_bias=True)
    params = nn.meta.unbox(layer.init(KEY, x))["params"]
    assert {name: p.shape for name, p in params.items()} == {
        "u": (24, 8),
        "v": (8, 16),
        "bias": (16,),
    }
    params["bias"] = jnp.arange(16.0)
    expected = x @ (params["u"] @ params["v"]) + params["bias"][None, None]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)
    boxed = layer.init(KEY, x)["params"]
    assert boxed["u"].names == (axes.EMBED, axes.RANK) and boxed["v"].names == (axes.RANK, axes.MLP)


def test_the_draw_of_spectral_factors_is_that_of_the_dense_layer():
    x = jnp.zeros((1, 24))
    params = nn.meta.unbox(dense(1.0).init(KEY, x))["params"]
    variance = np.var(np.asarray(params["u"] @ params["v"]))
    assert variance == pytest.approx(1 / 24, rel=0.2)  # fan-in normal, 384 draws


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from _shapes(inner)


def test_below_break_even_no_matrix_of_the_dense_size_exists_and_above_it_rows_decide():
    # 24 x 16 breaks even at rank 9.6.
    def made(rank, rows):
        u, v = jnp.ones((24, rank)), jnp.ones((rank, 16))
        jaxpr = jax.make_jaxpr(lowrank.product)(jnp.ones((rows, 24)), u, v)
        return (24, 16) in set(_shapes(jaxpr.jaxpr))

    assert not made(9, 10_000) and not made(12, 8)
    assert made(12, 10_000)


@pytest.mark.parametrize(
    ("rule", "rank", "found"),
    [
        ("min_dim", 0.62, 476),
        ("param_ratio", 0.62, 238),
        ("absolute", 100, 100),
        ("min_dim", 1e-6, 1),
        ("min_dim", 1.0, 768),
    ],
)
def test_ranks_of_a_square_matrix(rule, rank, found):
    assert factors.rank_of(rank, rule, 768, 768) == found
    if rule == "param_ratio":
        assert factors.rank_of(rank, rule, 768, 3072) == 381


def test_fractions_are_rounded_to_a_multiple_and_absolute_ranks_are_not():
    assert factors.rank_of(0.62, "min_dim", 768, 768, multiple=128) == 512
    assert factors.rank_of(0.62, "min_dim", 64, 64, multiple=128) == 40  # longer than the side
    assert factors.rank_of(100, "absolute", 768, 768, multiple=128) == 100


def model(which=EVERY, **settings):
    config = TransformerConfig(
        vocab_size=32, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, **settings
    )
    layer = functools.partial(LowRankDense, factorisation=which)
    experts = functools.partial(LowRankExpertDense, factorisation=which)
    mixture = functools.partial(MoeMlp, num_experts=4, router=layer, expert_dense=experts)
    block = functools.partial(
        Block, attention=functools.partial(Attention, dense=layer), mlp=mixture
    )
    return Transformer(config=config, block=block)


def test_parameters_are_r_times_the_sum_of_the_sides_also_in_stacks_of_layers_and_experts():
    which = Factorisation(rank=3, rank_rule="absolute")
    made = jax.eval_shape(
        lambda: nn.meta.unbox(model(which).init(KEY, jnp.zeros((1, 4), int)))["params"]
    )
    found = {one.path: one for one in factors.find_factors(made)}
    assert len(found) == 7 and "layers/block_0/mlp/router" not in found
    up = found["layers/block_0/mlp/up"]
    assert (up.shape, up.rank, up.count) == ((16, 32), 3, 2 * 4)
    leaves = made["layers"]["block_0"]["mlp"]["up"]
    assert up.factors == 8 * 3 * (16 + 32) == sum(leaf.size for leaf in leaves.values())
    lines = factors.table(list(found.values()))
    assert lines[-1].startswith("total") and "LARGER" not in "".join(lines)
    assert "LARGER" in factors.table([factors.Factors("a", (4, 4), 3, 1)])[1]


def test_a_full_rank_model_is_the_dense_one():
    tokens = jax.random.randint(KEY, (2, 6), 0, 32)
    low = model(Factorisation(rank=1.0))
    params = nn.meta.unbox(jax.jit(low.init)(KEY, tokens))["params"]

    def merged(node):
        if factors.is_factorised(node):
            return {"kernel": node["u"] @ node["v"]}
        return {k: merged(v) for k, v in node.items()} if isinstance(node, dict) else node

    plain = Transformer(
        config=low.config,
        block=functools.partial(
            Block,
            attention=functools.partial(Attention, dense=Dense),
            mlp=functools.partial(MoeMlp, num_experts=4, router=Dense, expert_dense=ExpertDense),
        ),
    )
    expected = jax.jit(plain.apply)({"params": merged(params)}, tokens)
    got = jax.jit(low.apply)({"params": params}, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_layers_that_do_not_match_stay_dense_and_ranks_may_differ_by_path():
    which = Factorisation(
        rank=0.5, layers=(".*/attention/(query|out)",), ranks=((".*/query", 0.25),)
    )
    config = TransformerConfig(vocab_size=32, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32)
    layer = functools.partial(LowRankDense, factorisation=which)
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, dense=layer),
        mlp=functools.partial(GatedMlp, dense=layer),
    )
    model = Transformer(config=config, block=block)
    variables = jax.eval_shape(model.init, KEY, jnp.zeros((1, 4), int))
    found = factors.find_factors(nn.meta.unbox(variables)["params"])
    assert {one.path.rpartition("/")[2]: one.rank for one in found} == {"query": 4, "out": 8}


def test_all_attentions_of_an_encoder_decoder_are_factorised_and_routers_and_tables_are_not():
    which = Factorisation(rank=1, rank_rule="absolute")
    for owner in ("attention", "cross_attention", "mlp", "mlp/shared"):
        name = "up" if "mlp" in owner else "key"
        assert which.rank_at(f"decoder/layers/block_0/{owner}/{name}", 8, 8) == 1
    for path in ("decoder/layers/block_0/mlp/router", "token_embed", "lm_head"):
        assert which.rank_at(path, 8, 8) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 17, "rank_rule": "absolute"}, r"\[24, 16\] the rank 17; it can have 1 to 16"),
        ({"rank": 1.5}, "the rank 24"),
        ({"rank": 0}, "the rank 0"),
        ({"rank": 2.5, "rank_rule": "absolute"}, "not a whole number"),
    ],
)
def test_a_rank_that_cannot_be_names_the_layer(settings, message):
    layer = dense(settings.pop("rank"), **settings).clone(name="query")
    with pytest.raises(ValueError, match=message):
        layer.init(KEY, jnp.zeros((1, 24)))


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="init = 'svd': choose from 'he', 'spectral'"):
        Factorisation(init="svd")
    with pytest.raises(ValueError, match="rank_rule = 'half'"):
        Factorisation(rank_rule="half")


def test_the_report_has_exact_sizes_warns_of_growth_and_refuses_patterns_without_a_layer():
    shapes = {
        "a": {"u": jax.ShapeDtypeStruct((3, 8, 2), jnp.float32), "v": jax.ShapeDtypeStruct((3, 2, 6), jnp.float32)},
        "b": {"u": jax.ShapeDtypeStruct((8, 4), jnp.float32), "v": jax.ShapeDtypeStruct((4, 8), jnp.float32)},
        "c": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
    }  # fmt: skip
    lines = lowrank.report(shapes, factorisation=Factorisation(layers=("a", "b")))
    cells = [line.split() for line in lines[1:]]
    assert cells[0] == ["a", "8", "x", "6", "x", "3", "2", "144", "84", "0.583"]
    assert cells[1] == ["b", "8", "x", "8", "4", "64", "64", "1.000"]
    assert cells[2] == ["total", "208", "148", "0.712"] and len(lines) == 4
    shapes["b"]["u"] = jax.ShapeDtypeStruct((8, 5), jnp.float32)
    shapes["b"]["v"] = jax.ShapeDtypeStruct((5, 8), jnp.float32)
    *_, line, _, warning = lowrank.report(shapes, factorisation=Factorisation(layers=("a|b",)))
    assert line.endswith("LARGER") and warning.startswith("WARNING: the factors of 1 ")
    for settings in ({"layers": ("a", "d.*")}, {"layers": (".*",), "ranks": (("d.*", 1),)}):
        with pytest.raises(ValueError, match=r"'d\.\*' matches no layer .*; there are a, b\."):
            lowrank.report(shapes, factorisation=Factorisation(**settings))
    with pytest.raises(ValueError, match="there are none"):
        lowrank.report({"c": shapes["c"]}, factorisation=Factorisation())
