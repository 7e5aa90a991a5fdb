"""GPT-NeoX (arXiv 2204.06745), of which Pythia is (arXiv 2304.01373).

Attention and MLP read x through norms of their own, in parallel or one after the other. LayerNorm and projections have
biases, a part of each head is rotated, and the rows of query, key and value are joined in one tensor head by head.
"""

from collections.abc import Mapping
from typing import Any

from espalier.model.attention import Attention
from espalier.model.hf import parts
from espalier.model.hf.config_fields import ConfigFields
from espalier.model.hf.family import Family, Part, field
from espalier.model.hf.mapping import Row
from espalier.model.hf.rope_fields import read_rope, rope_parameters
from espalier.model.mlp import Mlp
from espalier.model.norm import LayerNorm

_LAYER = "gpt_neox.layers.{layer}."
_PROJECTIONS = {
    "attention/out": "attention.dense",
    "mlp/up": "mlp.dense_h_to_4h",
    "mlp/down": "mlp.dense_4h_to_h",
}
_NORMS = {"norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_ROWS = (
    Row("token_embed/embedding", "gpt_neox.embed_in.weight"),
    Row("lm_head/embedding", "embed_out.weight"),
    *parts.rows_of({"final_norm": "final_layer_norm"}, "scale", "bias", layer="gpt_neox."),
    *parts.rows_of(_NORMS, "scale", "bias", layer=_LAYER),
    *parts.rows_of(_PROJECTIONS, "kernel", "bias", layer=_LAYER),
    *(
        Row(
            f"attention/{name}/{leaf}",
            f"{_LAYER}attention.query_key_value.{theirs}",
            transpose=leaf == "kernel",
            joined=i,
            by_head=True,
        )
        for i, name in enumerate(("query", "key", "value"))
        for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))
    ),
)


def _rope(fields: ConfigFields) -> dict[str, Any]:
    rope = read_rope(fields, base=("rotary_emb_base", 10_000.0), fraction=("rotary_pct", 0.25))
    return {"block.attention.rope": rope}


def _rope_fields(here: Mapping[str, Any]) -> dict[str, Any]:
    own = rope_parameters(here, partial=True)
    base, share = own["rope_theta"], own["partial_rotary_factor"]
    return {"rotary_emb_base": base, "rotary_pct": share, "rope_parameters": own}


FAMILIES = (
    Family(
        *("gpt_neox", "GPTNeoXForCausalLM"),
        fixed={
            **{"norm": LayerNorm, "norm.use_bias": True},
            **{"block.attention": Attention, "block.mlp": Mlp, "block.mlp.use_bias": True},
        },
        parts=(
            *(*parts.SIZES, Part(_rope, _rope_fields), parts.OWN_HEAD),
            parts.activation("hidden_act", "gelu"),
            field("layer_norm_eps", "norm.eps", default=1e-5),
            field(
                "attention_bias",
                *("block.attention.qkv_bias", "block.attention.out_bias"),
                default=True,
            ),
            field(
                *("use_parallel_residual", "block.layout"),
                default=True,
                decode=lambda parallel: "parallel_norms" if parallel else "sequential",
                encode=lambda layout: layout == "parallel_norms",
            ),
        ),
        whole_heads=True,
        rows=_ROWS,
        # Causal masks and frequencies, which old checkpoints store as tensors.
        ignored=(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
        tied={"embed_out.weight": "gpt_neox.embed_in.weight"},
        prefix="gpt_neox.",
    ),
)
