"""Adapters of one projection against NumPy in float64, their sites, and what is refused.

Shapes: T rows, X in, Y out, R rank, E experts.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import axes
from espalier.model.adapters import adapter
from espalier.model.adapters.adapter import AdapterError
from espalier.model.adapters.bottleneck import Bottleneck
from espalier.model.adapters.ia3 import Ia3
from espalier.model.adapters.lora import Lora
from espalier.model.adapters.prompt import Prompt, PromptEmbed
from espalier.model.config import TransformerConfig
from espalier.model.embed import Embed
from espalier.model.linear import Dense
from espalier.model.low_rank.lowrank import Factorisation, LowRankDense
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import ExpertDense
from espalier.model.mov.molora import MoLora
from espalier.model.mov.mov import Mov

KEY = jax.random.key(0)
X, Y, T = 6, 5, 4
ANY = (".*",)


def wrapped(make, *, base=None):
    """The projection of a layer with one adapter, and its parameters, all of them random."""
    base = base or Dense(features=Y, axes=(axes.EMBED, axes.MLP), use_bias=True)
    module = adapter.named(one=make)(base)
    inputs = (rows(),) if not isinstance(base, ExpertDense) else (rows(), jnp.array([1, 3]))
    shapes = nn.meta.unbox(jax.eval_shape(module.init, KEY, *inputs))["params"]
    return module, randomised(shapes), inputs


def randomised(shapes):
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    values = [jnp.asarray(rng.normal(0.3, 0.5, x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, values)


def rows(count=T):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, X)), jnp.float32)


def numpy(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("stabilised", [False, True])
def test_lora_is_the_frozen_product_and_a_scaled_thin_one(stabilised):
    make = functools.partial(Lora, layers=ANY, rank=2, alpha=3.0, rank_stabilised=stabilised)
    module, params, (x,) = wrapped(make)
    w = numpy(params)
    assert set(params) == {"kernel", "bias", "adapter_one"}
    thin = w["adapter_one"]["lora_a"] @ w["adapter_one"]["lora_b"]
    scale = 3 / (2**0.5 if stabilised else 2)
    expected = numpy(x) @ (w["kernel"] + scale * thin) + w["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("factorised", [False, True])
def test_dora_gives_columns_a_norm_of_their_own(factorised):
    """Around factors too; no gradient flows through the norm of the changed matrix."""
    make = functools.partial(Lora, layers=ANY, rank=2, alpha=4.0, dora=True)
    base = None
    if factorised:
        which = Factorisation(rank=0.5, layers=ANY)
        base = LowRankDense(features=Y, axes=(axes.EMBED, axes.MLP), factorisation=which)
    module, params, (x,) = wrapped(make, base=base)
    w = numpy(params)
    one = w["adapter_one"]
    kernel = w["u"] @ w["v"] if factorised else w["kernel"]
    changed = kernel + 2 * one["lora_a"] @ one["lora_b"]
    norms = np.linalg.norm(changed, axis=0)
    magnitude = np.linalg.norm(kernel, axis=0) + one["magnitude_change"]
    expected = numpy(x) @ (magnitude / norms * changed) + w.get("bias", 0)
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)

    def total(params):
        return jnp.sum(module.apply({"params": params}, x))

    own = jax.grad(total)(params)["adapter_one"]
    per_column = numpy(x).sum(0) @ changed / norms
    np.testing.assert_allclose(own["magnitude_change"], per_column, atol=1e-4)
    of_b = 2 * (one["lora_a"].T @ numpy(x).sum(0))[:, None] * magnitude / norms
    np.testing.assert_allclose(own["lora_b"], of_b, atol=1e-4)


def test_ia3_rescales_the_output_with_its_bias_or_the_input():
    module, params, (x,) = wrapped(functools.partial(Ia3, outputs=ANY, inputs=()))
    w = numpy(params)
    expected = (numpy(x) @ w["kernel"] + w["bias"]) * w["adapter_one"]["output_scale"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)
    module, params, (x,) = wrapped(functools.partial(Ia3, outputs=(), inputs=ANY))
    w = numpy(params)
    expected = (numpy(x) * w["adapter_one"]["input_scale"]) @ w["kernel"] + w["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


IA3_SIDES = [{"outputs": ANY, "inputs": ()}, {"outputs": (), "inputs": ANY}]


@pytest.mark.parametrize(
    ("make", "experts"),
    [
        *((functools.partial(Ia3, **side), experts) for side in IA3_SIDES for experts in (None, 2)),
        *((functools.partial(Mov, num_experts=3, **side), None) for side in IA3_SIDES),
        (functools.partial(Lora, layers=ANY, rank=1, alpha=1.0, dora=True), None),
    ],
)
def test_in_bfloat16_a_scale_is_rounded_with_its_product_alone(make, experts):
    """bfloat16 has no number between 1 and 1.0078: a scale of 1.003 that is rounded first changes nothing."""
    wide = {"dtype": jnp.bfloat16, "features": X}
    base = Dense(axes=(axes.EMBED, axes.MLP), **wide)
    if experts:
        base = ExpertDense(num_experts=experts, axes=(axes.EXPERT, axes.EMBED, axes.MLP), **wide)
    module, params, (_, *sizes) = wrapped(make, base=base)
    params["kernel"] = jnp.broadcast_to(jnp.eye(X), params["kernel"].shape)
    scaled = {
        name: jnp.full_like(leaf, {"lora_b": 0.0, "magnitude_change": 0.003}.get(name, 1.003))
        for name, leaf in params["adapter_one"].items()
        if name != "router"
    }
    params["adapter_one"] |= scaled
    x = (100 * rows()).astype(jnp.bfloat16)
    got = module.apply({"params": params}, x, *sizes)
    exact = np.asarray(x, np.float64) * np.float32(1.003)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(exact).astype(jnp.bfloat16))
    assert (np.asarray(got) != np.asarray(x)).any()


def test_a_bottleneck_is_added_to_the_output():
    module, params, (x,) = wrapped(
        functools.partial(Bottleneck, layers=ANY, width=3, activation="relu")
    )
    w = numpy(params)
    one = w["adapter_one"]
    y = numpy(x) @ w["kernel"] + w["bias"]
    hidden = np.maximum(y @ one["down"]["kernel"] + one["down"]["bias"], 0)
    expected = y + hidden @ one["up"]["kernel"] + one["up"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(Lora, layers=ANY, rank=2, alpha=2.0),
        functools.partial(Ia3, outputs=ANY, inputs=()),
        functools.partial(Ia3, outputs=(), inputs=ANY),
    ],
)
def test_each_expert_has_an_adapter_of_its_own(make):
    base = ExpertDense(num_experts=2, features=Y, axes=(axes.EXPERT, axes.EMBED, axes.MLP))
    module, params, (x, sizes) = wrapped(make, base=base)
    got = np.asarray(module.apply({"params": params}, x, sizes))
    w = numpy(params)
    for row, expert in enumerate([0, 1, 1, 1]):
        one = {name: leaf[expert] for name, leaf in w["adapter_one"].items()}
        value, kernel = numpy(x)[row], w["kernel"][expert]
        if "lora_a" in one:
            expected = value @ (kernel + one["lora_a"] @ one["lora_b"])
        elif "input_scale" in one:
            expected = (value * one["input_scale"][0]) @ kernel
        else:
            expected = value @ kernel * one["output_scale"][0]
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


MIXTURES = [
    functools.partial(Mov, num_experts=3, outputs=ANY, inputs=()),
    functools.partial(Mov, num_experts=3, outputs=(), inputs=ANY),
    functools.partial(MoLora, num_experts=3, layers=ANY, rank=2),
]


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(Bottleneck, layers=ANY, width=3),
        *MIXTURES,
        *(functools.partial(make, top_k=2) for make in MIXTURES),
    ],
)
def test_at_an_expert_an_adapter_is_what_it_is_at_a_projection(make):
    """With the expert's own parameters, for every row: routers, vectors, factors and biases."""
    base = ExpertDense(num_experts=2, features=Y, axes=(axes.EXPERT, axes.EMBED, axes.MLP))
    module, params, (x, sizes) = wrapped(make, base=base)
    got = np.asarray(module.apply({"params": params}, x, sizes))
    plain, own, _ = wrapped(make)
    for row, expert in enumerate([0, 1, 1, 1]):
        one = jax.tree.map(lambda leaf, e=expert: leaf[e], params)
        one = jax.tree.map(
            lambda leaf, like: leaf.reshape(like.shape),
            one,
            {name: child for name, child in own.items() if name != "bias"},
        )
        one["bias"] = jnp.zeros_like(own["bias"])
        expected = plain.apply({"params": one}, x[row][None, None])
        np.testing.assert_allclose(got[row], np.ravel(expected), atol=1e-5)


@pytest.mark.parametrize("make", [Mov, MoLora])
def test_a_router_at_experts_knows_no_sentence(make):
    base = ExpertDense(num_experts=2, features=Y, axes=(axes.EXPERT, axes.EMBED, axes.MLP))
    patterns = {"layers": ANY} if make is MoLora else {"outputs": ANY, "inputs": ()}
    with pytest.raises(AdapterError, match="'sentence' is not at stacked experts"):
        wrapped(functools.partial(make, router_input="sentence", **patterns), base=base)


def mlp(**slots):
    config = TransformerConfig(vocab_size=8, num_layers=1, embed_dim=X, num_heads=2, mlp_dim=8)
    return GatedMlp(config=config, adapters=adapter.named(**slots))


def mlp_params(module):
    x = jnp.zeros((1, T, X))
    return nn.meta.unbox(jax.eval_shape(module.init, KEY, x))["params"]


def test_patterns_choose_sites_and_ranks():
    module = mlp(
        lora=functools.partial(Lora, layers=("gate", "up"), rank=2, ranks=[("up", 3)]),
        ia3=functools.partial(Ia3, outputs=(), inputs=("down",)),
    )
    params = mlp_params(module)
    assert params["gate"]["adapter_lora"]["lora_a"].shape == (X, 2)
    assert params["up"]["adapter_lora"]["lora_b"].shape == (3, 8)
    assert params["down"]["adapter_ia3"]["input_scale"].shape == (8,)
    lines = adapter.report(params, adapters=module.adapters)
    assert lines == [
        "adapter ia3: Ia3 at 1 layer, 8 parameters",
        f"adapter lora: Lora at 2 layers, {2 * 14 + 3 * 14} parameters",
        f"adapters are 78 parameters, {78 / 144:.3%} of the base model's 144",
    ]
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), params)
    layers = {"block_0": {"mlp": stacked}, "block_1": {"mlp": stacked}}
    sites = [f"layers/block_{n}/mlp/{name}" for n in (0, 1) for name in ("gate", "up")]
    where = adapter._where({"layers": layers}, sites)
    assert where == "2 projections of each of 10 layers"


def test_parameters_of_the_base_are_the_base_model():
    """Its paths are the same, its first values too, and without adapters' parameters the module computes it."""
    x = jax.random.normal(KEY, (1, T, X))
    module = mlp(lora=functools.partial(Lora, layers=ANY, rank=2))
    base = module.clone(adapters=None)
    params = nn.meta.unbox(module.init(KEY, x))["params"]
    own = nn.meta.unbox(base.init(KEY, x))["params"]
    alone = {name: {"kernel": child["kernel"]} for name, child in params.items()}
    jax.tree.map(np.testing.assert_array_equal, alone, own)
    expected = np.asarray(base.apply({"params": own}, x))
    np.testing.assert_array_equal(module.apply({"params": own}, x), expected)
    np.testing.assert_array_equal(module.apply({"params": params}, x), expected)


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (
            {
                "a": functools.partial(Lora, layers=("up",)),
                "b": functools.partial(Ia3, outputs=("up",)),
            },
            ["up would have two adapters", "adapter.named.a", "adapter.named.b"],
        ),
        (
            {"a": functools.partial(Lora, layers=("up",), rank=7)},
            ["LoRA of up", "rank 7", "[6, 8]", "`ranks`"],
        ),
        (
            {"a": functools.partial(Lora, layers=(".*up", "upp"), rank=1)},
            ["adapter.named.a", "'upp'", "`layers`", "mlp/down, mlp/gate, mlp/up"],
        ),
        (
            {"a": functools.partial(Lora, layers=(".*up",), ranks=[("u", 1)], rank=1)},
            ["'u'", "`ranks`"],
        ),
        (
            {"a": functools.partial(Ia3, outputs=("up",), inputs=ANY)},
            ["up matches both `outputs` and `inputs`"],
        ),
    ],
)
def test_sites_that_cannot_be_are_one_error(slots, words):
    module = mlp(**slots)
    with pytest.raises(AdapterError) as error:
        adapter.report({"mlp": mlp_params(module)}, adapters=module.adapters)
    assert all(word in str(error.value) for word in words), error.value


def test_what_cannot_adapt_experts_says_so():
    base = ExpertDense(num_experts=2, features=Y, axes=(axes.EXPERT, axes.EMBED, axes.MLP))
    with pytest.raises(AdapterError, match="stacked experts.*adapter.named.one cannot"):
        wrapped(functools.partial(Lora, dora=True, rank=1, layers=ANY), base=base)


def embedded(module, params, ids):
    return module.apply({"params": params}, ids)


def test_virtual_tokens_have_learned_embeddings_and_all_others_the_tables():
    ids = jnp.array([[4, 1, 2, 5]])
    table = Embed(num_embeddings=6, features=3)
    module = PromptEmbed(
        num_embeddings=6,
        features=3,
        adapters=adapter.named(
            prompt=functools.partial(Prompt, length=2, first_id=4, starts=(0, 1))
        ),
    )
    params = nn.meta.unbox(module.init(KEY, ids))["params"]
    rows = np.asarray(params["embedding"])
    np.testing.assert_array_equal(embedded(module, params, ids)[0], rows[[0, 1, 2, 1]])
    base = {"embedding": params["embedding"]}
    np.testing.assert_array_equal(embedded(module, base, ids), embedded(table, base, ids))
    params["adapter_prompt"]["change"] += jnp.array([[1.0], [2.0]])
    learned = rows[[0, 1, 2, 1]] + np.array([[1.0], [0.0], [0.0], [2.0]])
    np.testing.assert_allclose(embedded(module, params, ids)[0], learned, atol=1e-6)
    lines = adapter.report({"token_embed": params}, adapters=module.adapters)
    assert lines[0] == "adapter prompt: Prompt at 1 layer, 6 parameters"
    for settings, words in (({"first_id": 5}, "go up to 6"), ({"starts": (1,)}, "1 starts for 2")):
        make = functools.partial(Prompt, **{"length": 2, "first_id": 0, **settings})
        with pytest.raises(AdapterError, match=words):
            module.clone(adapters=adapter.named(prompt=make)).init(KEY, ids)
