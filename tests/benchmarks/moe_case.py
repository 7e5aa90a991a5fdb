"""The mixtures of experts of the benchmark `moe_step`: sizes, rows, and a checkpoint for both sides.

Shapes: V vocabulary, D width, E experts.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from tests.benchmarks import case

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "embed_dim": 256,
    "num_heads": 4,
    "vocab_size": 2048,
    "top_k": 2,
    "length": 512,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
}
HIDDEN = {8: 512, 64: 128}  # number of experts -> hidden width of one expert
# By name in the benchmark. The last has Qwen3-30B-A3B's proportions: of 128 experts of 3/8 of the width a token uses 8, and one
# head of keys and values has eight of queries.
MIXTURES: dict[str, dict[str, Any]] = {
    **{f"{n}_experts": {"num_experts": n, "mlp_dim": width} for n, width in HIDDEN.items()},
    "qwen3_moe": {
        **{"num_experts": 128, "mlp_dim": 96, "top_k": 8},
        **{"num_heads": 8, "num_kv_heads": 1, "head_dim": 64},
    },
}
ROUTINGS = ("balanced", "skewed")
_SKEW = 2.5
_STRIDE = 7  # difference of consecutive token ids, which a model learns in a few steps


def write(
    folder: str, *, name: str, routing: str, steps: int, sizes: dict[str, Any] = SIZES
) -> None:
    """Writes case.json, tokens.npy [steps, B, T] and model/, in the layout of Hugging Face's Mixtral or Qwen3-MoE."""
    mixture = {**sizes, **MIXTURES[name], "routing": routing}
    pathlib.Path(folder, "case.json").write_text(json.dumps(mixture))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, sizes["vocab_size"], (steps, sizes["batch_size"], 1))
    tokens = (starts + _STRIDE * np.arange(sizes["length"])) % sizes["vocab_size"]
    np.save(os.path.join(folder, "tokens.npy"), tokens.astype(np.int32))
    own: dict[str, Any] = {
        **{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        "rms_norm_eps": 1e-5,
    }
    if "head_dim" in mixture:
        own = {
            **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
            **{"norm_topk_prob": True, "moe_intermediate_size": mixture["mlp_dim"]},
            **{"head_dim": mixture["head_dim"], "num_key_value_heads": mixture["num_kv_heads"]},
        }
    config = case.hf_config(
        mixture,
        num_local_experts=mixture["num_experts"],
        num_experts_per_tok=mixture["top_k"],
        rope_theta=1e6,
        sliding_window=None,
        tie_word_embeddings=False,
        **own,
    )
    common_D = rng.choice([-1.0, 1.0], sizes["embed_dim"])
    usual = case.normal(rng, 0.02)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns weights of one tensor; the router distinguishes tokens from the first step on.

        All embeddings contain a common vector. The rows of a balanced router are orthogonal to it. The rows of a skewed
        router have different components along it, so that the share of the n-th expert falls as a power of n.
        """
        if name.endswith("embed_tokens.weight"):
            return rng.normal(0, 1, shape) + common_D
        if not name.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight")):
            return usual(name, shape)
        rows_ED = rng.normal(0, shape[1] ** -0.5, shape)
        rows_ED -= np.outer(rows_ED @ common_D, common_D) / shape[1]
        if routing == "skewed":
            bias_E = -_SKEW * np.log1p(np.arange(shape[0]))
            rows_ED += np.outer(bias_E, common_D) / shape[1]
        return rows_ED

    case.write_model(os.path.join(folder, "model"), config, values)
