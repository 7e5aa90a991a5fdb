"""Whole models with experts: limits in which they are dense models again, the experts' order, and what routers learn from.

Mixtures are BAM's (arXiv 2408.08274), FFNs and attentions as experts in parallel blocks, made by model/transforms.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.bam import moa
from espalier.model.bam.moa import AttentionExperts
from espalier.model.config import TransformerConfig
from espalier.model.linear import Dense
from espalier.model.moe import moe
from espalier.model.transformer import Block, Transformer
from espalier.model.transforms import base
from espalier.model.transforms.base import Source
from espalier.model.transforms.experts import ROUTER, LinearRouters, Mixture, Upcycle, expert_axis
from espalier.trainers.checkpoints import state_tree

E, KV = 3, 2
CONFIG = TransformerConfig(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=KV, head_dim=8, mlp_dim=24
)
TOKENS = jax.random.randint(jax.random.key(9), (2, 10), 1, 32)
ROUTERS = ("layers/block_0/attention/router", "layers/block_0/mlp/router")
FORMS = pytest.mark.parametrize(
    "form", [(shared_kv, top_k) for shared_kv in (False, True) for top_k in (None, 2)]
)


@functools.cache
def dense_model():
    return Transformer(config=CONFIG, block=functools.partial(Block, layout="parallel"))


@functools.cache
def mixture(
    shared_kv=False, attention_top_k=None, top_k=1, renormalise=False, parts=1, score="softmax"
):
    """Routers have a bias, which decides whatever a state is."""
    router = functools.partial(Dense, use_bias=True)
    attention = functools.partial(
        moa.MixtureOfAttention, shared_kv=shared_kv, top_k=attention_top_k
    )
    mlp = functools.partial(moe.MoeMlp, top_k=top_k, renormalise=renormalise, score=score)
    attention, mlp = (functools.partial(x, num_experts=E, router=router) for x in (attention, mlp))
    mlp = moe.experts_of(moe=mlp, granularity=parts)
    block = functools.partial(Block, layout="parallel", attention=attention, mlp=mlp)
    return Transformer(config=CONFIG, block=block)


def shapes_of(model):
    params = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), TOKENS)["params"]))
    return {path: leaf.shape for path, leaf in state_tree.flatten(params).items()}


@functools.cache
def dense(seed):
    """A dense model's parameters by path, all of them with values of their own, gains too."""
    rng = np.random.default_rng(seed)
    return {
        path: np.float32(
            1 + 0.2 * rng.normal(size=shape)
            if "norm" in path
            else rng.normal(size=shape) / shape[-2] ** 0.5
        )
        for path, shape in shapes_of(dense_model()).items()
    }


def upcycled(model, sources, shared_kv=False, router_std=1.0, **settings):
    """A mixture's parameters by path, made of dense ones in their order; biases are 0."""
    shapes = shapes_of(model)
    biases = {f"{x}/bias": np.zeros(shapes.pop(f"{x}/bias"), np.float32) for x in ROUTERS}
    attention = AttentionExperts(kv_heads=KV, shared_kv=shared_kv)
    what = Mixture(experts=E, attention=attention, router=LinearRouters(std=router_std), **settings)
    named = [
        Source(str(i), {path: x.shape for path, x in one.items()}) for i, one in enumerate(sources)
    ]
    recipes = base.plan(Upcycle(what), named, shapes)
    return {**base.apply(recipes, lambda name, path: sources[int(name)][path]), **biases}


def tree(flat) -> Any:
    out: dict = {}
    for path, leaf in flat.items():
        *above, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), above, out)[name] = leaf
    return out


@functools.cache
def compiled(model):
    return jax.jit(lambda params: model.apply({"params": params}, TOKENS))


def logits(model, flat):
    return np.asarray(compiled(model)(tree(flat)))


@pytest.mark.parametrize("form", [(False, None, E, False), (True, None, 2, True)])
def test_copies_that_are_mixed_by_weights_that_sum_to_1_are_the_model(form):
    """Each form of keys and values, and each of FFNs: all of them, and some with weights made to sum to 1."""
    model, one = mixture(*form), dense(0)
    params = upcycled(model, [one] * E, shared_kv=form[0])
    want = logits(dense_model(), one)
    np.testing.assert_allclose(logits(model, params), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("top_k", "renormalise", "score", "scale"),
    [(1, False, "softmax", 1.0), (2, True, "sigmoid", 1.0), (2, False, "sigmoid", 0.25)],
)
def test_experts_in_parts_begin_as_whole_ones(top_k, renormalise, score, scale):
    """arXiv 2410.07524. Sigmoids that are not renormalised have no sum that parts share, which `expert_scale` sets right."""
    sources, form = [dense(j) for j in range(E)], (False, None, top_k, renormalise)
    whole = mixture(*form, score=score)
    want = logits(whole, upcycled(whole, sources))
    finer = mixture(*form, parts=4, score=score)
    params = upcycled(finer, sources, granularity=4, expert_scale=scale)
    assert params["layers/block_0/mlp/down/kernel"].shape == (2, 4 * E, 24 // 4, 16)
    np.testing.assert_allclose(logits(finer, params), want, rtol=0, atol=1e-5)
    other = {
        **params,
        "layers/block_0/mlp/up/kernel": params["layers/block_0/mlp/up/kernel"][:, ::-1],
    }
    assert np.abs(logits(finer, other) - want).max() > 1e-2


@FORMS
def test_with_both_gates_on_one_expert_and_its_backbone_a_mixture_is_that_expert(form):
    """All that is no expert's is taken of the one; where keys and values are shared, these too."""
    model, shared_kv = mixture(*form), form[0]
    params = upcycled(model, [dense(j) for j in range(E)], shared_kv)
    what = Mixture(experts=E, attention=AttentionExperts(kv_heads=KV, shared_kv=shared_kv))
    for j in range(E):
        gates = {f"{x}/bias": np.full((2, E), -1e4, np.float32) for x in ROUTERS}
        for bias in gates.values():
            bias[:, j] = 0.0
        own = {
            path: leaf
            for path, leaf in dense(j).items()
            if expert_axis(path, params[path].shape, what) is None
        }
        assert ("layers/block_0/attention/key/kernel" in own) == shared_kv
        want = logits(dense_model(), dense(j))
        found = logits(model, {**params, **gates, **own})
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@FORMS
def test_experts_and_their_routers_columns_in_another_order_are_the_same_model(form):
    model, shared_kv, order = mixture(*form), form[0], [2, 0, 1]
    here = upcycled(model, [dense(j) for j in range(E)], shared_kv)
    moved = upcycled(model, [dense(j) for j in order], shared_kv)
    columns = {path: leaf[..., order] for path, leaf in here.items() if re.fullmatch(ROUTER, path)}
    assert sorted(columns) == [f"{x}/kernel" for x in ROUTERS]
    want = logits(model, here)
    np.testing.assert_allclose(logits(model, {**moved, **columns}), want, rtol=0, atol=1e-5)
    for path in columns:  # with either router's columns as they were, others are chosen
        found = logits(model, {**moved, **columns, path: here[path]})
        assert np.abs(found - want).max() > 1e-2


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_loss_teaches_the_router_of_one_ffn_by_its_raw_probability_alone(renormalise):
    """Renormalised, the one weight is 1 whatever the logits are. Attentions' gates are raw in both."""
    model = mixture(renormalise=renormalise)
    params = upcycled(model, [dense(j) for j in range(E)], router_std=0.1)

    def mean_nll(routers):
        log_probs = jax.nn.log_softmax(
            model.apply({"params": tree({**params, **routers})}, TOKENS)[:, :-1]
        )
        return -jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], -1).mean()

    kernels = [f"{x}/kernel" for x in ROUTERS]
    gradient = jax.jit(jax.grad(mean_nll))({path: params[path] for path in kernels})
    attention, mlp = (np.abs(gradient[path]).max((1, 2)) for path in kernels)  # by layer
    assert np.all(attention > 1e-4)
    assert np.all(mlp <= 1e-8 if renormalise else mlp > 1e-4)
