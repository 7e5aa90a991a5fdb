"""Cohere (Command-R, Aya 23, Aya Expanse), Cohere2 (Command R7B), and its mixture Cohere2-MoE (Command A+).

Parallel blocks under one LayerNorm without bias, SwiGLU, interleaved rotation, tied embeddings, scaled logits. Cohere may
norm queries and keys, with gains per head and dimension. In Cohere2 the layers without a window have no positional encoding
(arXiv 2504.00698).

The mixture may begin with dense layers of another width and pattern, whose full layers are rotated if the pattern is 1. Its
router weighs the chosen experts by a softmax of their logits, or by sigmoids. Shared experts are one MLP, which is added to the
others or averaged with them. Published files have a tensor for each expert; transformers stacks them.
"""

from collections.abc import Mapping
from typing import Any

from espalier.model.hf import parts
from espalier.model.hf.config_fields import ConfigFields
from espalier.model.hf.family import Family, Part, field
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.norm import LayerNorm, RMSNorm


def _qk_norm(fields: ConfigFields) -> dict[str, Any]:
    if not fields.get("use_qk_norm", False):
        return {}
    name, eps = "block.attention.qk_norm", fields.get("layer_norm_eps", 1e-5)
    return {name: LayerNorm, f"{name}.eps": eps, f"{name}.scale_dims": 2}


def _equal_head_dim(fields: ConfigFields) -> dict[str, Any]:
    heads = fields.required("num_attention_heads")
    fields.neutral(head_dim=fields.required("hidden_size") // heads)
    return {}


def _more(types: list[str]) -> dict[str, Any]:
    fourth = [(layer + 1) % 4 == 0 for layer in range(len(types))]
    # The key of the first releases with Cohere2.
    full = [kind == "full_attention" for kind in types]
    return {"sliding_window_pattern": 4} if full == fourth else {}


COHERE_LIKE = {**parts.LLAMA_LIKE, "norm": LayerNorm, "block.layout": "parallel"}
_PARTS = (
    *(parts.KV_HEADS_OR_ALL, parts.rope("interleaved"), parts.TIED_HEAD, parts.BIAS),
    field("logit_scale", "logit_scale"),
)
COHERE_PARTS = (
    *_PARTS,
    *parts.SIZES,
    parts.SILU,
    field("layer_norm_eps", "norm.eps", default=1e-5),
)

_DENSE = "dense"  # the name of the prefix's MLPs
_ROPE_PATTERN = "prefix_dense_sliding_window_pattern"


def _moe_layers(fields: ConfigFields) -> dict[str, Any]:
    """Reads the layers' types, or in older files the number of dense layers and the patterns of windows."""
    count = fields.required("num_hidden_layers")
    prefix, pattern = fields.get(_ROPE_PATTERN, 1), fields.get("sliding_window_pattern", 4)
    dense = min(fields.get("first_k_dense_replace", 0), count)
    ends = [(i + 1) % prefix for i in range(dense)]
    ends += [(i + 1) % pattern for i in range(count - dense)]
    types = ["sliding_attention" if end else "full_attention" for end in ends]
    types = fields.get("layer_types", types)
    mlps = fields.get("mlp_layer_types", ["dense"] * dense + ["sparse"] * (count - dense))
    if len(mlps) != count:
        raise fields.error("mlp_layer_types", f"{len(mlps)} types for {count} layers")
    if unknown := sorted({*mlps} - {"dense", "sparse"}):
        raise fields.error("mlp_layer_types", f"{', '.join(map(repr, unknown))} are not supported")
    kinds = {"sliding_attention": "sliding", "full_attention": "full_nope"}
    fields.layer_pattern(kinds, types)  # refuses unknown types
    rotated = {"full_nope": "full"} if prefix == 1 else {}
    names = [
        f"{rotated.get(kinds[kind], kinds[kind])}:{_DENSE}" if mlp == "dense" else kinds[kind]
        for kind, mlp in zip(types, mlps, strict=True)
    ]
    return {
        "config.layer_pattern": fields.layer_pattern({name: name for name in names}, names),
        "config.sliding_window": fields.required("sliding_window")
        if "sliding_attention" in types
        else None,
    }


def _write_moe_layers(here: Mapping[str, Any]) -> dict[str, Any]:
    mlps = here.get("mlps", ("",) * len(here["layers"]))
    rotated = [
        rope for (window, rope), mlp in zip(here["layers"], mlps, strict=True) if mlp and not window
    ]
    return {
        "sliding_window": parts.first_window(here),
        "layer_types": [
            "full_attention" if w is None else "sliding_attention" for w, _ in here["layers"]
        ],
        "mlp_layer_types": ["dense" if mlp else "sparse" for mlp in mlps],
        # With types of layers, its only effect is on rotation.
        _ROPE_PATTERN: 1 if all(rotated) else 4,
    }


def _router(fields: ConfigFields) -> dict[str, Any]:
    score = fields.get("expert_selection_fn", "softmax")
    if score not in ("softmax", "sigmoid"):
        raise fields.error("expert_selection_fn", "supported are softmax and sigmoid")
    normed = fields.get("norm_topk_prob", True)  # a softmax over the chosen experts has the sum 1
    return {"block.mlp.score": score, "block.mlp.renormalise": normed or score == "softmax"}


def _write_router(here: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "expert_selection_fn": here.get("block.mlp.score", "softmax"),
        "norm_topk_prob": here.get("block.mlp.renormalise", True),
    }


def _shared(fields: ConfigFields) -> dict[str, Any]:
    count = fields.get("num_shared_experts", 0)
    combine = fields.get("shared_expert_combination_strategy", "average")
    if not count:
        return {}
    if combine not in ("average", "sum"):
        raise fields.error("shared_expert_combination_strategy", "supported are average and sum")
    return {
        "block.mlp.shared": GatedMlp,
        "block.mlp.shared_experts": count,
        "block.mlp.combine_shared": combine,
    }


def _write_shared(here: Mapping[str, Any]) -> dict[str, Any]:
    if here.get("block.mlp.shared") is None:
        return {"num_shared_experts": 0}
    return {
        "num_shared_experts": here["block.mlp.shared_experts"],
        "shared_expert_combination_strategy": here["block.mlp.combine_shared"],
    }


def _moe_widths(fields: ConfigFields) -> dict[str, Any]:
    width = fields.required("intermediate_size")
    dense = fields.get("prefix_dense_intermediate_size", width)
    return {"block.mlp.expert_dim": width, "config.mlp_dim": dense}


def _write_moe_widths(here: Mapping[str, Any]) -> dict[str, Any]:
    dense = here["config.mlp_dim"]
    width = here.get("block.mlp.expert_dim", dense)
    return {"intermediate_size": width, "prefix_dense_intermediate_size": dense}


def _moe_norm(fields: ConfigFields) -> dict[str, Any]:
    eps = fields.get("layer_norm_eps", 1e-5)
    if (rms_eps := fields.optional("rms_norm_eps")) is None:
        return {"norm": LayerNorm, "norm.eps": eps}
    return {"norm": RMSNorm, "norm.eps": rms_eps}


def _write_moe_norm(here: Mapping[str, Any]) -> dict[str, Any]:
    if here["norm"] is RMSNorm:
        return {"rms_norm_eps": here["norm.eps"]}
    return {"rms_norm_eps": None, "layer_norm_eps": here["norm.eps"]}


_EXPERTS = {
    **{"mlp/router": "mlp.gate"},
    **{f"mlp/{name}": f"mlp.experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down")},
    **{f"mlp/shared/{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
}
# Read only with other settings.
_MOE_SILENT = (
    *("layer_norm_eps", "sliding_window_pattern", "first_k_dense_replace", _ROPE_PATTERN),
    *("norm_topk_prob", "shared_expert_combination_strategy"),
)

FAMILIES = (
    Family(
        *("cohere", "CohereForCausalLM"),
        fixed=COHERE_LIKE,
        parts=(
            *(*COHERE_PARTS, parts.HEAD_DIM_OR_EQUAL),
            Part(
                _qk_norm,
                lambda here: {"use_qk_norm": here.get("block.attention.qk_norm") is not None},
            ),
        ),
        rows=parts.ROWS,
    ),
    Family(
        *("cohere2", "Cohere2ForCausalLM"),
        fixed=COHERE_LIKE,
        parts=(
            *COHERE_PARTS,
            Part(_equal_head_dim, lambda here: {"head_dim": here["config.head_dim"]}),
            # Without a window, Hugging Face's Cohere2 rotates no layer.
            parts.layer_types(
                lambda fields, layer: (layer + 1) % fields.get("sliding_window_pattern", 4) != 0,
                full="full_nope",
                more=_more,
            ),
        ),
        neutral={
            "use_qk_norm": False,
            # Of the first releases, which transformers does not read.
            **{"rotary_pct": 1.0, "position_embedding_type": "rope_gptj"},
            **{"use_parallel_block": True, "use_gated_activation": True},
            **{"use_embedding_sharing": True, "order_of_interleaved_layers": "local_attn_first"},
        },
        silent=("sliding_window", "layer_switch", "use_parallel_embedding"),
        rows=parts.ROWS,
    ),
    Family(
        *("cohere2_moe", "Cohere2MoeForCausalLM"),
        fixed={
            **COHERE_LIKE,
            "block.mlp": MoeMlp,
            f"block.mlp:{_DENSE}": GatedMlp,
        },
        parts=(
            *(*_PARTS, *(part for part in parts.SIZES if part is not parts.WIDTH), parts.HEAD_DIM),
            *(Part(_moe_norm, _write_moe_norm), Part(_moe_widths, _write_moe_widths)),
            *(Part(_moe_layers, _write_moe_layers), Part(_router, _write_router)),
            Part(_shared, _write_shared),
            field("num_experts", "block.mlp.num_experts", default=8, absent=1),
            field("num_experts_per_tok", "block.mlp.top_k", default=2, absent=1),
            parts.activation(
                "hidden_act",
                "silu",
                *(f"block.mlp{x}.activation" for x in (".shared", f":{_DENSE}")),
            ),
        ),
        neutral={"use_qk_norm": False},
        silent=_MOE_SILENT,
        rows=(*parts.rows_of(_EXPERTS, "kernel"), *parts.ROWS),
    ),
)
