"""Reads the fields of a config.json without guessing.

An absent field has the default of the Hugging Face class if that default has never changed; otherwise
absence is an error. Fields that the Hugging Face class does not read cannot change what it computes,
so their values are ignored.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from espalier.model.config import TransformerConfig
from espalier.model.rope import Rope

_FLOATS = ("float32", "bfloat16", "float16", "float64")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_exact",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "relu": "relu",
}
# The fields that each rope_type needs, with the names of Rope's settings.
_ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
# The allowed types of the fields that are read.
_COUNTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
    *("n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
    *("sliding_window", "sliding_window_pattern"),
    *("d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
}
# The largest values of fields that a loop, a list or a table follows, as the angles of the rotary embedding follow the
# heads' width; other fields are checked by the shapes of tensors.
_LARGEST = {
    **dict.fromkeys(("hidden_size", "n_embd", "head_dim", "d_model", "d_kv"), 2**20),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "sliding_window_pattern"), 10_000),
    **dict.fromkeys(("num_layers", "num_decoder_layers"), 10_000),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), 2**20),
    **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), 4096),
}
_NUMBERS = {
    *("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "logit_scale"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
}
_FLAGS = {
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_qk_norm", "use_sliding_window"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    *("use_bidirectional_attention", "scale_decoder_outputs"),
}


def _expected(key: str, value: Any) -> str | None:
    """Returns the type that a field should have, in words; None if its value has it or is null."""
    if value is None:
        return None
    if key in _COUNTS:
        largest = _LARGEST.get(key, 2**40)
        if type(value) is int and value > largest:
            return f"at most {largest:,}"
        return None if type(value) is int and value > 0 else "a whole number above 0"
    if key in _NUMBERS:
        return None if type(value) in (int, float) and 0 < value < math.inf else "a number above 0"
    if key == "max_window_layers":
        return None if type(value) is int and value >= 0 else "a whole number"
    if key in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if key in ("rope_scaling", "rope_parameters"):
        return None if isinstance(value, dict) else "an object"
    if key == "layer_types":
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return None if texts else "a list of texts"
    return None if isinstance(value, str) else "a text"


class UnsupportedConfig(ValueError):  # noqa: N818
    """A config.json that this project cannot reproduce exactly; the message has the key and a fix."""


class ConfigFields:
    """The fields of a config.json of the model family `family`."""

    def __init__(self, family: str, fields: Mapping[str, Any]):
        self.family, self._fields = family, fields
        if fields.get("quantization_config"):
            raise self.error(
                "quantization_config", "quantised weights are not read: use the full checkpoint"
            )

    def error(self, key: str, why: str) -> UnsupportedConfig:
        value = f" = {self._fields[key]!r}" if key in self._fields else " is absent"
        return UnsupportedConfig(f"config.json ({self.family}): {key}{value}: {why}.")

    def get(self, key: str, default: Any) -> Any:
        """Returns the field, or `default` if it is absent or null."""
        value = self.optional(key)
        return default if value is None else value

    def optional(self, key: str, default: Any = None) -> Any:
        """Returns the field, which may be null, or `default` if it is absent.

        Raises:
          UnsupportedConfig: the field has the wrong type, such as a string for a number.
        """
        if expected := _expected(key, self._fields.get(key)):
            raise self.error(key, f"it must be {expected}")
        value = self._fields.get(key, default)
        if key in _ACTIVATION_KEYS and value is not None and value not in ACTIVATIONS:
            raise self.error(key, f"supported are {', '.join(ACTIVATIONS)}")
        return value

    def required(self, key: str) -> Any:
        """Returns the field; UnsupportedConfig if it is absent or null."""
        if (value := self.optional(key)) is None:
            raise self.error(key, "it is needed; add it as the model was trained")
        return value

    def present(self, key: str) -> Any:
        """Returns the field, which may be null; UnsupportedConfig if it is absent."""
        if key not in self._fields:
            raise self.error(
                key, "it is needed; add it as the model was trained, null if it had none"
            )
        return self.optional(key)

    def neutral(self, **values: Any) -> None:
        """Raises UnsupportedConfig unless each field is absent or has this value."""
        for key, value in values.items():
            if self.get(key, value) != value:
                raise self.error(key, f"only {value!r} is supported")

    def rope(self, layout: str = "half") -> Rope:
        """Returns the rotary embedding, from rope_parameters or from rope_scaling and rope_theta.

        Raises:
          UnsupportedConfig: the base is missing, or the kind of rotation is not supported.
        """
        key = "rope_parameters" if self.optional("rope_parameters") else "rope_scaling"
        scaling = self.get(key, {})
        for name, value in scaling.items():
            if isinstance(value, dict):
                raise self.error(key, f"{name} in it: only one rotation of all layers is supported")
            if expected := _expected(name, value) if name in _NUMBERS else None:
                raise self.error(key, f"{name} in it must be {expected}")
        base = scaling.get("rope_theta", self.optional("rope_theta"))
        if base != self.get("rope_theta", base):
            raise self.error("rope_theta", f"{key} has {base!r}; make them equal")
        if base is None:
            raise UnsupportedConfig(
                f"config.json ({self.family}): neither rope_theta nor rope_parameters.rope_theta is "
                "there, and its default differs between versions of transformers: add the value that "
                'the model was trained with, as "rope_theta": 10000.0.'
            )
        self.neutral(partial_rotary_factor=1.0)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
            raise self.error(
                key, f"rope type {kind!r} is not supported; {', '.join(_ROPE_FIELDS)} are"
            )
        if scaling.get("partial_rotary_factor") not in (None, 1.0):
            raise self.error(key, "partial_rotary_factor must be 1")
        needed = _ROPE_FIELDS[kind]
        if missing := [name for name in needed if scaling.get(name) is None]:
            raise self.error(key, f"{', '.join(missing)} is missing in it")
        settings: dict[str, Any] = {needed[name]: float(scaling[name]) for name in needed}
        if kind != "default":
            settings["scaling"] = kind
        if kind == "llama3":
            settings["original_length"] = int(settings["original_length"])
        return Rope(base=float(base), layout=layout, **settings)

    def layer_pattern(self, kinds: Mapping[str, str], types: list[str]) -> tuple[str, ...]:
        """Returns the shortest pattern whose repetition gives the layers' types, in this project's names."""
        count = self.required("num_hidden_layers")
        if len(types) != count:
            raise self.error("layer_types", f"{len(types)} types for {count} layers")
        unknown = sorted(set(types) - set(kinds))
        if unknown:
            raise self.error("layer_types", f"{', '.join(map(repr, unknown))} are not supported")
        names = tuple(kinds[name] for name in types)
        periods = (p for p in range(1, count + 1) if count % p == 0)
        return next(names[:p] for p in periods if names[:p] * (count // p) == names)

    def sizes(self, **sizes: Any) -> TransformerConfig:
        """Returns the shared sizes, with the dtype of the fields.

        Raises:
          UnsupportedConfig: the sizes are inconsistent, or the dtype is not supported.
        """
        dtype = str(self.get("dtype", self.get("torch_dtype", "float32"))).removeprefix("torch.")
        if dtype not in _FLOATS:
            raise self.error("torch_dtype", f"supported are {', '.join(_FLOATS)}")
        try:
            return TransformerConfig(dtype=dtype, param_dtype=dtype, **sizes)
        except ValueError as error:
            raise UnsupportedConfig(f"config.json ({self.family}): {error}") from None


def rope_fields(here: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json fields of a described model's rotary embedding, in both spellings."""
    fields = {field.name: field.default for field in dataclasses.fields(Rope)}
    rope = {name: here.get(f"block.attention.rope.{name}", fields[name]) for name in fields}
    kind = "default" if rope["scaling"] == "none" else rope["scaling"]
    scaling = {"rope_type": kind} | {key: rope[name] for key, name in _ROPE_FIELDS[kind].items()}
    return {
        "rope_theta": rope["base"],
        "rope_scaling": None if kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope["base"], **scaling},
    }


_NAMES = {value: key for key, value in reversed(ACTIVATIONS.items())}


def activation_field(name: Any) -> str:
    """Returns the Hugging Face name of an activation; an unknown name is returned unchanged and fails later."""
    return _NAMES.get(name, str(name))
