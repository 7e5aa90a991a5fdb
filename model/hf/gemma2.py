"""Gemma 2 (arXiv 2408.00118): RMSNorm with gains 1 + w before and after attention and MLP, GeGLU, soft
caps on both kinds of logits, embeddings times sqrt(D), and every other layer with a window."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from model.attention import Attention
from model.hf.config_fields import ConfigFields, activation_field, rope_fields
from model.hf.decoder import ATTENTION_ROWS, GATED_ROWS, TOP_ROWS, size_fields, type_fields
from model.hf.family import Family
from model.hf.mapping import Row
from model.mlp import GatedMlp
from model.norm import RMSNorm
from model.transformer import Block, Transformer

_KINDS = {"sliding_attention": "sliding", "full_attention": "full"}


def _read(fields: ConfigFields) -> Transformer:
    fields.neutral(use_bidirectional_attention=False)
    fields.whole_heads()
    count = fields.required("num_hidden_layers")
    types = fields.get(
        "layer_types",
        ["full_attention" if i % 2 else "sliding_attention" for i in range(count)],
    )
    pattern = fields.layer_pattern(_KINDS, types)
    config = fields.sizes(
        num_kv_heads=fields.required("num_key_value_heads"),
        head_dim=fields.required("head_dim"),
        layer_pattern=pattern,
        sliding_window=fields.required("sliding_window") if "sliding" in pattern else None,
    )
    norm = functools.partial(RMSNorm, eps=fields.get("rms_norm_eps", 1e-6), offset=1.0)
    bias = fields.get("attention_bias", False)
    attention = functools.partial(
        Attention,
        rope=fields.rope(),
        scale=fields.required("query_pre_attn_scalar") ** -0.5,
        softcap=fields.optional("attn_logit_softcapping", 50.0),
        qkv_bias=bias,
        out_bias=bias,
    )
    activation = fields.activation("hidden_activation", "gelu_pytorch_tanh")
    block = functools.partial(
        Block,
        attention=attention,
        mlp=functools.partial(GatedMlp, activation=activation),
        norm=norm,
        post_norm=norm,
    )
    return Transformer(
        config=config,
        block=block,
        norm=norm,
        tie_embeddings=fields.get("tie_word_embeddings", True),
        embed_scale=math.sqrt(config.embed_dim),
        logit_softcap=fields.optional("final_logit_softcapping", 30.0),
    )


def _write(here: Mapping[str, Any]) -> dict[str, Any]:
    scale = here.get("block.attention.scale", 1.0)
    activation = activation_field(here.get("block.mlp.activation"))
    return {
        **size_fields(here),
        **rope_fields(here),
        **type_fields(here),
        "head_dim": here["config.head_dim"],
        "rms_norm_eps": here.get("norm.eps"),
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": bool(here.get("block.attention.qkv_bias")),
        "query_pre_attn_scalar": max(1, round(scale**-2)),  # Hugging Face stores it as an integer
        "attn_logit_softcapping": here.get("block.attention.softcap"),
        "final_logit_softcapping": here["logit_softcap"],
    }


_LAYER = "model.layers.{layer}."

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    read=_read,
    write=_write,
    rows=(
        *TOP_ROWS,
        *ATTENTION_ROWS,
        *GATED_ROWS,
        Row("norm/scale", f"{_LAYER}input_layernorm.weight"),
        Row("attention_post_norm/scale", f"{_LAYER}post_attention_layernorm.weight"),
        Row("mlp_norm/scale", f"{_LAYER}pre_feedforward_layernorm.weight"),
        Row("mlp_post_norm/scale", f"{_LAYER}post_feedforward_layernorm.weight"),
    ),
)
