"""The mixtures of experts of the benchmark `moe_step`: sizes, rows, and a checkpoint for both sides.

Shapes: V vocabulary, D width, E experts.
"""

import json
import os
from typing import Any

import numpy as np

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
ROUTINGS = ("balanced", "skewed")
_SKEW = 2.5
_STRIDE = 7  # difference of consecutive token ids, which a model learns in a few steps


def write(
    folder: str, *, experts: int, routing: str, steps: int, sizes: dict[str, Any] = SIZES
) -> None:
    """Writes case.json, tokens.npy [steps, B, T] and checkpoint/, in the layout of Hugging Face's Mixtral."""
    case = {**sizes, "num_experts": experts, "mlp_dim": HIDDEN[experts], "routing": routing}
    rng = np.random.default_rng(0)
    starts = rng.integers(0, sizes["vocab_size"], (steps, sizes["batch_size"], 1))
    tokens = (starts + _STRIDE * np.arange(sizes["length"])) % sizes["vocab_size"]
    np.save(os.path.join(folder, "tokens.npy"), tokens.astype(np.int32))
    with open(os.path.join(folder, "case.json"), "w", encoding="utf-8") as file:
        json.dump(case, file)
    _write_checkpoint(os.path.join(folder, "checkpoint"), case, rng)


def _write_checkpoint(folder: str, case: dict[str, Any], rng: np.random.Generator) -> None:
    from model.hf.families import family_of_config
    from model.hf.files.safetensors_files import SafetensorsWriter

    config = _peer_config(case)
    family = family_of_config(config)
    tensors = {
        name: (np.dtype(np.float32), shape)
        for name, shape in sorted(family.shapes(family.model(config)).items())
    }
    common_D = rng.choice([-1.0, 1.0], case["embed_dim"])
    os.mkdir(folder)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    with SafetensorsWriter(folder, tensors, shard_bytes=2**32) as writer:
        for name, (dtype, shape) in tensors.items():
            values = _values(name, shape, common_D, case["routing"], rng)
            writer.write(name, values.astype(dtype), 0)


def _values(
    name: str, shape: tuple[int, ...], common_D: np.ndarray, routing: str, rng: np.random.Generator
) -> np.ndarray:
    """Returns weights of one tensor; the router distinguishes tokens from the first step on.

    All embeddings contain a common vector. The rows of a balanced router are orthogonal to it. The rows of a skewed
    router have different components along it, so that the share of the n-th expert falls as a power of n.
    """
    if len(shape) == 1:
        return np.ones(shape)
    if name.endswith("embed_tokens.weight"):
        return rng.normal(0, 1, shape) + common_D
    if not name.endswith("block_sparse_moe.gate.weight"):
        return rng.normal(0, 0.02, shape)
    rows_ED = rng.normal(0, shape[1] ** -0.5, shape)
    rows_ED -= np.outer(rows_ED @ common_D, common_D) / shape[1]
    if routing == "skewed":
        bias_E = -_SKEW * np.log1p(np.arange(shape[0]))
        rows_ED += np.outer(bias_E, common_D) / shape[1]
    return rows_ED


def _peer_config(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": case["vocab_size"],
        "hidden_size": case["embed_dim"],
        "intermediate_size": case["mlp_dim"],
        "num_hidden_layers": case["num_layers"],
        "num_attention_heads": case["num_heads"],
        "num_key_value_heads": case["num_heads"],
        "num_local_experts": case["num_experts"],
        "num_experts_per_tok": case["top_k"],
        "hidden_act": "silu",
        "max_position_embeddings": case["length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def bindings(case: dict[str, Any]) -> list[str]:
    """Returns gin bindings that change the model of `models/mixtral_8x7b.gin` to that of a case."""
    config = {name: case[name] for name in ("num_layers", "embed_dim", "num_heads", "vocab_size")}
    config |= {"num_kv_heads": case["num_heads"], "mlp_dim": case["mlp_dim"], "scan_layers": False}
    return [
        *(f"config.TransformerConfig.{name}={value}" for name, value in config.items()),
        "config.TransformerConfig.remat='none'",
        "DTYPE='float32'",
        f"moe.MoeMlp.num_experts={case['num_experts']}",
        f"moe.MoeMlp.top_k={case['top_k']}",
    ]
