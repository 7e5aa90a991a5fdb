"""Gemma 2 (arXiv 2408.00118) and the language model of Gemma 3 (arXiv 2503.19786).

RMSNorm with gains 1 + w before and after attention and MLP, GeGLU, embeddings times sqrt(D), and layers with a window between
those without. Gemma 2 has soft caps on both kinds of logits, Gemma 3 norms over each head's dimensions, and another base of the
rotary embedding where there is a window.
"""

import math

from espalier.model.hf import parts
from espalier.model.hf.config_fields import activation_field
from espalier.model.hf.family import Family, Part, field
from espalier.model.norm import RMSNorm

_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_FIXED = {**parts.LLAMA_LIKE, "norm.offset": 1.0}
_PARTS = (
    *(*parts.SIZES, parts.KV_HEADS, parts.HEAD_DIM, parts.RMS_EPS, parts.TIED_HEAD, parts.BIAS),
    parts.activation("hidden_activation", "gelu_pytorch_tanh"),
    Part(write=lambda here: {"hidden_act": activation_field(here.get("block.mlp.activation"))}),
    Part(lambda fields: {"embed_scale": math.sqrt(fields.required("hidden_size"))}),
    field(
        *("query_pre_attn_scalar", "block.attention.scale"),
        absent=1.0,
        decode=lambda scalar: scalar**-0.5,
        encode=lambda scale: max(1, round(scale**-2)),  # Hugging Face stores an integer
    ),
)
_NORMED = ("block.norm", "block.post_norm")
_ROWS = (*parts.ROWS, *parts.rows_of(_NORMS, "scale"))

FAMILIES = (
    Family(
        *("gemma2", "Gemma2ForCausalLM"),
        fixed=_FIXED,
        norms=_NORMED,
        parts=(
            *(*_PARTS, parts.rope(), parts.layer_types(lambda fields, layer: layer % 2 == 0)),
            field("attn_logit_softcapping", "block.attention.softcap", default=50.0, nullable=True),
            field("final_logit_softcapping", "logit_softcap", default=30.0, nullable=True),
        ),
        silent=("hidden_act", "sliding_window_size"),
        neutral={"use_bidirectional_attention": False},
        whole_heads=True,
        rows=_ROWS,
    ),
    Family(
        *("gemma3_text", "Gemma3ForCausalLM"),
        fixed={**_FIXED, "block.attention.qk_norm": RMSNorm},
        norms=(*_NORMED, "block.attention.qk_norm"),
        parts=(
            *(*_PARTS, parts.ropes(("rope_local_base_freq", 10_000.0))),
            parts.layer_types(
                lambda fields, layer: (layer + 1) % fields.get("sliding_window_pattern", 6) != 0
            ),
            field("final_logit_softcapping", "logit_softcap", default=None, nullable=True),
        ),
        silent=(
            "hidden_act",
            "sliding_window",
            "sliding_window_pattern",
            "_sliding_window_pattern",
        ),
        # transformers does not apply a soft cap to the scores, whatever the file has.
        neutral={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        whole_heads=True,
        rows=_ROWS,
    ),
)
