"""The supported families, and the family of a config.json or of a model.

Llama-like families have sequential blocks, RMSNorm, gated MLPs and half-split rotary embeddings.
Mistral adds a window to every layer, Qwen2 biases on queries, keys and values, Qwen3 norms over the
dimensions of each head, Mixtral a mixture of experts (arXiv 2401.04088).

Gemma 2 (arXiv 2408.00118): RMSNorm with gains 1 + w before and after attention and MLP, GeGLU, soft
caps on both kinds of logits, embeddings times sqrt(D), and every other layer with a window.

Cohere (Command-R, Aya 23, Aya Expanse) and Cohere2 (Command R7B): parallel blocks under one LayerNorm
without bias, SwiGLU, interleaved rotation, tied embeddings, scaled logits. Cohere may norm queries and
keys, with gains per head and dimension. In Cohere2 the layers without a window have no positional
encoding (arXiv 2504.00698).

T5 and mT5: model/hf/t5_families.py.

GPT-2: learned positions, LayerNorm and projections with biases, query, key and value in one tensor.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from espalier.model.attention import Attention
from espalier.model.embed import Positions
from espalier.model.hf.config_fields import (
    ACTIVATIONS,
    ConfigFields,
    UnsupportedConfig,
    activation_field,
    rope_fields,
)
from espalier.model.hf.family import Family, Part, UnsupportedModel, check_language_model, field
from espalier.model.hf.mapping import Row
from espalier.model.hf.t5_families import MT5, T5
from espalier.model.mlp import GatedMlp, Mlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.norm import LayerNorm, RMSNorm
from espalier.model.transformer import Transformer


def _rows(
    names: Mapping[str, str], *leaves: str, layer: str = "model.layers.{layer}.", transpose=True
) -> tuple[Row, ...]:
    return tuple(
        Row(
            f"{ours}/{leaf}",
            f"{layer}{theirs}.{'bias' if leaf == 'bias' else 'weight'}",
            transpose=transpose and leaf == "kernel",
        )
        for ours, theirs in names.items()
        for leaf in leaves
    )


_HEADS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_PROJECTIONS = {
    **{f"attention/{ours}": f"self_attn.{theirs}_proj" for ours, theirs in _HEADS.items()},
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_NORMS = {
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "norm": "input_layernorm",
}
_ROWS = (
    Row("token_embed/embedding", "model.embed_tokens.weight"),
    Row("lm_head/embedding", "lm_head.weight"),
    Row("final_norm/scale", "model.norm.weight"),
    *_rows(_PROJECTIONS, "kernel", "bias"),
    *_rows(_NORMS, "scale"),
)
_LLAMA_ROWS = (*_ROWS, *_rows({"mlp_norm": "post_attention_layernorm"}, "scale"))
_EXPERTS = {
    "mlp/router": "block_sparse_moe.gate",
    "mlp/gate": "block_sparse_moe.experts.{expert}.w1",
    "mlp/down": "block_sparse_moe.experts.{expert}.w2",
    "mlp/up": "block_sparse_moe.experts.{expert}.w3",
}
_GEMMA2_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GPT2_PROJECTIONS = {
    "attention/out": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
_GPT2_LAYER = "transformer.h.{layer}."
_GPT2_ROWS = (
    Row("token_embed/embedding", "transformer.wte.weight"),
    Row("positions/embedding", "transformer.wpe.weight"),
    Row("lm_head/embedding", "lm_head.weight"),
    *_rows({"final_norm": "ln_f"}, "scale", "bias", layer="transformer."),
    *_rows({"norm": "ln_1", "mlp_norm": "ln_2"}, "scale", "bias", layer=_GPT2_LAYER),
    # Projections are stored as [in, out].
    *_rows(_GPT2_PROJECTIONS, "kernel", "bias", layer=_GPT2_LAYER, transpose=False),
    *(
        Row(f"attention/{name}/{leaf}", f"{_GPT2_LAYER}attn.c_attn.{theirs}", joined=i)
        for i, name in enumerate(("query", "key", "value"))
        for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))
    ),
)


def _window(here: Mapping[str, Any]) -> int | None:
    """Returns the window of the first layer that has one.

    Models with several windows are rejected later, when descriptions are compared.
    """
    return next((window for window, _ in here["layers"] if window is not None), None)


def _window_of_all(read: Callable[[ConfigFields, str], int | None]) -> Part:
    """Returns the part of a window that all layers have; `read` is a method of ConfigFields."""

    def layers(fields: ConfigFields) -> dict[str, Any]:
        window = read(fields, "sliding_window")
        pattern = ("full",) if window is None else ("sliding",)
        return {"config.layer_pattern": pattern, "config.sliding_window": window}

    return Part(layers, lambda here: {"sliding_window": _window(here)})


def _needed_window(fields: ConfigFields, pattern: tuple[str, ...]) -> int | None:
    return fields.required("sliding_window") if "sliding" in pattern else None


def _qwen_window(fields: ConfigFields, pattern: tuple[str, ...]) -> int | None:
    if fields.get("use_sliding_window", False):
        return fields.required("sliding_window")
    if "sliding" in pattern:
        raise fields.error("layer_types", "use_sliding_window is not true")
    return None


def _layer_types(
    slides: Callable[[ConfigFields, int], bool],
    *,
    full: str = "full",
    window: Callable[[ConfigFields, tuple[str, ...]], int | None] = _needed_window,
    more: Callable[[list[str]], dict[str, Any]] = lambda types: {},
) -> Part:
    """Returns the part of the layers' types.

    Args:
      slides: whether a layer has a window, in files without layer_types.
      full: this project's name of layers without a window.
      window: returns the window of the layers of a pattern.
      more: returns further fields, from the layers' types.
    """
    kinds = {"sliding_attention": "sliding", "full_attention": full}

    def read(fields: ConfigFields) -> dict[str, Any]:
        layers = range(fields.required("num_hidden_layers"))
        types = ["sliding_attention" if slides(fields, i) else "full_attention" for i in layers]
        pattern = fields.layer_pattern(kinds, fields.get("layer_types", types))
        return {
            "config.layer_pattern": pattern,
            "config.sliding_window": window(fields, pattern),
        }

    def write(here: Mapping[str, Any]) -> dict[str, Any]:
        types = ["full_attention" if w is None else "sliding_attention" for w, _ in here["layers"]]
        return {"sliding_window": _window(here), "layer_types": types, **more(types)}

    return Part(read, write)


def _cohere2_more(types: list[str]) -> dict[str, Any]:
    fourth = [(layer + 1) % 4 == 0 for layer in range(len(types))]
    # The key of the first releases with Cohere2.
    full = [kind == "full_attention" for kind in types]
    return {"sliding_window_pattern": 4} if full == fourth else {}


def _cohere2_head_dim(fields: ConfigFields) -> dict[str, Any]:
    heads = fields.required("num_attention_heads")
    fields.neutral(head_dim=fields.required("hidden_size") // heads)
    return {}


def _cohere_qk_norm(fields: ConfigFields) -> dict[str, Any]:
    if not fields.get("use_qk_norm", False):
        return {}
    name, eps = "block.attention.qk_norm", fields.get("layer_norm_eps", 1e-5)
    return {name: LayerNorm, f"{name}.eps": eps, f"{name}.scale_dims": 2}


def _rope(layout: str = "half") -> Part:
    return Part(lambda fields: {"block.attention.rope": fields.rope(layout)}, rope_fields)


def _activation(key: str, default: str, encode: Callable[[Any], Any] = activation_field) -> Part:
    decode = ACTIVATIONS.__getitem__
    return field(key, "block.mlp.activation", default=default, decode=decode, encode=encode)


_SIZES = (
    field("vocab_size", "config.vocab_size"),
    field("hidden_size", "config.embed_dim"),
    field("intermediate_size", "config.mlp_dim"),
    field("num_hidden_layers", "config.num_layers"),
    field("num_attention_heads", "config.num_heads"),
)
_KV_HEADS = field("num_key_value_heads", "config.num_kv_heads")
_KV_HEADS_OR_ALL = field("num_key_value_heads", "config.num_kv_heads", default=None)
_HEAD_DIM = field("head_dim", "config.head_dim")
_HEAD_DIM_OR_EQUAL = field("head_dim", "config.head_dim", default=None)
_OWN_HEAD = field("tie_word_embeddings", "tie_embeddings", default=False)
_TIED_HEAD = field("tie_word_embeddings", "tie_embeddings", default=True)
_RMS_EPS = field("rms_norm_eps", "norm.eps", default=1e-6)
_SILU = _activation("hidden_act", "silu")
_BIAS = field(
    "attention_bias", "block.attention.qkv_bias", "block.attention.out_bias", default=False
)
_QWEN_LAYERS = _layer_types(
    lambda fields, layer: (
        fields.get("use_sliding_window", False) and layer >= fields.get("max_window_layers", 28)
    ),
    window=_qwen_window,
    more=lambda types: {"use_sliding_window": "sliding_attention" in types},
)
_LLAMA_LIKE = {"norm": RMSNorm, "block.attention": Attention, "block.mlp": GatedMlp}
_COHERE_LIKE = {**_LLAMA_LIKE, "norm": LayerNorm, "block.layout": "parallel"}
_COHERE_PARTS = (
    *(*_SIZES, _KV_HEADS_OR_ALL, _rope("interleaved"), _SILU, _TIED_HEAD, _BIAS),
    field("layer_norm_eps", "norm.eps", default=1e-5),
    field("logit_scale", "logit_scale"),
)

LLAMA = Family(
    *("llama", "LlamaForCausalLM"),
    fixed=_LLAMA_LIKE,
    parts=(
        *(
            *_SIZES,
            _KV_HEADS_OR_ALL,
            _HEAD_DIM_OR_EQUAL,
            _rope(),
            _RMS_EPS,
            _SILU,
            _OWN_HEAD,
            _BIAS,
        ),
        field("mlp_bias", "block.mlp.use_bias", default=False),
    ),
    whole_heads=True,
    rows=_LLAMA_ROWS,
)
_QWEN2_PARTS = (*_SIZES, _KV_HEADS, _rope(), _SILU, _OWN_HEAD)
MISTRAL = Family(
    *("mistral", "MistralForCausalLM"),
    fixed=_LLAMA_LIKE,
    parts=(*_QWEN2_PARTS, _HEAD_DIM_OR_EQUAL, _RMS_EPS, _window_of_all(ConfigFields.present)),
    rows=_LLAMA_ROWS,
)
MIXTRAL = Family(
    *("mixtral", "MixtralForCausalLM"),
    fixed={**_LLAMA_LIKE, "block.mlp": MoeMlp},
    parts=(
        *(*_QWEN2_PARTS, _HEAD_DIM_OR_EQUAL, _window_of_all(ConfigFields.optional)),
        field("rms_norm_eps", "norm.eps", default=1e-5),
        field("num_local_experts", "block.mlp.num_experts", absent=1),
        field("num_experts_per_tok", "block.mlp.top_k", absent=1),
    ),
    rows=(*_LLAMA_ROWS, *_rows(_EXPERTS, "kernel")),
)
QWEN2 = Family(
    *("qwen2", "Qwen2ForCausalLM"),
    fixed={**_LLAMA_LIKE, "block.attention.qkv_bias": True},
    parts=(*_QWEN2_PARTS, _HEAD_DIM_OR_EQUAL, _RMS_EPS, _QWEN_LAYERS),
    rows=_LLAMA_ROWS,
)
QWEN3 = Family(
    *("qwen3", "Qwen3ForCausalLM"),
    fixed={**_LLAMA_LIKE, "block.attention.qk_norm": RMSNorm},
    norms=("block.norm", "block.attention.qk_norm"),
    parts=(*_QWEN2_PARTS, _HEAD_DIM, _RMS_EPS, _QWEN_LAYERS, _BIAS),
    rows=_LLAMA_ROWS,
)
GEMMA2 = Family(
    *("gemma2", "Gemma2ForCausalLM"),
    fixed={**_LLAMA_LIKE, "norm.offset": 1.0},
    norms=("block.norm", "block.post_norm"),
    parts=(
        *(*_SIZES, _KV_HEADS, _HEAD_DIM, _rope(), _RMS_EPS, _TIED_HEAD, _BIAS),
        _layer_types(lambda fields, layer: layer % 2 == 0),
        _activation("hidden_activation", "gelu_pytorch_tanh"),
        Part(write=lambda here: {"hidden_act": activation_field(here.get("block.mlp.activation"))}),
        Part(lambda fields: {"embed_scale": math.sqrt(fields.required("hidden_size"))}),
        field(
            *("query_pre_attn_scalar", "block.attention.scale"),
            absent=1.0,
            decode=lambda scalar: scalar**-0.5,
            encode=lambda scale: max(1, round(scale**-2)),  # Hugging Face stores an integer
        ),
        field("attn_logit_softcapping", "block.attention.softcap", default=50.0, nullable=True),
        field("final_logit_softcapping", "logit_softcap", default=30.0, nullable=True),
    ),
    neutral={"use_bidirectional_attention": False},
    whole_heads=True,
    rows=(*_ROWS, *_rows(_GEMMA2_NORMS, "scale")),
)
COHERE = Family(
    *("cohere", "CohereForCausalLM"),
    fixed=_COHERE_LIKE,
    parts=(
        *(*_COHERE_PARTS, _HEAD_DIM_OR_EQUAL),
        Part(
            _cohere_qk_norm,
            lambda here: {"use_qk_norm": here.get("block.attention.qk_norm") is not None},
        ),
    ),
    rows=_ROWS,
)
COHERE2 = Family(
    *("cohere2", "Cohere2ForCausalLM"),
    fixed=_COHERE_LIKE,
    parts=(
        *_COHERE_PARTS,
        Part(_cohere2_head_dim, lambda here: {"head_dim": here["config.head_dim"]}),
        # Without a window, Hugging Face's Cohere2 rotates no layer.
        _layer_types(
            lambda fields, layer: (layer + 1) % fields.get("sliding_window_pattern", 4) != 0,
            full="full_nope",
            more=_cohere2_more,
        ),
    ),
    neutral={"use_qk_norm": False},
    rows=_ROWS,
)
GPT2 = Family(
    *("gpt2", "GPT2LMHeadModel"),
    fixed={
        **{"norm": LayerNorm, "norm.use_bias": True, "position_embed": Positions},
        **{"block.attention": Attention, "block.attention.rope": None},
        **{"block.attention.qkv_bias": True, "block.attention.out_bias": True},
        **{"block.mlp": Mlp, "block.mlp.use_bias": True},
    },
    parts=(
        field("vocab_size", "config.vocab_size"),
        field("n_positions", "position_embed.num_positions", absent=1),
        field("n_embd", "config.embed_dim"),
        field("n_layer", "config.num_layers"),
        field("n_head", "config.num_heads"),
        Part(
            lambda fields: {"config.mlp_dim": fields.get("n_inner", 4 * fields.required("n_embd"))},
            lambda here: {"n_inner": here["config.mlp_dim"]},
        ),
        _activation(
            *("activation_function", "gelu_new"),
            # The function has two names; GPT-2 uses this one.
            lambda name: "gelu_new" if name == "gelu" else activation_field(name),
        ),
        field("layer_norm_epsilon", "norm.eps", default=1e-5),
        field(
            *("scale_attn_weights", "block.attention.scale"),
            default=True,
            decode=lambda scaled: None if scaled else 1.0,
            encode=lambda scale: scale != 1.0,
        ),
        _TIED_HEAD,
    ),
    neutral={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    rows=_GPT2_ROWS,
    # Causal masks, which old checkpoints store as tensors.
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    tied={"lm_head.weight": "transformer.wte.weight"},
    prefix="transformer.",
)

# Exports use the first family that can express the model.
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, GEMMA2, COHERE, COHERE2, GPT2, T5, MT5)


def family_named(name: str) -> Family:
    """Returns the family with this model_type.

    Raises:
      ValueError: there is no such family.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"No family {name!r}: choose from {', '.join(f.name for f in FAMILIES)}.")


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json.

    Raises:
      UnsupportedConfig: its model_type is not supported, or it needs remote code.
    """
    if config.get("auto_map"):
        raise UnsupportedConfig(
            "config.json: 'auto_map' names code that comes with the checkpoint, which is never run. If "
            "the model is of a supported model_type all the same, remove the key."
        )
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(x, str) for x in architectures):
        raise UnsupportedConfig(
            f"config.json: architectures = {architectures!r} must be a list of texts, such as "
            '["LlamaForCausalLM"].'
        )
    for family in FAMILIES:
        same = family.architecture in architectures
        if (same and model_type in (family.name, None)) or (
            model_type == family.name and not architectures
        ):
            return family
    supported = ", ".join(f"{f.name} ({f.architecture})" for f in FAMILIES)
    raise UnsupportedConfig(
        f"config.json: model_type {model_type!r} with architectures {architectures} is not "
        f"supported; supported are {supported}."
    )


def family_of_model(model: Transformer) -> Family:
    """Returns the first family that can express the model.

    Raises:
      UnsupportedModel: no family can; the message has the reason for each.
    """
    check_language_model(model)
    reasons = []
    for family in FAMILIES:
        try:
            family.config(model)
        except UnsupportedModel as error:
            reasons.append(str(error))
        else:
            return family
    raise UnsupportedModel("\n".join(reasons))
