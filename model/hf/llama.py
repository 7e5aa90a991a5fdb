"""Llama-like families: sequential blocks, RMSNorm, gated MLPs, half-split rotary embeddings.

Mistral adds a window to every layer, Qwen2 biases on queries, keys and values, Qwen3 norms over the
dimensions of each head, Mixtral a mixture of experts (arXiv 2401.04088).
"""

import functools
from collections.abc import Mapping
from typing import Any

from model.attention import Attention
from model.config import TransformerConfig
from model.hf.config_fields import ConfigFields, activation_field, rope_fields
from model.hf.decoder import (
    ATTENTION_ROWS,
    GATED_ROWS,
    NORM_ROWS,
    TOP_ROWS,
    size_fields,
    type_fields,
    window_field,
)
from model.hf.family import Family
from model.hf.mapping import Row
from model.mlp import GatedMlp
from model.moe.moe import MoeMlp
from model.norm import RMSNorm
from model.transformer import Block, Transformer

_KINDS = {"sliding_attention": "sliding", "full_attention": "full"}


def _read_llama(fields: ConfigFields) -> Transformer:
    fields.whole_heads()
    bias = fields.get("attention_bias", False)
    attention = {"qkv_bias": bias, "out_bias": bias}
    mlp = _gated(fields, use_bias=fields.get("mlp_bias", False))
    return _model(fields, fields.sizes(), attention, mlp)


def _read_mistral(fields: ConfigFields) -> Transformer:
    return _model(fields, _windowed(fields, fields.present("sliding_window")), {}, _gated(fields))


def _read_mixtral(fields: ConfigFields) -> Transformer:
    mlp = functools.partial(
        MoeMlp,
        num_experts=fields.required("num_local_experts"),
        top_k=fields.required("num_experts_per_tok"),
        activation=fields.activation("hidden_act", "silu"),
    )
    config = _windowed(fields, fields.optional("sliding_window"))
    return _model(fields, config, {}, mlp, eps=1e-5)


def _read_qwen2(fields: ConfigFields) -> Transformer:
    return _model(fields, _qwen_sizes(fields), {"qkv_bias": True}, _gated(fields))


def _read_qwen3(fields: ConfigFields) -> Transformer:
    bias = fields.get("attention_bias", False)
    attention = {
        "qk_norm": functools.partial(RMSNorm, eps=fields.get("rms_norm_eps", 1e-6)),
        "qkv_bias": bias,
        "out_bias": bias,
    }
    config = _qwen_sizes(fields, head_dim=fields.required("head_dim"))
    return _model(fields, config, attention, _gated(fields))


def _gated(fields: ConfigFields, **settings: Any) -> Any:
    return functools.partial(
        GatedMlp, activation=fields.activation("hidden_act", "silu"), **settings
    )


def _windowed(fields: ConfigFields, window: int | None) -> TransformerConfig:
    """Returns the sizes of a model whose layers all have this window; None for no window."""
    kv_heads = fields.required("num_key_value_heads")
    pattern = ("full",) if window is None else ("sliding",)
    return fields.sizes(num_kv_heads=kv_heads, layer_pattern=pattern, sliding_window=window)


def _qwen_sizes(fields: ConfigFields, **given: Any) -> TransformerConfig:
    count = fields.required("num_hidden_layers")
    window = fields.required("sliding_window") if fields.get("use_sliding_window", False) else None
    first = count if window is None else fields.get("max_window_layers", 28)
    types = fields.get(
        "layer_types",
        ["sliding_attention" if i >= first else "full_attention" for i in range(count)],
    )
    pattern = fields.layer_pattern(_KINDS, types)
    if window is None and "sliding" in pattern:
        raise fields.error("layer_types", "use_sliding_window is not true")
    kv_heads = fields.required("num_key_value_heads")
    return fields.sizes(
        num_kv_heads=kv_heads, layer_pattern=pattern, sliding_window=window, **given
    )


def _model(
    fields: ConfigFields,
    config: TransformerConfig,
    attention: dict[str, Any],
    mlp: Any,
    eps: float = 1e-6,
) -> Transformer:
    norm = functools.partial(RMSNorm, eps=fields.get("rms_norm_eps", eps))
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, rope=fields.rope(), **attention),
        mlp=mlp,
        norm=norm,
    )
    tied = fields.get("tie_word_embeddings", False)
    return Transformer(config=config, block=block, norm=norm, tie_embeddings=tied)


def _write(here: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **size_fields(here),
        **rope_fields(here),
        "head_dim": here["config.head_dim"],
        "rms_norm_eps": here.get("norm.eps"),
        "hidden_act": activation_field(here.get("block.mlp.activation")),
    }


def _biases(here: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": bool(here.get("block.attention.qkv_bias"))}


def _write_llama(here: Mapping[str, Any]) -> dict[str, Any]:
    return {**_write(here), **_biases(here), "mlp_bias": bool(here.get("block.mlp.use_bias"))}


def _write_mistral(here: Mapping[str, Any]) -> dict[str, Any]:
    return {**_write(here), "sliding_window": window_field(here)}


def _write_mixtral(here: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_write_mistral(here),
        "num_local_experts": here.get("block.mlp.num_experts", 1),
        "num_experts_per_tok": here.get("block.mlp.top_k", 1),
    }


def _write_qwen2(here: Mapping[str, Any]) -> dict[str, Any]:
    windowed = window_field(here) is not None
    return {**_write(here), **type_fields(here), "use_sliding_window": windowed}


def _write_qwen3(here: Mapping[str, Any]) -> dict[str, Any]:
    return {**_write_qwen2(here), **_biases(here)}


_SHARED = (*TOP_ROWS, *ATTENTION_ROWS, *NORM_ROWS)
_ROWS = (*_SHARED, *GATED_ROWS)
_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
_EXPERT_ROWS = (
    Row("mlp/router/kernel", "model.layers.{layer}.block_sparse_moe.gate.weight", transpose=True),
    Row("mlp/gate/kernel", f"{_EXPERT}w1.weight", transpose=True),
    Row("mlp/down/kernel", f"{_EXPERT}w2.weight", transpose=True),
    Row("mlp/up/kernel", f"{_EXPERT}w3.weight", transpose=True),
)

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read=_read_llama,
    write=_write_llama,
    rows=_ROWS,
)
MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    read=_read_mistral,
    write=_write_mistral,
    rows=_ROWS,
)
QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read=_read_qwen2,
    write=_write_qwen2,
    rows=_ROWS,
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read=_read_qwen3,
    write=_write_qwen3,
    rows=_ROWS,
)
MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    read=_read_mixtral,
    write=_write_mixtral,
    rows=(*_SHARED, *_EXPERT_ROWS),
)
