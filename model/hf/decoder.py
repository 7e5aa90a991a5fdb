"""Tensor names and config.json keys shared by the families of decoders with rotary embeddings."""

from collections.abc import Mapping
from typing import Any

from model.hf.mapping import Row

_LAYER = "model.layers.{layer}."

TOP_ROWS = (
    Row("token_embed/embedding", "model.embed_tokens.weight"),
    Row("lm_head/embedding", "lm_head.weight"),
    Row("final_norm/scale", "model.norm.weight"),
)

ATTENTION_ROWS = tuple(
    row
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
    for row in (
        Row(f"attention/{ours}/kernel", f"{_LAYER}self_attn.{theirs}_proj.weight", transpose=True),
        Row(f"attention/{ours}/bias", f"{_LAYER}self_attn.{theirs}_proj.bias"),
    )
) + (
    Row("attention/query_norm/scale", f"{_LAYER}self_attn.q_norm.weight"),
    Row("attention/key_norm/scale", f"{_LAYER}self_attn.k_norm.weight"),
)

GATED_ROWS = tuple(
    row
    for name in ("gate", "up", "down")
    for row in (
        Row(f"mlp/{name}/kernel", f"{_LAYER}mlp.{name}_proj.weight", transpose=True),
        Row(f"mlp/{name}/bias", f"{_LAYER}mlp.{name}_proj.bias"),
    )
)

NORM_ROWS = (
    Row("norm/scale", f"{_LAYER}input_layernorm.weight"),
    Row("mlp_norm/scale", f"{_LAYER}post_attention_layernorm.weight"),
)


def size_fields(here: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sizes of a described model under their usual config.json keys."""
    return {
        "vocab_size": here["config.vocab_size"],
        "hidden_size": here["config.embed_dim"],
        "intermediate_size": here["config.mlp_dim"],
        "num_hidden_layers": here["config.num_layers"],
        "num_attention_heads": here["config.num_heads"],
        "num_key_value_heads": here["config.num_kv_heads"],
        "tie_word_embeddings": here["tie_embeddings"],
    }


def window_field(here: Mapping[str, Any]) -> int | None:
    """Returns the window of the first layer that has one.

    Models with several windows are rejected later, when descriptions are compared.
    """
    return next((window for window, _ in here["layers"] if window is not None), None)


def type_fields(here: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json fields of a described model's window and layer types."""
    types = ["full_attention" if w is None else "sliding_attention" for w, _ in here["layers"]]
    return {"sliding_window": window_field(here), "layer_types": types}
