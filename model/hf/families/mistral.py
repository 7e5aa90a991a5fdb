"""Mistral, a Llama with a window in every layer, and Mixtral, its mixture of experts (arXiv 2401.04088)."""

from espalier.model.hf import parts
from espalier.model.hf.config_fields import ConfigFields
from espalier.model.hf.family import Family, field
from espalier.model.moe.moe import MoeMlp

_EXPERTS = {
    "mlp/router": "block_sparse_moe.gate",
    "mlp/gate": "block_sparse_moe.experts.{expert}.w1",
    "mlp/down": "block_sparse_moe.experts.{expert}.w2",
    "mlp/up": "block_sparse_moe.experts.{expert}.w3",
}
_PARTS = (*parts.LLAMA_PARTS, parts.KV_HEADS, parts.HEAD_DIM_OR_EQUAL)

FAMILIES = (
    Family(
        *("mistral", "MistralForCausalLM"),
        fixed=parts.LLAMA_LIKE,
        parts=(*_PARTS, parts.RMS_EPS, parts.window_of_all(ConfigFields.present)),
        rows=parts.LLAMA_ROWS,
    ),
    Family(
        *("mixtral", "MixtralForCausalLM"),
        fixed={**parts.LLAMA_LIKE, "block.mlp": MoeMlp},
        parts=(
            *(*_PARTS, parts.window_of_all(ConfigFields.optional)),
            field("rms_norm_eps", "norm.eps", default=1e-5),
            field("num_local_experts", "block.mlp.num_experts", absent=1),
            field("num_experts_per_tok", "block.mlp.top_k", absent=1),
        ),
        rows=(*parts.rows_of(_EXPERTS, "kernel"), *parts.LLAMA_ROWS),
    ),
)
