"""OLMo 2 (arXiv 2501.00656) and OLMo 3.

Norms after attention and MLP inside the residual branch and none before, and norms over all heads of queries and keys. In
OLMo 3 three of four layers have a window, and the others may have another rotary embedding.
"""

from espalier.model.hf import parts
from espalier.model.hf.family import Family, field
from espalier.model.norm import RMSNorm

_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_FIXED = {
    **parts.LLAMA_LIKE,
    **{"block.norm": None, "block.post_norm": RMSNorm},
    **{"block.attention.qk_norm": RMSNorm, "block.attention.qk_norm_of": "projection"},
}
_PARTS = (
    *(*parts.SIZES, parts.KV_HEADS_OR_ALL, parts.HEAD_DIM_OR_EQUAL, parts.SILU),
    *(parts.OWN_HEAD, parts.BIAS, field("rms_norm_eps", "norm.eps")),
)
_NORMED = ("block.post_norm", "block.attention.qk_norm")
_ROWS = (*parts.ROWS, *parts.rows_of(_NORMS, "scale"))
_THETA = 500_000.0  # of all layers, in files without rope_parameters

FAMILIES = (
    Family(
        *("olmo2", "Olmo2ForCausalLM"),
        fixed=_FIXED,
        norms=_NORMED,
        parts=(*_PARTS, parts.rope()),
        rows=_ROWS,
    ),
    Family(
        *("olmo3", "Olmo3ForCausalLM"),
        fixed=_FIXED,
        norms=_NORMED,
        parts=(
            *(*_PARTS, parts.ropes((None, _THETA), base=_THETA)),
            parts.layer_types(lambda fields, layer: (layer + 1) % 4 != 0),
        ),
        silent=("sliding_window",),
        rows=_ROWS,
    ),
)
