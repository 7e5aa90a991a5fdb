"""What transformers computes with where config.json lacks a field, by model_type; absent and null differ."""

from collections.abc import Mapping
from typing import Any

# The default differs between versions of transformers.
VARIES: Any = object()

_ALL = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
    "rope.rope_type": "default",
}
_LLAMA = {
    **_ALL,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope.rope_theta": 10_000.0,
}
_COHERE = {
    **_ALL,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
}
_T5 = {
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "cohere": {**_COHERE, "rope.rope_theta": VARIES},
    "cohere2": {**_COHERE, "rope.rope_theta": 10_000.0, "sliding_window": 4096},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 4096},
    "mixtral": {
        **_LLAMA,
        "rms_norm_eps": 1e-5,
        "rope.rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": {
        **_ALL,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope.rope_theta": 10_000.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": VARIES,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gpt2": {
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    "t5": {**_T5, "tie_word_embeddings": True, "feed_forward_proj": "relu"},
    "mt5": {**_T5, "tie_word_embeddings": VARIES, "feed_forward_proj": "gated-gelu"},
}


def of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the defaults of the fields of a config.json that are known; of the rotary embedding as `rope.NAME`."""
    return _FAMILIES.get(str(config.get("model_type")), _ALL)
