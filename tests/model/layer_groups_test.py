"""Lists of layers in groups of equal blocks: how they are divided, and that scanned groups are the unrolled model.

Shapes: B batch, T length.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import flops, layer_groups
from espalier.model.config import TransformerConfig
from espalier.model.hf import registry
from espalier.model.hf.family import UnsupportedModel
from espalier.model.layer_groups import Group
from espalier.model.mlp import GatedMlp, Mlp, by_kind
from espalier.model.moe.moe import MoeMlp
from espalier.model.transformer import Block, Transformer
from espalier.model.transforms import layer_stack
from espalier.trainers import partitioning
from tests.drawn import drawn
from tests.model.hf import arrays

TOKENS_BT = jax.random.randint(jax.random.key(1), (4, 8), 0, 40)
PREFIXED = (
    "full:dense",
    *("sliding", "sliding", "full_nope") * 2,
)  # a group of one block, and one of three
CUT = (
    "sliding",
    "sliding",
    "full_nope",
)  # of eight layers: the pattern twice, and a group of two layers
SIZES = {"vocab_size": 40, "embed_dim": 16, "num_heads": 4, "mlp_dim": 24, "sliding_window": 3}


@pytest.mark.parametrize(
    ("pattern", "layers", "want"),
    [
        ("d sssf sssf", 9, [(0, 1, 1), (1, 4, 2)]),
        ("sssssf", 26, [(0, 6, 4), (24, 1, 2)]),  # Gemma 3 1B
        ("sssssf", 34, [(0, 6, 5), (30, 1, 4)]),  # and 4B
        ("d" + 23 * "s", 24, [(0, 1, 1), (1, 1, 23)]),
        (12 * "f" + 12 * "s", 24, [(0, 1, 12), (12, 1, 12)]),
        ("sssf", 8, [(0, 4, 2)]),  # one period is the pattern's,
        ("ff", 4, [(0, 2, 2)]),  # even if a shorter one would do,
        ("sf", 2, [(0, 2, 1)]),  # and short lists are one group, as before there were several.
        ("dsss", 4, [(0, 4, 1)]),
        ("abcdefg", 7, [(0, 7, 1)]),
        ("xyz abababab", 11, [(0, 3, 1), (3, 2, 4)]),
        (1001 * "f" + "s", 1002, [(0, 1002, 1)]),  # too long to look for groups
    ],
)
def test_layers_are_divided_into_groups_of_equal_blocks(pattern, layers, want):
    kinds = tuple(pattern.replace(" ", ""))
    groups = layer_groups.divided(kinds, layers)
    assert groups == tuple(Group(*x) for x in want)
    found = [(block, i) for i in range(layers) for block in [layer_groups.place(groups, i)[0]]]
    assert all(kinds[block % len(kinds)] == kinds[i % len(kinds)] for block, i in found)
    for i in range(layers):
        block, index = layer_groups.place(groups, i)
        assert layer_groups.layers_of(groups, block)[index] == i
    # What is stored shows the groups.
    repeats = {block: group.repeats for group in groups for block in group.blocks}
    for block in repeats:
        stored = layer_groups.layers_of(layer_groups.inferred(repeats), block)
        assert stored == layer_groups.layers_of(groups, block)


def make(pattern=PREFIXED, layers=7, mlp=None, block=None, **settings):
    config = TransformerConfig(layer_pattern=pattern, num_layers=layers, **{**SIZES, **settings})
    mlp = mlp or functools.partial(by_kind, others=GatedMlp, dense=Mlp)
    return Transformer(config=config, block=functools.partial(Block, mlp=mlp, **(block or {})))


@functools.cache
def params_of(pattern=PREFIXED, layers=7):
    model = make(pattern, layers)
    return nn.unbox(drawn(model, TOKENS_BT))


def loss_and_gradient(model, params, **rngs):
    def loss(params):
        return jnp.mean(model.apply({"params": params}, TOKENS_BT, rngs=rngs) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def unrolled_gradient(pattern, layers):
    model = make(pattern, layers)
    flat = layer_stack.unroll(params_of(pattern, layers), model.config)
    return loss_and_gradient(layer_stack.unrolled(model), flat)


def same(found, want, **limits):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **limits), found, want)


@pytest.mark.parametrize(("pattern", "layers", "remat"), [(PREFIXED, 7, "full"), (CUT, 8, "dots")])
def test_scanned_groups_are_the_unrolled_layers(pattern, layers, remat):
    params, model = params_of(pattern, layers), make(pattern, layers, remat=remat)
    flat = layer_stack.unroll(params, model.config)
    assert sorted(flat["layers"]) == sorted(f"block_{i}" for i in range(layers))
    loss, gradient = loss_and_gradient(model, params)
    want, flat_gradient = unrolled_gradient(pattern, layers)
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    same(layer_stack.unroll(gradient, model.config), flat_gradient, atol=2e-6)
    # There and back, bit for bit.
    same(layer_stack.stack(flat, model.config), params, atol=0, rtol=0)
    row = {"decoder_input_tokens": jax.ShapeDtypeStruct((1, 8), jnp.int32)}
    counted = model.forward_flops(row), layer_stack.unrolled(model).forward_flops(row)
    assert counted[0] == pytest.approx(counted[1], rel=1e-9)


def test_blocks_have_the_layers_of_their_groups_and_the_mlps_of_their_kinds():
    mixture = functools.partial(MoeMlp, num_experts=3)
    model = make(mlp=functools.partial(by_kind, others=mixture, dense=Mlp))
    layers = flops.variable_shapes(model, TOKENS_BT)["params"]["layers"]
    assert {name: len(block["norm"]["scale"]) for name, block in layers.items()} == {
        **{"block_0": 1},
        **{f"block_{i}": 2 for i in (1, 2, 3)},
    }
    assert set(layers["block_0"]["mlp"]) == {"up", "down"}
    assert all("router" in layers[f"block_{i}"]["mlp"] for i in (1, 2, 3))
    settings = model.layer_settings()
    assert [layer.mlp.kind for layer in settings] == ["Mlp", *["MoeMlp"] * 6]
    assert [layer.kind.depth for layer in settings] == list(range(7))


def test_every_layer_has_initial_values_and_dropout_of_its_own():
    pattern, layers = CUT, 8

    class Seen(GatedMlp):
        def __call__(self, x_BTD, **context):
            mask = jax.random.bernoulli(self.make_rng("dropout"), shape=(64,))
            self.sow("intermediates", "mask", mask)
            return super().__call__(x_BTD, **context)

    model = make(pattern, layers, mlp=functools.partial(by_kind, others=Seen, dense=Seen))
    variables = nn.unbox(
        jax.jit(model.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, TOKENS_BT)
    )
    blocks = layer_stack.unroll(variables["params"], model.config)["layers"]
    kernels = [np.asarray(block["attention"]["query"]["kernel"]) for block in blocks.values()]
    assert len({kernel.tobytes() for kernel in kernels}) == layers
    for kernel in kernels:
        assert kernel.std() == pytest.approx(16**-0.5, rel=0.25)

    _, seen = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(
        {"params": variables["params"]}, TOKENS_BT, rngs={"dropout": jax.random.key(2)}
    )
    masks = np.concatenate([np.asarray(x) for x in jax.tree.leaves(seen["intermediates"])])
    assert masks.shape == (layers, 64) and len(np.unique(masks, axis=0)) == layers


def test_groups_have_the_same_values_on_a_mesh():
    model, params = make(), params_of()
    apply = lambda: jax.jit(lambda params: model.apply({"params": params}, TOKENS_BT))(params)  # noqa: E731
    want = apply()
    mesh = partitioning.make_mesh(shape={"fsdp": 4, "tensor": 2})
    with partitioning.use_mesh(mesh, partitioning.RULE_SETS["fsdp_tp"]):
        np.testing.assert_allclose(apply(), want, atol=1e-5)


def test_tensors_of_layers_do_not_depend_on_the_groups():
    """Cohere2 with full layers at irregular places, scanned and unrolled."""
    kinds = ["full_attention", *["sliding_attention", "full_attention"] * 3]
    config = {
        **{"model_type": "cohere2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24},
        **{"num_hidden_layers": 7, "num_attention_heads": 4, "layer_types": kinds},
        **{
            "sliding_window": 3,
            "logit_scale": 0.5,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            "head_dim": 4,
        },
    }
    family = registry.family_named("cohere2")
    read = family.model(config)
    assert [group.repeats for group in read.config.layer_groups] == [3, 1]
    assert family.config(read)["layer_types"] == kinds
    params = nn.unbox(drawn(read, TOKENS_BT))
    flat = layer_stack.unrolled(read), layer_stack.unroll(params, read.config)
    tensors = [arrays.to_hf(family, *one) for one in ((read, params), flat)]
    assert len(tensors[0]) == 2 + 7 * 8
    same(*tensors, atol=0, rtol=0)


def test_an_mlp_that_no_factory_makes_is_refused():
    with pytest.raises(ValueError, match="the MLP 'dense', but all layers have a GatedMlp"):
        make(mlp=GatedMlp).layer_settings()
    with pytest.raises(ValueError, match="'dense', which mlp.by_kind does not have: it has 'wide'"):
        make(mlp=functools.partial(by_kind, wide=Mlp)).layer_settings()
    with pytest.raises(
        UnsupportedModel, match=r"mlps is \('dense', '', '', '', '', '', ''\), not absent"
    ):
        registry.family_named("mixtral").config(make())
