"""Rows and parts that several families share: names of tensors, and fields of config.json.

A family of its own file, in model/hf/families/, is made of these and of what only it has.
"""

from collections.abc import Callable, Mapping
from typing import Any

from espalier.model.attention import Attention
from espalier.model.hf.config_fields import ACTIVATIONS, ConfigFields, activation_field
from espalier.model.hf.family import Part, field
from espalier.model.hf.mapping import Row
from espalier.model.hf.rope_fields import read_rope, read_ropes, write_rope, write_ropes
from espalier.model.mlp import GatedMlp
from espalier.model.norm import RMSNorm


def rows_of(
    names: Mapping[str, str],
    *leaves: str,
    layer: str = "model.layers.{layer}.",
    transpose: bool = True,
    unless: str | None = None,
) -> tuple[Row, ...]:
    """Returns the rows of modules, each with its leaves 'kernel', 'bias', 'scale'.

    Args:
      names: the Hugging Face name of each module inside a layer.
      *leaves: the names of the modules' arrays.
      layer: what the Hugging Face names begin with.
      transpose: whether kernels are [out, in] in the checkpoint.
      unless: see `Row`.
    """
    return tuple(
        Row(
            f"{ours}/{leaf}",
            f"{layer}{theirs}.{'bias' if leaf == 'bias' else 'weight'}",
            transpose=transpose and leaf == "kernel",
            unless=unless,
        )
        for ours, theirs in names.items()
        for leaf in leaves
    )


HEADS = {"query": "q", "key": "k", "value": "v", "out": "o"}
PROJECTIONS = {f"attention/{ours}": f"self_attn.{theirs}_proj" for ours, theirs in HEADS.items()}
MLP = {f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
NORMS = {
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "norm": "input_layernorm",
}
ROWS = (
    Row("token_embed/embedding", "model.embed_tokens.weight"),
    Row("lm_head/embedding", "lm_head.weight"),
    Row("final_norm/scale", "model.norm.weight"),
    *rows_of(PROJECTIONS, "kernel", "bias"),
    # A router says that a layer's MLP is a mixture, whose families have rows of their own before these.
    *rows_of(MLP, "kernel", "bias", unless="mlp/router/kernel"),
    *rows_of(NORMS, "scale"),
)
LLAMA_ROWS = (*ROWS, *rows_of({"mlp_norm": "post_attention_layernorm"}, "scale"))


def first_window(here: Mapping[str, Any]) -> int | None:
    """Returns the window of the first layer that has one.

    Models with several windows are rejected later, when descriptions are compared.
    """
    return next((window for window, _ in here["layers"] if window is not None), None)


def window_of_all(read: Callable[[ConfigFields, str], int | None]) -> Part:
    """Returns the part of a window that all layers have; `read` is a method of ConfigFields."""

    def layers(fields: ConfigFields) -> dict[str, Any]:
        window = read(fields, "sliding_window")
        pattern = ("full",) if window is None else ("sliding",)
        return {"config.layer_pattern": pattern, "config.sliding_window": window}

    return Part(layers, lambda here: {"sliding_window": first_window(here)})


def _needed_window(fields: ConfigFields, pattern: tuple[str, ...]) -> int | None:
    return fields.required("sliding_window") if "sliding" in pattern else None


def layer_types(
    slides: Callable[[ConfigFields, int], bool],
    *,
    full: str = "full",
    window: Callable[[ConfigFields, tuple[str, ...]], int | None] = _needed_window,
    more: Callable[[list[str]], dict[str, Any]] = lambda types: {},
) -> Part:
    """Returns the part of the layers' types.

    Args:
      slides: whether a layer has a window, in files without layer_types.
      full: this project's name of layers without a window.
      window: returns the window of the layers of a pattern.
      more: returns further fields, from the layers' types.
    """
    kinds = {"sliding_attention": "sliding", "full_attention": full}

    def read(fields: ConfigFields) -> dict[str, Any]:
        layers = range(fields.required("num_hidden_layers"))
        types = ["sliding_attention" if slides(fields, i) else "full_attention" for i in layers]
        pattern = fields.layer_pattern(kinds, fields.get("layer_types", types))
        return {
            "config.layer_pattern": pattern,
            "config.sliding_window": window(fields, pattern),
        }

    def write(here: Mapping[str, Any]) -> dict[str, Any]:
        types = ["full_attention" if w is None else "sliding_attention" for w, _ in here["layers"]]
        return {"sliding_window": first_window(here), "layer_types": types, **more(types)}

    return Part(read, write)


def rope(layout: str = "half") -> Part:
    """Returns the part of the rotary embedding."""
    return Part(lambda fields: {"block.attention.rope": read_rope(fields, layout)}, write_rope)


def ropes(local: tuple[str | None, float], *, base: float | None = None) -> Part:
    """Returns the part of two rotary embeddings, of layers without and with a window; see `read_ropes`."""

    def read(fields: ConfigFields) -> dict[str, Any]:
        full, sliding = read_ropes(fields, local=local, base=base)
        return {"block.attention.rope": full, "block.attention.local_rope": sliding}

    return Part(read, lambda here: write_ropes(here, local[0]))


def activation(
    key: str, default: str, *more: str, encode: Callable[[Any], Any] = activation_field
) -> Part:
    """Returns the part of the MLP's activation.

    Args:
      key: key in config.json.
      default: its value where it is absent.
      *more: names of further settings with this value.
      encode: returns the field's value from the activation's name.
    """
    names, decode = ("block.mlp.activation", *more), ACTIVATIONS.__getitem__
    return field(key, *names, default=default, decode=decode, encode=encode)


WIDTH = field("intermediate_size", "config.mlp_dim")
SIZES = (
    field("vocab_size", "config.vocab_size"),
    field("hidden_size", "config.embed_dim"),
    WIDTH,
    field("num_hidden_layers", "config.num_layers"),
    field("num_attention_heads", "config.num_heads"),
)
KV_HEADS = field("num_key_value_heads", "config.num_kv_heads")
KV_HEADS_OR_ALL = field("num_key_value_heads", "config.num_kv_heads", default=None)
HEAD_DIM = field("head_dim", "config.head_dim")
HEAD_DIM_OR_EQUAL = field("head_dim", "config.head_dim", default=None)
OWN_HEAD = field("tie_word_embeddings", "tie_embeddings", default=False)
TIED_HEAD = field("tie_word_embeddings", "tie_embeddings", default=True)
RMS_EPS = field("rms_norm_eps", "norm.eps", default=1e-6)
SILU = activation("hidden_act", "silu")
BIAS = field(
    "attention_bias", "block.attention.qkv_bias", "block.attention.out_bias", default=False
)
# Sequential blocks of attention and a gated MLP under RMSNorm.
LLAMA_LIKE = {"norm": RMSNorm, "block.attention": Attention, "block.mlp": GatedMlp}
LLAMA_PARTS = (*SIZES, rope(), SILU, OWN_HEAD)
