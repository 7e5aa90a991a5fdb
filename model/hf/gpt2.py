"""GPT-2: learned positions, LayerNorm and projections with biases, query, key and value in one tensor.

Its projections are stored as [in, out], so nothing is transposed.
"""

import functools
from collections.abc import Mapping
from typing import Any

from model.attention import Attention
from model.embed import Positions
from model.hf.config_fields import ConfigFields, activation_field
from model.hf.family import Family
from model.hf.mapping import Row
from model.mlp import Mlp
from model.norm import LayerNorm
from model.transformer import Block, Transformer


def _read(fields: ConfigFields) -> Transformer:
    fields.neutral(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width = fields.required("n_embd")
    config = fields.sizes(
        num_layers=fields.required("n_layer"),
        embed_dim=width,
        num_heads=fields.required("n_head"),
        mlp_dim=fields.get("n_inner", 4 * width),
        num_kv_heads=None,
        head_dim=None,
    )
    norm = functools.partial(LayerNorm, eps=fields.get("layer_norm_epsilon", 1e-5), use_bias=True)
    attention = functools.partial(
        Attention,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        scale=None if fields.get("scale_attn_weights", True) else 1.0,
    )
    activation = fields.activation("activation_function", "gelu_new")
    block = functools.partial(
        Block,
        attention=attention,
        mlp=functools.partial(Mlp, activation=activation, use_bias=True),
        norm=norm,
    )
    return Transformer(
        config=config,
        block=block,
        norm=norm,
        position_embed=functools.partial(Positions, num_positions=fields.required("n_positions")),
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )


def _write(here: Mapping[str, Any]) -> dict[str, Any]:
    activation = activation_field(here.get("block.mlp.activation"))
    return {
        "vocab_size": here["config.vocab_size"],
        "n_positions": here.get("position_embed.num_positions", 1),
        "n_embd": here["config.embed_dim"],
        "n_layer": here["config.num_layers"],
        "n_head": here["config.num_heads"],
        "n_inner": here["config.mlp_dim"],
        # The function has two names; GPT-2 uses this one.
        "activation_function": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
        "layer_norm_epsilon": here.get("norm.eps"),
        "scale_attn_weights": here.get("block.attention.scale") != 1.0,
        "tie_word_embeddings": here["tie_embeddings"],
    }


_LAYER = "transformer.h.{layer}."
_NAMES = {
    "norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention/out": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}

GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    read=_read,
    write=_write,
    rows=(
        Row("token_embed/embedding", "transformer.wte.weight"),
        Row("positions/embedding", "transformer.wpe.weight"),
        Row("final_norm/scale", "transformer.ln_f.weight"),
        Row("final_norm/bias", "transformer.ln_f.bias"),
        Row("lm_head/embedding", "lm_head.weight"),
        *(
            Row(f"{ours}/{leaf}", f"{_LAYER}{theirs}.{'bias' if leaf == 'bias' else 'weight'}")
            for ours, theirs in _NAMES.items()
            for leaf in ("scale" if "norm" in ours else "kernel", "bias")
        ),
        *(
            Row(f"attention/{name}/{leaf}", f"{_LAYER}attn.c_attn.{theirs}", joined=i)
            for i, name in enumerate(("query", "key", "value"))
            for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
    ),
    # Causal masks, which old checkpoints store as tensors.
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    tied={"lm_head.weight": "transformer.wte.weight"},
    prefix="transformer.",
)
