"""SmolLM3: a Llama in which every fourth layer has no rotation (arXiv 2501.18795)."""

from collections.abc import Mapping
from typing import Any

from espalier.model.hf import parts
from espalier.model.hf.config_fields import ConfigFields
from espalier.model.hf.family import Family, Part, field

_KINDS = {
    ("full_attention", 1): "full",
    ("full_attention", 0): "full_nope",
    ("sliding_attention", 1): "sliding",
}


def _layers(fields: ConfigFields) -> dict[str, Any]:
    count = fields.required("num_hidden_layers")
    interval = fields.get("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(count)])
    if len(rotated) != count:
        raise fields.error("no_rope_layers", f"{len(rotated)} values for {count} layers")
    slides = fields.get("use_sliding_window", False)
    window = fields.optional("sliding_window")
    usual = [
        "sliding_attention" if slides and window and not own else "full_attention"
        for own in rotated
    ]
    types = fields.get("layer_types", usual)
    if "sliding_attention" in types and not slides:
        raise fields.error("layer_types", "use_sliding_window is not true")
    if len(types) != count:
        raise fields.error("layer_types", f"{len(types)} types for {count} layers")
    names = list(zip(types, rotated, strict=True))
    if ("sliding_attention", 0) in names:
        raise fields.error(
            "no_rope_layers", "a layer with a window and no rotation is not supported"
        )
    kinds = {name: name for name in _KINDS.values()}
    pattern = fields.layer_pattern(kinds, [_KINDS.get(name, str(name[0])) for name in names])
    needed = fields.required("sliding_window") if "sliding" in pattern else None
    return {"config.layer_pattern": pattern, "config.sliding_window": needed}


def _fields(here: Mapping[str, Any]) -> dict[str, Any]:
    windows = [window for window, _ in here["layers"]]
    slides = any(windows)
    return {
        "no_rope_layers": [int(rotated) for _, rotated in here["layers"]],
        "layer_types": ["sliding_attention" if one else "full_attention" for one in windows],
        "use_sliding_window": slides,
        "sliding_window": next(filter(None, windows), None),
    }


FAMILIES = (
    Family(
        *("smollm3", "SmolLM3ForCausalLM"),
        fixed=parts.LLAMA_LIKE,
        parts=(
            *(*parts.SIZES, parts.KV_HEADS, parts.HEAD_DIM_OR_EQUAL, parts.rope(), parts.SILU),
            *(parts.TIED_HEAD, parts.RMS_EPS, parts.BIAS, Part(_layers, _fields)),
            field("mlp_bias", "block.mlp.use_bias", default=False),
        ),
        # The interval is read only without no_rope_layers.
        silent=("max_window_layers", "no_rope_layer_interval"),
        rows=parts.LLAMA_ROWS,
    ),
)
