"""Families of Hugging Face models: weights there and back, settings there and back, what is refused."""

import functools
import json
import pathlib
import re

import gin
import jax
import ml_dtypes
import numpy as np
import pytest

from launch import gin_config
from model.attention import Attention
from model.config import TransformerConfig
from model.hf import arrays, families
from model.hf.config_fields import UnsupportedConfig
from model.hf.description import describe, native_shapes
from model.hf.family import MismatchedTensors, UnsupportedModel
from model.linear import Dense
from model.mlp import GatedMlp, Mlp
from model.moe import MoeMlp
from model.norm import LayerNorm, RMSNorm
from model.rope import Rope
from model.surgery import layer_stack
from model.transformer import Block, Transformer

CASES = sorted((pathlib.Path(__file__).parent / "goldens" / "parity").glob("*.npz"))

# What published config.json files say, older spellings included; what is left out says nothing of the
# maths. Aya 23 from its report (arXiv 2405.15032) and model card, the others from theirs.
AYA23_8B = {
    "model_type": "cohere",
    "architectures": ["CohereForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256000,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_qk_norm": False,
    "torch_dtype": "float16",
    "model_max_length": 8192,
}
PUBLISHED = {
    "aya23_8b": AYA23_8B,
    "aya_expanse_8b": {**AYA23_8B, "logit_scale": 0.125},
    "aya23_35b": {
        **AYA23_8B,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "rope_theta": 8000000.0,
    },
    "aya_expanse_32b": {
        **AYA23_8B,
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rope_theta": 4000000,
    },
    "command_r7b": {
        **AYA23_8B,
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        "logit_scale": 0.25,
        "rope_theta": 50000,
        "head_dim": 128,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "llama2_7b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "llama3_8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "mistral_7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "qwen2p5_0p5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_window_layers": 21,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "qwen3_0p6b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "gemma2_2b": {
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
}
# Smaller than any published one: what the errors below start from.
SMALL = {
    name: {
        **config,
        "hidden_size": 8,
        "intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 11,
        "head_dim": 4,
    }
    for name, config in PUBLISHED.items()
    if name != "gpt2"
}
SMALL["gpt2"] = {**PUBLISHED["gpt2"], "n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 11}


def load(path):
    with np.load(path) as file:
        config = json.loads(str(file["config"]))
        tensors = {k.partition("/")[2]: file[k] for k in file if k.startswith("tensor/")}
    family = families.family_of_config(config)
    return config, family, family.model(config), tensors


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("dtype", "scanned"), [(np.float32, True), (ml_dtypes.bfloat16, False)])
def test_weights_come_back_bit_for_bit(path, dtype, scanned):
    _, family, model, tensors = load(path)
    model = model if scanned else layer_stack.unrolled(model)
    # Bit patterns that arithmetic would not keep: negative zero, a NaN with a payload.
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        bits = tensor.reshape(-1).view(f"u{tensor.itemsize}")
        bits[0] = 1 << (8 * tensor.itemsize - 1)
        bits[-1] = np.iinfo(bits.dtype).max - 1
    params = arrays.to_native(family, model, tensors)
    paths = jax.tree_util.tree_leaves_with_path(params)
    found = {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
    assert found == native_shapes(model)
    back = arrays.to_hf(family, model, params)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        same(back[name], tensor)
    again = arrays.to_native(family, model, back)
    jax.tree.map(same, params, again)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_settings_come_back(path):
    config, family, model, _ = load(path)
    written = json.loads(json.dumps(family.config(model)))
    assert describe(family.model(written)) == describe(model)
    # Every field that transformers wrote, but for those that say nothing of the function.
    silent = {
        *("attention_dropout", "initializer_range", "max_position_embeddings", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "pretraining_tp"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        *("attn_pdrop", "embd_pdrop", "resid_pdrop", "add_cross_attention"),
        *("reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx"),
        *("use_bidirectional_attention", "max_window_layers"),
    }
    for key, value in config.items():
        if key in silent or key.startswith("summary_"):
            continue
        if key == "n_inner" and value is None:
            value = 4 * config["n_embd"]
        if key in ("sliding_window", "layer_types") and "sliding_attention" not in config.get(
            "layer_types", ["sliding_attention"]
        ):
            continue  # a window that no layer has
        if key == "hidden_act" and family.name == "gemma2":
            continue  # gemma2 reads hidden_activation
        names = {"gelu_new": "gelu_pytorch_tanh"}
        got = written[key]
        assert (
            names.get(got, got) == names.get(value, value)
            if isinstance(got, str)
            else (got == value)
        ), key


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "llama2_7b"])
def test_published_configs_are_the_models_of_the_gin_files(name):
    """What gin builds and what config.json builds is one model, and the right family is found for it."""
    try:
        config = gin_config.load(
            [f"t5x_configs/models/{name}.gin", "t5x_configs/runs/pretrain.gin"],
            ["MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=()"],
            entry="launch.train:train",
        )
        model = config.arguments()["recipe"].model
        family = families.family_of_config(PUBLISHED[name])
        assert families.family_of_model(model) is family
        written = family.config(model)
        here = describe(model)
    finally:
        gin.clear_config(clear_constants=True)
    there = describe(family.model(PUBLISHED[name]))
    assert {k: v for k, v in here.items() if v != there.get(k)} == {}
    assert set(here) == set(there)
    assert written["model_type"] == family.name
    assert set(family.shapes(family.model(PUBLISHED[name]))) == set(
        family.shapes(family.model(written))
    )


@pytest.mark.parametrize(
    ("name", "non_embedding", "embedding"),
    [("aya23_8b", 6_979_457_024, 1_048_576_000), ("aya23_35b", 32_883_679_232, 2_097_152_000)],
)
def test_aya_has_the_reported_parameters(name, non_embedding, embedding):
    """Aya 23's report counts both parts exactly (arXiv 2405.15032, section 2)."""
    family = families.family_of_config(PUBLISHED[name])
    sizes = {k: int(np.prod(v)) for k, v in family.shapes(family.model(PUBLISHED[name])).items()}
    assert sizes.pop("model.embed_tokens.weight") == embedding
    assert sum(sizes.values()) == non_embedding
    assert "lm_head.weight" not in sizes


def test_every_factory_is_a_partial_of_a_class():
    for name, config in SMALL.items():
        model = families.family_of_config(config).model(config)
        waiting, seen = [getattr(model, f) for f in ("block", "norm", "position_embed")], 0
        while waiting:
            factory = waiting.pop()
            if factory is None:
                continue
            assert isinstance(factory, functools.partial) and isinstance(factory.func, type), name
            assert not factory.args
            assert getattr(
                __import__(factory.func.__module__, fromlist=["x"]), factory.func.__name__
            )
            seen += 1
            waiting += [v for v in factory.keywords.values() if callable(v) and type(v) is not Rope]
        assert seen >= 5


# --- What a config.json cannot say -------------------------------------------------------------------


def refused(name, without=(), **fields):
    config = {k: v for k, v in (SMALL[name] | fields).items() if k not in without}
    with pytest.raises(UnsupportedConfig) as raised:
        families.family_of_config(config).model(config)
    assert str(raised.value).startswith("config.json")
    return str(raised.value)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "gpt2"])
def test_the_base_of_the_rotation_is_not_guessed(name):
    message = refused(name, without=("rope_theta",))
    assert "rope_theta" in message and "default differs" in message and "10000.0" in message


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama2_7b", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ("llama2_7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("llama2_7b", {"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ("llama2_7b", {"rope_scaling": {"type": "linear"}}, "factor missing"),
        (
            "llama2_7b",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "original_max_position_embeddings is missing",
        ),
        ("llama2_7b", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters says 5.0"),
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
    for family in families.FAMILIES:
        assert families.family_named(family.name) is family
    with pytest.raises(ValueError, match="No family 'other': choose from llama, .*gpt2"):
        families.family_named("other")
    assert families.family_of_config({"architectures": ["GPT2LMHeadModel"]}).name == "gpt2"


# --- What a model has and a family has not -----------------------------------------------------------

SIZES = TransformerConfig(
    vocab_size=11, num_layers=4, embed_dim=8, num_heads=2, mlp_dim=5, sliding_window=3
)


def with_config(**changes):
    import dataclasses

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
            "llama",
            {"config": with_config(num_heads=3, head_dim=4)},
            "num_attention_heads = 3: it must divide hidden_size",
        ),
        ("cohere2", {"config": with_config(head_dim=6)}, "head_dim = 6: only 4 is supported"),
    ],
)
def test_a_feature_that_a_family_cannot_express_is_named(family, model, words):
    with pytest.raises(UnsupportedModel, match=re.escape(words)):
        families.family_named(family).config(Transformer(**({"config": SIZES} | model)))


def test_classes_that_nobody_knows_are_named():
    class Other(GatedMlp):
        pass

    class OtherDense(Dense):
        pass

    other = Transformer(config=SIZES, block=functools.partial(Block, mlp=Other))
    with pytest.raises(UnsupportedModel) as raised:
        families.family_of_model(other)
    lines = str(raised.value).splitlines()
    assert len(lines) == len(families.FAMILIES)
    assert all("block.mlp is Other" in line for line in lines)
    dense = functools.partial(Block, mlp=functools.partial(GatedMlp, dense=OtherDense))
    with pytest.raises(UnsupportedModel, match="block.mlp.dense is OtherDense, not Dense"):
        families.family_named("llama").config(Transformer(config=SIZES, block=dense))


def test_blocks_that_differ_between_layers_are_named():
    def block(*, kind, **kwargs):
        return Block(kind=kind, mlp=Mlp if kind.window else GatedMlp, **kwargs)

    config = with_config(layer_pattern=("full", "sliding"))
    with pytest.raises(UnsupportedModel, match="block_1.mlp is Mlp, not absent"):
        families.family_named("gemma2").config(Transformer(config=config, block=block))


def test_an_array_without_a_name_is_refused():
    family = families.family_named("llama")
    model = Transformer(config=SIZES, block=functools.partial(Block, post_norm=RMSNorm))
    with pytest.raises(UnsupportedModel, match="no place for .*attention_post_norm/scale"):
        family.pieces(model)


# --- Tensors that do not fit -------------------------------------------------------------------------


@pytest.fixture
def llama():
    family, config = families.family_named("llama"), SMALL["llama2_7b"]
    model = family.model(config)
    return family, model, {k: np.ones(v, np.float32) for k, v in family.shapes(model).items()}


def test_all_that_is_wrong_with_tensors_is_said_at_once(llama):
    family, model, tensors = llama
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.extra"] = np.zeros(1, np.float32)
    tensors["model.norm.weight"] = np.zeros(9, np.float32)
    with pytest.raises(MismatchedTensors) as raised:
        arrays.to_native(family, model, tensors)
    message = str(raised.value)
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in message
    assert "1 without a counterpart (model.layers.0.extra)" in message
    assert "1 of another shape (model.norm.weight (9,) instead of (8,))" in message


def test_long_lists_are_cut(llama):
    family, model, _ = llama
    with pytest.raises(MismatchedTensors, match=r"21 missing \(.*, and 11 more\)"):
        arrays.to_native(family, model, {})


def test_a_transposed_tensor_is_of_another_shape(llama):
    family, model, tensors = llama
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T
    with pytest.raises(MismatchedTensors, match=r"up_proj.weight \(8, 5\) instead of \(5, 8\)"):
        arrays.to_native(family, model, tensors)


def test_a_head_beside_the_embedding_it_is_tied_to_must_be_equal():
    family, config = families.family_named("cohere"), SMALL["aya23_8b"]
    model = family.model(config)
    tensors = {k: np.ones(v, np.float32) for k, v in family.shapes(model).items()}
    plain = arrays.to_native(family, model, tensors)
    head = tensors["model.embed_tokens.weight"].copy()
    with_head = arrays.to_native(family, model, {**tensors, "lm_head.weight": head})
    jax.tree.map(same, plain, with_head)
    head[3, 2] = 2.0
    with pytest.raises(
        MismatchedTensors, match='lm_head.weight differs .*"tie_word_embeddings": false'
    ):
        arrays.to_native(family, model, {**tensors, "lm_head.weight": head})
    with pytest.raises(MismatchedTensors, match="of another shape .lm_head.weight"):
        arrays.to_native(family, model, {**tensors, "lm_head.weight": head[1:]})


def test_tensors_that_carry_nothing_are_passed_over(llama):
    family, model, tensors = llama
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    arrays.to_native(family, model, tensors)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_is_read_with_and_without_the_prefix_and_its_masks(prefix):
    family, config = families.family_named("gpt2"), SMALL["gpt2"]
    model = family.model(config)
    rng = np.random.default_rng(0)
    tensors = {k: rng.normal(size=v).astype("f4") for k, v in family.shapes(model).items()}
    found = {k.replace("transformer.", prefix): v for k, v in tensors.items()}
    found |= {
        f"{prefix}h.{i}.attn.{name}": np.zeros((1, 1), np.float32)
        for i in range(2)
        for name in ("bias", "masked_bias")
    }
    params = arrays.to_native(family, model, found)
    back = arrays.to_hf(family, model, params)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        same(back[name], tensor)
    # Query, key and value lie side by side.
    whole = tensors["transformer.h.1.attn.c_attn.weight"]
    for i, name in enumerate(("query", "key", "value")):
        kernel = params["layers"]["block_0"]["attention"][name]["kernel"][1]
        np.testing.assert_array_equal(kernel, whole[:, 8 * i : 8 * (i + 1)])
