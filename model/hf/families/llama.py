"""Llama: sequential blocks, RMSNorm, gated MLPs and half-split rotary embeddings."""

from espalier.model.hf import parts
from espalier.model.hf.family import Family, field

FAMILIES = (
    Family(
        *("llama", "LlamaForCausalLM"),
        fixed=parts.LLAMA_LIKE,
        parts=(
            *(*parts.LLAMA_PARTS, parts.KV_HEADS_OR_ALL, parts.HEAD_DIM_OR_EQUAL),
            *(parts.RMS_EPS, parts.BIAS),
            field("mlp_bias", "block.mlp.use_bias", default=False),
        ),
        neutral={"rope_interleaved": False},
        silent=("is_llama_config",),
        whole_heads=True,
        rows=parts.LLAMA_ROWS,
    ),
)
