"""What a config.json may not say, and what a model may have that a family has not."""

import dataclasses
import functools
import re

import pytest

from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.hf import registry
from espalier.model.hf.config_fields import UnsupportedConfig
from espalier.model.hf.family import UnsupportedModel
from espalier.model.linear import Dense
from espalier.model.mlp import GatedMlp, Mlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.norm import LayerNorm, RMSNorm
from espalier.model.transformer import Block, Transformer
from tests.model.hf.cases import SMALL


def refused(name, without=(), **fields):
    config = {k: v for k, v in (SMALL[name] | fields).items() if k not in without}
    with pytest.raises(UnsupportedConfig) as raised:
        registry.family_of_config(config).model(config)
    assert str(raised.value).startswith("config.json")
    return str(raised.value)


# Without a base of rotations, or with one whose default never changed.
NO_BASE = ("gpt2", "pythia_160m")


@pytest.mark.parametrize("name", [name for name in SMALL if name not in NO_BASE])
def test_the_base_of_the_rotation_is_not_guessed(name):
    message = refused(name, without=("rope_theta",))
    assert "rope_theta" in message and "default differs" in message and "10000.0" in message


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
MAGNITUDES = {"mscale": 0.7, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "llama2_7b",
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "original_max_position_embeddings is missing",
        ),
        ("llama2_7b", {"rope_scaling": YARN | {"mscale": 0.7}}, "are read only together"),
        (
            "llama2_7b",
            {"rope_scaling": YARN | MAGNITUDES | {"attention_factor": 1.5}},
            "without attention_factor",
        ),
        ("llama2_7b", {"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast must exceed"),
        ("llama2_7b", {"rope_scaling": YARN | {"beta_slow": "1"}}, "beta_slow in it must be"),
        (
            "llama2_7b",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "truncate": False}},
            "truncate in it: not known with rope type 'linear'",
        ),
        (
            "llama2_7b",
            {"rope_scaling": {"mrope_section": [1, 1]}},
            "mrope_section in it: not known",
        ),
        (
            "llama2_7b",
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 4.0}},
            "it differs from rope_parameters",
        ),
        ("llama2_7b", {"use_rope": False, "note": "x"}, "note = 'x', use_rope = False: not known"),
        ("mistral_7b", {"mlp_bias": True}, "mlp_bias = True: only False is supported"),
        ("command_r7b", {"rotary_pct": 0.5}, "rotary_pct = 0.5: only 1.0 is supported"),
        ("olmo2_7b", {"clip_qkv": 8.0}, "clip_qkv = 8.0: not known"),
        ("olmo3_7b", {"rope_theta": 10000.0}, "rope_theta = 10000.0: only 500000.0"),
        (
            "olmo3_7b",
            {"rope_parameters": {"rope_theta": 500000.0}},
            "full_attention and sliding_attention in it must be objects",
        ),
        ("smollm3_3b", {"no_rope_layers": [1]}, "1 values for 2 layers"),
        (
            "smollm3_3b",
            {"use_sliding_window": True, "sliding_window": 3, "no_rope_layers": [1, 0]},
            "a layer with a window and no rotation",
        ),
        (
            "smollm3_3b",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "use_sliding_window is not true",
        ),
        ("pythia_160m", {"rope_theta": 10000.0}, "rope_theta = 10000.0: not known"),
        ("pythia_160m", {"rotary_pct": 0.25}, "1 of head_dim = 4 dimensions"),
        ("pythia_160m", {"rotary_pct": 1.5}, "partial_rotary_factor must be at most 1"),
        ("apertus_8b", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ("gemma3_1b", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0: only None"),
        ("qwen3_30b_a3b", {"decoder_sparse_step": 3}, "no layer has experts"),
        ("qwen3_30b_a3b", {"mlp_only_layers": [0, 1]}, "mlp_only_layers = [0, 1]: no layer has"),
        ("qwen3_30b_a3b", {"num_local_experts": 3}, "num_experts is 128; make them equal"),
        ("qwen3_30b_a3b", {"num_experts": None}, "num_experts = None: it is needed"),
        ("gemma3_1b", {"rope_local_base_freq": 0}, "rope_local_base_freq = 0: it must be"),
        ("llama2_7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("llama2_7b", {"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ("llama2_7b", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (
            "llama2_7b",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "original_max_position_embeddings is missing",
        ),
        ("llama2_7b", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters has 5.0"),
        ("llama2_7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only 1.0"),
        ("llama2_7b", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ("llama2_7b", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama2_7b", {"num_attention_heads": 3, "head_dim": 4}, "must divide hidden_size"),
        ("llama2_7b", {"num_key_value_heads": 3}, "num_kv_heads = 3 does not divide"),
        ("llama2_7b", {"torch_dtype": "int8"}, "torch_dtype = 'int8'"),
        ("aya23_8b", {"logit_scale": None}, "logit_scale = None: it is needed"),
        ("command_r7b", {"sliding_window": None}, "sliding_window = None: it is needed"),
        ("command_r7b", {"head_dim": 8}, "head_dim = 8: only 4 is supported"),
        ("command_r7b", {"use_qk_norm": True}, "use_qk_norm = True: only False"),
        ("command_r7b", {"layer_types": ["full_attention"]}, "1 types for 2 layers"),
        ("command_r7b", {"layer_types": ["full_attention", "other"]}, "'other' are not supported"),
        (
            "qwen2p5_0p5b",
            {"layer_types": ["sliding_attention"] * 2},
            "use_sliding_window is not true",
        ),
        ("gemma2_2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True",
        ),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ],
)
def test_a_field_that_changes_the_maths_and_is_not_supported_is_named(name, fields, words):
    assert words in refused(name, **fields)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama2_7b", {"hidden_size": "8"}, "hidden_size = '8': it must be a whole number above 0"),
        ("llama2_7b", {"num_attention_heads": 0}, "it must be a whole number above 0"),
        ("llama2_7b", {"num_hidden_layers": 2.0}, "it must be a whole number above 0"),
        ("llama2_7b", {"vocab_size": True}, "it must be a whole number above 0"),
        ("llama2_7b", {"rms_norm_eps": "1e-5"}, "it must be a number above 0"),
        ("llama2_7b", {"rope_theta": float("inf")}, "it must be a number above 0"),
        ("llama2_7b", {"tie_word_embeddings": "false"}, "it must be true or false"),
        ("llama2_7b", {"hidden_act": ["silu"]}, "it must be a text"),
        ("llama2_7b", {"rope_scaling": "linear"}, "it must be an object"),
        (
            "llama2_7b",
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "factor in it must be a number above 0",
        ),
        (
            "llama2_7b",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "full_attention in it: only one rotation of all layers",
        ),
        ("qwen2p5_0p5b", {"layer_types": [["full_attention"], 1]}, "it must be a list of texts"),
        ("qwen2p5_0p5b", {"use_sliding_window": True, "max_window_layers": -1}, "a whole number"),
        ("mistral_7b", {"sliding_window": "7"}, "it must be a whole number above 0"),
        ("gemma2_2b", {"attn_logit_softcapping": 0}, "it must be a number above 0"),
        ("gemma2_2b", {"query_pre_attn_scalar": 0}, "it must be a number above 0"),
        ("llama2_7b", {"architectures": 3}, "architectures = 3 must be a list of texts"),
        ("llama2_7b", {"hidden_size": 10**9}, "it must be at most 1,048,576"),
        ("qwen3_0p6b", {"head_dim": 2 * 10**9}, "it must be at most 1,048,576"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named_with_what_it_must_be(name, fields, words):
    message = refused(name, **fields)
    assert words in message and list(fields)[-1] in message


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("aya23_8b", "logit_scale"),
        ("aya23_8b", "hidden_size"),
        ("mistral_7b", "sliding_window"),
        ("mistral_7b", "num_key_value_heads"),
        ("mixtral_8x7b", "num_local_experts"),
        ("qwen3_0p6b", "head_dim"),
        ("gemma2_2b", "query_pre_attn_scalar"),
        ("gpt2", "n_positions"),
    ],
)
def test_a_field_that_is_needed_is_asked_for(name, key):
    assert f"{key} is absent: it is needed" in refused(name, without=(key,))


def test_code_of_a_checkpoint_is_refused():
    assert "'auto_map' names code" in refused("llama2_7b", auto_map={"AutoModel": "x.Y"})


@pytest.mark.parametrize(
    "fields", [{"model_type": "t5"}, {"architectures": ["LlamaForSequenceClassification"]}]
)
def test_other_models_are_refused_with_a_list_of_the_supported_ones(fields):
    message = refused("llama2_7b", **fields)
    assert "is not supported" in message and "cohere2 (Cohere2ForCausalLM)" in message


def test_families_are_found_by_name():
    for family in registry.FAMILIES:
        assert registry.family_named(family.name) is family
    with pytest.raises(ValueError, match="No family 'other': choose from apertus, .*mt5"):
        registry.family_named("other")
    assert registry.family_of_config({"architectures": ["GPT2LMHeadModel"]}).name == "gpt2"


SIZES = TransformerConfig(
    vocab_size=11, num_layers=4, embed_dim=8, num_heads=2, mlp_dim=5, sliding_window=3
)


def with_config(**changes):
    return dataclasses.replace(SIZES, **changes)


@pytest.mark.parametrize(
    ("family", "model", "words"),
    [
        ("llama", {"logit_scale": 0.5}, "logit_scale is 0.5, not 1.0"),
        ("llama", {"logit_softcap": 5.0}, "logit_softcap is 5.0, not None"),
        ("llama", {"embed_scale": 2.0}, "embed_scale is 2.0, not 1.0"),
        (
            "llama",
            {"block": functools.partial(Block, layout="parallel")},
            "block.layout is parallel",
        ),
        ("llama", {"block": functools.partial(Block, mlp=Mlp)}, "block.mlp is Mlp, not GatedMlp"),
        ("llama", {"block": functools.partial(Block, norm=LayerNorm)}, "block.norm is LayerNorm"),
        (
            "llama",
            {"block": functools.partial(Block, post_norm=RMSNorm)},
            "block.post_norm is RMSNorm",
        ),
        (
            "llama",
            {"block": functools.partial(Block, norm=functools.partial(RMSNorm, eps=1e-3))},
            "block.norm.eps is 0.001, not 1e-06",
        ),
        (
            "llama",
            {
                "block": functools.partial(
                    Block, attention=functools.partial(Attention, softcap=2.0)
                )
            },
            "block.attention.softcap is 2.0, not None",
        ),
        (
            "llama",
            {
                "block": functools.partial(
                    Block, attention=functools.partial(Attention, out_bias=True)
                )
            },
            "block.attention.out_bias is True, not False",
        ),
        (
            "llama",
            {"block": functools.partial(Block, attention=functools.partial(Attention, scale=0.1))},
            "block.attention.scale is 0.1, not 0.5",
        ),
        (
            "llama",
            {"config": with_config(layer_pattern=("sliding",))},
            "layer 0 is one of window 3",
        ),
        (
            "mistral",
            {"config": with_config(layer_pattern=("sliding", "full"))},
            "layer 1 is one seeing all, not one of window 3",
        ),
        (
            "cohere",
            {"config": with_config(layer_pattern=("full", "full_nope"))},
            "layer 1 is one seeing all without rotation, not one seeing all",
        ),
        (
            "mixtral",
            {
                "block": functools.partial(
                    Block, mlp=functools.partial(MoeMlp, num_experts=3, renormalise=False)
                )
            },
            "block.mlp.renormalise is False, not True",
        ),
        (
            "mixtral",
            {
                "block": functools.partial(
                    Block, mlp=functools.partial(MoeMlp, renormalise=False, shared=GatedMlp)
                )
            },
            "block.mlp.renormalise is False, not True; block.mlp.shared is GatedMlp, not None",
        ),
        (
            "mixtral",
            {
                "block": functools.partial(
                    Block,
                    mlp=functools.partial(
                        MoeMlp, score="sigmoid", routed_scale=2.5, balance_bias=True, expert_dim=4
                    ),
                )
            },
            "block.mlp.expert_dim is 4, not 5; block.mlp.score is sigmoid, not softmax; "
            "block.mlp.routed_scale is 2.5, not 1.0; block.mlp.balance_bias is True, not False",
        ),
        (
            "llama",
            {"config": with_config(num_heads=3, head_dim=4)},
            "num_attention_heads = 3: it must divide hidden_size",
        ),
        ("cohere2", {"config": with_config(head_dim=6)}, "head_dim = 6: only 4 is supported"),
    ],
)
def test_a_feature_that_a_family_cannot_express_is_named(family, model, words):
    with pytest.raises(UnsupportedModel, match=re.escape(words)):
        registry.family_named(family).config(Transformer(**({"config": SIZES} | model)))


def test_classes_that_nobody_knows_are_named():
    class Other(GatedMlp):
        pass

    class OtherDense(Dense):
        pass

    other = Transformer(config=SIZES, block=functools.partial(Block, mlp=Other))
    with pytest.raises(UnsupportedModel) as raised:
        registry.family_of_model(other)
    (line,) = str(raised.value).splitlines()
    assert "A 'llama' model cannot have these settings: block.mlp is Other, not GatedMlp." in line
    dense = functools.partial(Block, mlp=functools.partial(GatedMlp, dense=OtherDense))
    with pytest.raises(UnsupportedModel, match="block.mlp.dense is OtherDense, not Dense"):
        registry.family_named("llama").config(Transformer(config=SIZES, block=dense))


def test_blocks_that_differ_between_layers_are_named():
    def block(*, kind, **kwargs):
        return Block(kind=kind, mlp=Mlp if kind.window else GatedMlp, **kwargs)

    config = with_config(layer_pattern=("full", "sliding"))
    with pytest.raises(UnsupportedModel, match="block_1.mlp is Mlp, not absent"):
        registry.family_named("gemma2").config(Transformer(config=config, block=block))


def test_an_array_without_a_name_is_refused():
    family = registry.family_named("llama")
    model = Transformer(config=SIZES, block=functools.partial(Block, post_norm=RMSNorm))
    with pytest.raises(UnsupportedModel, match="no tensor for .*attention_post_norm/scale"):
        family.pieces(model)


def test_how_a_mixture_is_trained_is_no_matter_of_its_checkpoint():
    limits = {"capacity_factor": 1.25, "exchange_factor": 2.0}
    mlp = functools.partial(MoeMlp, balance_loss=0.01, router_z_loss=0.001, **limits)
    model = Transformer(config=SIZES, block=functools.partial(Block, mlp=mlp), tie_embeddings=False)
    assert registry.family_named("mixtral").config(model)["num_experts_per_tok"] == 2
