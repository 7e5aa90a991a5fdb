"""Cohere (Command-R, Aya 23, Aya Expanse) and Cohere2 (Command R7B).

Parallel blocks under one LayerNorm without bias, SwiGLU, interleaved rotation, tied embeddings, scaled
logits. Cohere may norm queries and keys, with gains per head and dimension. In Cohere2 the layers
without a window have no positional encoding (arXiv 2504.00698).
"""

import functools
from collections.abc import Mapping
from typing import Any

from model.attention import Attention
from model.config import TransformerConfig
from model.hf.config_fields import ConfigFields, activation_field, rope_fields
from model.hf.decoder import ATTENTION_ROWS, GATED_ROWS, TOP_ROWS, size_fields, type_fields
from model.hf.family import Family
from model.hf.mapping import Row
from model.mlp import GatedMlp
from model.norm import LayerNorm
from model.transformer import Block, Transformer

_KINDS = {"sliding_attention": "sliding", "full_attention": "full_nope"}


def _read(fields: ConfigFields) -> Transformer:
    qk_norm = None
    if fields.get("use_qk_norm", False):
        qk_norm = functools.partial(LayerNorm, eps=fields.get("layer_norm_eps", 1e-5), scale_dims=2)
    return _model(fields, fields.sizes(), qk_norm)


def _read2(fields: ConfigFields) -> Transformer:
    count = fields.required("num_hidden_layers")
    every = fields.get("sliding_window_pattern", 4)
    types = fields.get(
        "layer_types",
        ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)],
    )
    pattern = fields.layer_pattern(_KINDS, types)
    # Without a window, Hugging Face's Cohere2 rotates no layer.
    window = fields.required("sliding_window") if "sliding" in pattern else None
    fields.neutral(
        head_dim=fields.required("hidden_size") // fields.required("num_attention_heads"),
        use_qk_norm=False,
    )
    config = fields.sizes(head_dim=None, layer_pattern=pattern, sliding_window=window)
    return _model(fields, config, None)


def _model(fields: ConfigFields, config: TransformerConfig, qk_norm: Any) -> Transformer:
    norm = functools.partial(LayerNorm, eps=fields.get("layer_norm_eps", 1e-5))
    bias = fields.get("attention_bias", False)
    block = functools.partial(
        Block,
        layout="parallel",
        attention=functools.partial(
            Attention,
            rope=fields.rope("interleaved"),
            qk_norm=qk_norm,
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=functools.partial(GatedMlp, activation=fields.activation("hidden_act", "silu")),
        norm=norm,
    )
    return Transformer(
        config=config,
        block=block,
        norm=norm,
        tie_embeddings=fields.get("tie_word_embeddings", True),
        logit_scale=fields.required("logit_scale"),
    )


def _write(here: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_shared(here),
        "use_qk_norm": here.get("block.attention.qk_norm") is not None,
    }


def _write2(here: Mapping[str, Any]) -> dict[str, Any]:
    windows = type_fields(here)
    every = 4
    if windows["layer_types"] == [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(here["config.num_layers"])
    ]:
        windows["sliding_window_pattern"] = every  # key in the first releases with Cohere2
    return {**_shared(here), **windows}


def _shared(here: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **size_fields(here),
        **rope_fields(here),
        "head_dim": here["config.head_dim"],
        "layer_norm_eps": here.get("norm.eps"),
        "hidden_act": activation_field(here.get("block.mlp.activation")),
        "attention_bias": bool(here.get("block.attention.qkv_bias")),
        "logit_scale": here["logit_scale"],
    }


_ROWS = (
    *TOP_ROWS,
    *ATTENTION_ROWS,
    *GATED_ROWS,
    Row("norm/scale", "model.layers.{layer}.input_layernorm.weight"),
)

COHERE = Family(
    name="cohere", architectures=("CohereForCausalLM",), read=_read, write=_write, rows=_ROWS
)
COHERE2 = Family(
    name="cohere2", architectures=("Cohere2ForCausalLM",), read=_read2, write=_write2, rows=_ROWS
)
