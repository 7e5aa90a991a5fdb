"""Reads the fields of a config.json without guessing.

An absent field has the default of the Hugging Face class if that default has never changed; otherwise
absence is an error. A field that is neither read nor known to say nothing of what the model computes is an error too.
"""

import contextlib
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
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
    "xielu": "xielu",
}
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
# The allowed types of the fields that are read.
_COUNTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
    *("num_experts", "moe_intermediate_size", "decoder_sparse_step"),
    *("prefix_dense_intermediate_size", "prefix_dense_sliding_window_pattern"),
    *("n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
    *(
        "sliding_window",
        "sliding_window_pattern",
        "no_rope_layer_interval",
        "original_max_position_embeddings",
    ),
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
    **dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok"), 4096),
}
_NUMBERS = {
    *("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "logit_scale"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"),
    *("rotary_pct", "rotary_emb_base", "rope_local_base_freq"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
_FLAGS = {
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_qk_norm", "use_sliding_window"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    *("use_bidirectional_attention", "scale_decoder_outputs", "truncate"),
    *("use_parallel_residual", "norm_topk_prob", "finetuned"),
    *("is_encoder_decoder", "is_decoder", "tie_encoder_decoder", "rope_interleaved", "use_mrope"),
    *("qk_norm", "post_norm"),
    *("use_parallel_block", "use_gated_activation", "use_embedding_sharing", "is_gated_act"),
}
# Fields that say nothing of what a model computes from tokens, of any family: about files and versions, tokens with a
# meaning, training, generation, and classes of other tasks. A family adds its own, see Family.silent.
SILENT = {
    *("architectures", "model_type", "_name_or_path", "transformers_version", "_commit_hash"),
    *("torch_dtype", "dtype", "tokenizer_class", "model_max_length", "max_position_embeddings"),
    *("max_sequence_length", "transformers.js_config", "unsloth_version", "unsloth_fixed"),
    *("_attn_implementation", "_attn_implementation_autoset", "use_bfloat16", "torchscript"),
    *("tf_legacy_loss", "gradient_checkpointing", "pruned_heads", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout"),
    *("dropout_rate", "attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout"),
    *("pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("use_cache", "cache_implementation", "return_dict", "output_attentions"),
    *("output_hidden_states", "max_length", "min_length", "do_sample", "early_stopping"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"),
    *("return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("finetuning_task", "id2label", "label2id", "prefix", "problem_type", "num_labels"),
    "_num_labels",
    *("task_specific_params", "output_past"),
}
# Common fields of which one value is known.
NEUTRAL = {
    **dict.fromkeys(("is_encoder_decoder", "is_decoder", "add_cross_attention"), False),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_qk_norm", "use_sliding_window"), False),
    "tie_encoder_decoder": False,
}


_LISTS = {"no_rope_layers", "mlp_only_layers"}


def expected_type(key: str, value: Any) -> str | None:
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
    if key in ("max_window_layers", "first_k_dense_replace", "num_shared_experts"):
        return None if type(value) is int and value >= 0 else "a whole number"
    if key in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if key in ("rope_scaling", "rope_parameters"):
        return None if isinstance(value, dict) else "an object"
    if key in _LISTS:
        entries = isinstance(value, list) and all(type(item) is int for item in value)
        return None if entries else "a list of whole numbers"
    if key in ("layer_types", "mlp_layer_types"):
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return None if texts else "a list of texts"
    return None if isinstance(value, str) else "a text"


class UnsupportedConfig(ValueError):  # noqa: N818
    """A config.json that this project cannot reproduce exactly; the message has the key and a fix."""


@contextlib.contextmanager
def named(folder: str | os.PathLike) -> Iterator[None]:
    """Context manager: errors about a config.json name its folder."""
    try:
        yield
    except UnsupportedConfig as error:
        raise UnsupportedConfig(os.path.join(folder, str(error))) from None


class ConfigFields:
    """The fields of a config.json of the model family `family`."""

    def __init__(self, family: str, fields: Mapping[str, Any]):
        self.family, self._fields, self._read = family, fields, set[str]()
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
        self._read.add(key)
        if expected := expected_type(key, self._fields.get(key)):
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

    def refuse_unread(self, silent: Iterable[str], *, unknown_too: bool = True) -> None:
        """Raises UnsupportedConfig if there are fields that nothing has read, other than null ones, the `silent` and common ones.

        Without `unknown_too`, only common fields of another value than is known are refused.
        """
        known = {*self._read, *silent, *SILENT}
        self.neutral(**{key: value for key, value in NEUTRAL.items() if key not in known})
        known |= self._read
        unknown = sorted(
            x for x, value in self._fields.items() if value is not None and x not in known
        )
        if unknown and unknown_too:
            shown = ", ".join(f"{key[:80]} = {reprlib.repr(self._fields[key])}" for key in unknown)
            raise UnsupportedConfig(
                f"config.json ({self.family}): {shown}: not known here, so the model might compute something else. Remove what "
                "says nothing of the computation; a model that needs it is not supported."
            )

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

    def check_rotation(self, rope: Rope, config: TransformerConfig) -> None:
        """Raises UnsupportedConfig if a rotary embedding does not fit the heads."""
        try:
            rope.rotated_dims(config.per_head_dim)
        except ValueError as error:
            raise UnsupportedConfig(f"config.json ({self.family}): {error}") from None

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


_NAMES = {value: key for key, value in reversed(ACTIVATIONS.items())}


def activation_field(name: Any) -> str:
    """Returns the Hugging Face name of an activation; an unknown name is returned unchanged and fails later."""
    return _NAMES.get(name, str(name))
