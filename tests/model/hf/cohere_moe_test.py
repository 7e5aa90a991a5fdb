"""Cohere2-MoE: its older fields, stacked experts, what it cannot express. Parity with transformers is in parity_test.py."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy

from espalier.model.attention import Attention
from espalier.model.bam import moa
from espalier.model.config import TransformerConfig
from espalier.model.hf import load, registry
from espalier.model.hf.config_fields import UnsupportedConfig
from espalier.model.hf.description import describe, differences
from espalier.model.hf.family import MismatchedTensors, UnsupportedModel
from espalier.model.hf.files.safetensors_files import SINGLE
from espalier.model.hf.folded_routers import folded
from espalier.model.mlp import GatedMlp, Mlp, by_kind
from espalier.model.moe.moe import MoeMlp
from espalier.model.nexus.domain_router import DomainRouter, expert_vectors
from espalier.model.nexus.mlp_router import MlpRouter
from espalier.model.norm import LayerNorm, RMSNorm
from espalier.model.rope import Rope
from espalier.model.transformer import Block, Transformer
from espalier.trainers.checkpoints import state_tree
from tests.model.hf import arrays, cases

FAMILY = registry.family_named("cohere2_moe")
GOLDENS = [path for path in cases.CASES if path.stem.startswith("cohere2_moe")]


def golden(index):
    return cases.load(GOLDENS[index])


def changed(config, *without, **fields):
    return {key: value for key, value in (config | fields).items() if key not in without}


@pytest.mark.parametrize(
    ("index", "dense", "groups"),
    [(0, 1, [(0, 5, 1)]), (1, 2, [(0, 4, 1)])],
)
def test_the_older_fields_are_the_types_of_layers(index, dense, groups):
    config, _, model, _ = golden(index)
    older = changed(config, "layer_types", "mlp_layer_types", first_k_dense_replace=dense)
    assert differences(describe(FAMILY.model(older)), describe(model)) == []
    more = FAMILY.model(changed(older, first_k_dense_replace=dense + 1))
    assert differences(describe(more), describe(model)) != []
    assert [tuple(group) for group in model.config.layer_groups] == groups


def test_a_deep_model_is_a_prefix_and_the_periods_of_its_pattern():
    config = changed(golden(0)[0], "layer_types", "mlp_layer_types", first_k_dense_replace=1)
    config = FAMILY.model(config | {"num_hidden_layers": 49}).config
    assert [tuple(group) for group in config.layer_groups] == [(0, 1, 1), (1, 4, 12)]
    assert config.kind_names[:5] == ("full:dense", *["sliding"] * 3, "full_nope")
    nope = golden(1)[2].config.kind_names
    assert nope == ("sliding:dense", "full_nope:dense", "sliding", "full_nope")


def stacked(tensors):
    """The tensors as transformers has them in memory."""
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for name in tensors:
        if name.endswith(".experts.0.gate_proj.weight"):
            base = name.removesuffix(".0.gate_proj.weight")
            count = sum(x.startswith(base) and x.endswith("up_proj.weight") for x in tensors)
            of = lambda e, x, base=base: tensors[f"{base}.{e}.{x}_proj.weight"]  # noqa: E731
            found[f"{base}.gate_up_proj"] = np.stack(
                [np.concatenate([of(e, "gate"), of(e, "up")]) for e in range(count)]
            )
            found[f"{base}.down_proj"] = np.stack([of(e, "down") for e in range(count)])
    return found


def test_stacked_experts_are_read_bit_for_bit(tmp_path):
    config, _, model, tensors = golden(1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    fused = stacked(tensors)
    assert fused["model.layers.2.mlp.experts.gate_up_proj"].shape == (4, 40, 24)
    assert fused["model.layers.2.mlp.experts.down_proj"].shape == (4, 24, 20)
    safetensors.numpy.save_file(fused, tmp_path / SINGLE)
    _, params = load.load(tmp_path)
    back = arrays.to_hf(FAMILY, model, jax.tree.map(np.asarray, params))
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)
    short = {name: x[:3] if name.endswith("gate_up_proj") else x for name, x in fused.items()}
    safetensors.numpy.save_file(short, tmp_path / SINGLE)
    with pytest.raises(
        MismatchedTensors, match=r"4 missing \(model.layers.2.mlp.experts.3.gate_proj"
    ):
        load.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"expert_selection_fn": "top"}, "expert_selection_fn = 'top': supported are softmax"),
        ({"shared_expert_combination_strategy": "max"}, "supported are average and sum"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types = .*: 1 types for 4 layers"),
        ({"mlp_layer_types": ["moe"] * 4}, "mlp_layer_types = .*: 'moe' are not supported"),
        ({"layer_types": ["linear_attention"] * 4}, "'linear_attention' are not supported"),
        ({"sliding_window": None}, "sliding_window = None: it is needed"),
        ({"num_shared_experts": -1}, "num_shared_experts = -1: it must be a whole number"),
        ({"use_qk_norm": True}, "use_qk_norm = True: only False"),
        ({"num_expert_group": 2}, "num_expert_group = 2: not known here"),
    ],
)
def test_a_field_that_is_not_understood_is_refused(fields, text):
    with pytest.raises(UnsupportedConfig, match=text):
        FAMILY.model(golden(1)[0] | fields)


def made(
    mlp=None, pattern=("sliding", "full_nope"), norm=LayerNorm, attention=Attention, **mixture
):
    mlp = mlp or functools.partial(
        by_kind, others=functools.partial(MoeMlp, num_experts=4, **mixture), dense=GatedMlp
    )
    config = TransformerConfig(
        **{"vocab_size": 30, "num_layers": 4, "embed_dim": 16, "num_heads": 2, "mlp_dim": 12},
        **{"layer_pattern": pattern, "sliding_window": 3},
    )
    attention = functools.partial(attention, rope=Rope(base=500.0, layout="interleaved"))
    block = functools.partial(Block, layout="parallel", attention=attention, mlp=mlp, norm=norm)
    return Transformer(config=config, block=block, norm=norm, logit_scale=0.5)


@pytest.mark.parametrize(
    "model",
    [
        made(),
        made(expert_dim=5, score="sigmoid", renormalise=False, norm=RMSNorm),
        made(pattern=("full:dense", "sliding", "full_nope", "sliding:dense"), shared=GatedMlp),
        made(shared=GatedMlp, shared_experts=2, combine_shared="average", score="sigmoid"),
    ],
)
def test_own_mixtures_are_written_and_read_back(model):
    config = FAMILY.config(model)
    assert registry.family_of_model(model) is FAMILY
    assert differences(describe(model), describe(FAMILY.model(config))) == []
    assert FAMILY.shapes(model) == FAMILY.shapes(FAMILY.model(config))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (made(renormalise=False), "block.mlp.renormalise is False, not True"),
        (made(routed_scale=2.0), "block.mlp.routed_scale is 2.0, not 1.0"),
        (made(balance_bias=True), "block.mlp.balance_bias is True, not False"),
        (made(router=DomainRouter), "block.mlp.router is DomainRouter, not Dense"),
        (folded(made(router=MlpRouter))[0], "block.mlp.router is MlpRouter, not Dense"),
        (made(attention=moa.MixtureOfAttention), "block.attention is MixtureOfAttention"),
        (made(shared=Mlp), "block.mlp.shared is Mlp, not GatedMlp"),
        (
            made(pattern=("full", "sliding")),
            "layer 0 is one seeing all, not one .* without rotation",
        ),
        (
            made(pattern=("full:dense", "full_nope:dense", "sliding", "sliding")),
            "layer 0 is one seeing all, not one seeing all without rotation",
        ),
    ],
)
def test_what_the_family_lacks_is_named(model, text):
    with pytest.raises(UnsupportedModel, match=text):
        FAMILY.config(model)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_routers_that_are_linear_are_folded_to_the_kernels_that_they_amount_to(scan_layers):
    """A dense layer, then mixtures with experts that are levelled to the first three; both models have the same logits."""
    router = functools.partial(DomainRouter, domain_dim=5, levelled=3, logit_std=2.0)
    model = made(pattern=("full:dense", "sliding", "full_nope", "sliding"), router=router)
    model = model.clone(config=dataclasses.replace(model.config, scan_layers=scan_layers))
    linear, routers = folded(model)
    assert FAMILY.config(linear)["num_experts"] == 4
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 30)
    init = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    before = state_tree.flatten(nn.meta.unbox(init))
    after, seen = {**before}, 0
    for path, one in routers.items():
        own = {name: np.asarray(after.pop(stored)) for name, stored in one.inputs.items()}
        stacked = own if scan_layers else {name: x[None] for name, x in own.items()}
        layers = [
            {name: x[i] for name, x in stacked.items()} for i in range(len(stacked["up/kernel"]))
        ]
        kernels = np.stack([one.kernel(layer) for layer in layers])
        after[path] = kernels if scan_layers else kernels[0]
        for layer, kernel in zip(map(state_tree.nest, layers), kernels, strict=True):
            vectors_ED = expert_vectors(layer, layer["domains"])[:3]  # the last is levelled
            np.testing.assert_allclose(kernel[:, :3].T, vectors_ED, atol=1e-5)
            seen += 1
    assert seen == 3 and after.keys() != before.keys()
    there, here = (
        jax.jit(one.apply)({"params": state_tree.nest(params)}, tokens)
        for one, params in ((model, before), (linear, after))
    )
    np.testing.assert_allclose(here, there, atol=1e-5)


def test_routers_that_are_not_linear_stay():
    for model in (made(router=MlpRouter), made(), made(mlp=GatedMlp)):
        same, routers = folded(model)
        assert same is model and routers == {}


def test_a_prefix_may_have_another_width():
    model = golden(0)[2]
    shapes = FAMILY.shapes(model)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (14, 24)
    assert shapes["model.layers.1.mlp.experts.0.gate_proj.weight"] == (10, 24)
    one = dataclasses.replace(model.config, num_layers=5, mlp_dim=9)
    with pytest.raises(MismatchedTensors, match="layers.0.mlp.down_proj"):
        FAMILY.match(model.clone(config=one), shapes)
