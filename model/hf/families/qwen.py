"""Qwen2, a Llama with biases on queries, keys and values, Qwen3, with norms over each head's dimensions, and its mixture.

Qwen3-MoE (arXiv 2505.09388) chooses experts by a softmax over all of them. Published files have a tensor for each expert.
"""

from collections.abc import Mapping
from typing import Any

from espalier.model.hf import parts
from espalier.model.hf.config_fields import ACTIVATIONS, ConfigFields
from espalier.model.hf.family import Family, Part, field
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.norm import RMSNorm


def _window(fields: ConfigFields, pattern: tuple[str, ...]) -> int | None:
    if fields.get("use_sliding_window", False):
        return fields.required("sliding_window")
    if "sliding" in pattern:
        raise fields.error("layer_types", "use_sliding_window is not true")
    return None


_LAYERS = parts.layer_types(
    lambda fields, layer: (
        fields.get("use_sliding_window", False) and layer >= fields.get("max_window_layers", 28)
    ),
    window=_window,
    more=lambda types: {"use_sliding_window": "sliding_attention" in types},
)
# The window and its first layer say nothing where use_sliding_window is not true.
_SILENT = ("sliding_window", "max_window_layers")
_PARTS = (*parts.LLAMA_PARTS, parts.KV_HEADS, parts.RMS_EPS)

_QWEN3 = {**parts.LLAMA_LIKE, "block.attention.qk_norm": RMSNorm}
_QWEN3_NORMS = ("block.norm", "block.attention.qk_norm")
_EXPERTS = {"mlp/router": "mlp.gate"} | {
    f"mlp/{name}": f"mlp.experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down")
}


def _layers(fields: ConfigFields) -> dict[str, Any]:
    """Reads the window of all layers, and which layers have experts; the others have a dense MLP."""
    window = fields.required("sliding_window") if fields.get("use_sliding_window", False) else None
    kind = "full" if window is None else "sliding"
    step, dense = fields.get("decoder_sparse_step", 1), set(fields.get("mlp_only_layers", []))
    layers = range(fields.required("num_hidden_layers"))
    types = [kind + ("" if (i + 1) % step == 0 and i not in dense else ":dense") for i in layers]
    if kind not in types:
        raise fields.error("mlp_only_layers", "no layer has experts, so it is a model of qwen3")
    settings = {
        "config.layer_pattern": fields.layer_pattern({name: name for name in types}, types),
        "config.sliding_window": window,
    }
    if len(set(types)) > 1:
        activation = ACTIVATIONS[fields.get("hidden_act", "silu")]
        settings |= {"block.mlp:dense": GatedMlp, "block.mlp:dense.activation": activation}
    return settings


def _write_layers(here: Mapping[str, Any]) -> dict[str, Any]:
    window = parts.first_window(here)
    mlps = here.get("mlps", ("",) * len(here["layers"]))
    dense = [i for i, name in enumerate(mlps) if name]
    every = {
        step: [i for i in range(len(mlps)) if (i + 1) % step] for step in range(1, len(mlps) + 1)
    }
    step = next((step for step, layers in every.items() if layers == dense), 1)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "decoder_sparse_step": step,
        "mlp_only_layers": dense if step == 1 else [],
    }


def _num_experts(fields: ConfigFields) -> dict[str, Any]:
    """Reads the field under its two names, of which newer versions of transformers write the second."""
    number = fields.get("num_experts", fields.optional("num_local_experts"))
    if number is None:
        raise fields.error("num_experts", "it is needed; add it as the model was trained")
    if number != fields.get("num_local_experts", number):
        raise fields.error("num_local_experts", f"num_experts is {number}; make them equal")
    return {"block.mlp.num_experts": number}


def _write_num_experts(here: Mapping[str, Any]) -> dict[str, Any]:
    number = here.get("block.mlp.num_experts", 1)
    return {"num_experts": number, "num_local_experts": number}


FAMILIES = (
    Family(
        *("qwen2", "Qwen2ForCausalLM"),
        fixed={**parts.LLAMA_LIKE, "block.attention.qkv_bias": True},
        parts=(*_PARTS, _LAYERS, parts.HEAD_DIM_OR_EQUAL),
        neutral={"use_mrope": False},
        silent=_SILENT,
        rows=parts.LLAMA_ROWS,
    ),
    Family(
        *("qwen3", "Qwen3ForCausalLM"),
        fixed=_QWEN3,
        norms=_QWEN3_NORMS,
        parts=(*_PARTS, _LAYERS, parts.HEAD_DIM, parts.BIAS),
        neutral={"use_mrope": False},
        silent=_SILENT,
        rows=parts.LLAMA_ROWS,
    ),
    Family(
        *("qwen3_moe", "Qwen3MoeForCausalLM"),
        fixed={**_QWEN3, "block.mlp": MoeMlp},
        norms=_QWEN3_NORMS,
        parts=(
            *(*_PARTS, parts.HEAD_DIM_OR_EQUAL, parts.BIAS, Part(_layers, _write_layers)),
            Part(_num_experts, _write_num_experts),
            field("num_experts_per_tok", "block.mlp.top_k", absent=1),
            field("moe_intermediate_size", "block.mlp.expert_dim", absent=1),
            field("norm_topk_prob", "block.mlp.renormalise", default=False, absent=False),
        ),
        silent=_SILENT,
        rows=(*parts.rows_of(_EXPERTS, "kernel"), *parts.LLAMA_ROWS),
    ),
)
