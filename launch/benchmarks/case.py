"""Model, data and weights of both sides of the training benchmarks."""

import json
import os
from typing import Any

import numpy as np

# The sizes in t5x_configs/models/bench_llama.gin are the same.
CASE: dict[str, Any] = {
    "num_layers": 6,
    "embed_dim": 256,
    "num_heads": 4,
    "mlp_dim": 704,
    "vocab_size": 8192,
    "length": 512,
    "batch_size": 8,
    "norm_eps": 1e-6,
    "rope_base": 10_000.0,
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
}

# Name in a block of this project's parameter tree -> name in the peer's layer.
_KERNELS = {
    ("attention", "query"): "self_attn.q_proj",
    ("attention", "key"): "self_attn.k_proj",
    ("attention", "value"): "self_attn.v_proj",
    ("attention", "out"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
_NORMS = {"norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def write(folder: str, *, steps: int) -> None:
    """Writes case.json, weights.npz (the peer's names and layouts) and tokens.npy [steps, B, T]."""
    rng = np.random.default_rng(0)
    D, F, V = CASE["embed_dim"], CASE["mlp_dim"], CASE["vocab_size"]
    weights = {"model.embed_tokens.weight": rng.normal(0, 0.02, (V, D)), "model.norm.weight": None}
    for i in range(CASE["num_layers"]):
        for (block, name), peer in _KERNELS.items():
            wide = {"down": (D, F), "gate": (F, D), "up": (F, D)}.get(name, (D, D))
            del block
            weights[f"model.layers.{i}.{peer}.weight"] = rng.normal(0, 0.02, wide)
        for peer in _NORMS.values():
            weights[f"model.layers.{i}.{peer}.weight"] = None
    filled = {
        name: (np.ones(D) if array is None else array).astype(np.float32)
        for name, array in weights.items()
    }
    # Zipf-distributed ids, so that the loss falls within a few steps.
    shape = (steps, CASE["batch_size"], CASE["length"])
    tokens = (rng.zipf(1.2, shape) * 7919 % V).astype(np.int32)
    np.savez(os.path.join(folder, "weights.npz"), **filled)
    np.save(os.path.join(folder, "tokens.npy"), tokens)
    with open(os.path.join(folder, "case.json"), "w", encoding="utf-8") as file:
        json.dump(CASE, file)


def peer_name(layer: int, name: str) -> str:
    """Returns the peer's name of a kernel or norm of a layer."""
    kernels = {ours: theirs for (_, ours), theirs in _KERNELS.items()}
    return f"model.layers.{layer}.{(kernels | _NORMS)[name]}.weight"


def params_of(
    weights: dict[str, np.ndarray], *, num_layers: int = CASE["num_layers"]
) -> dict[str, Any]:
    """Returns the peer's weights as this project's parameter tree, with kernels as [in, out]."""
    layers = {}
    for i in range(num_layers):
        peer = f"model.layers.{i}"
        block: dict[str, Any] = {"attention": {}, "mlp": {}}
        for (part, name), its in _KERNELS.items():
            kernel = np.ascontiguousarray(weights[f"{peer}.{its}.weight"].T)
            block[part][name] = {"kernel": kernel}
        for name, its in _NORMS.items():
            block[name] = {"scale": weights[f"{peer}.{its}.weight"]}
        layers[f"block_{i}"] = block
    return {
        "token_embed": {"embedding": weights["model.embed_tokens.weight"]},
        "final_norm": {"scale": weights["model.norm.weight"]},
        "layers": layers,
    }


def bindings(case: dict[str, Any]) -> list[str]:
    """Returns gin bindings of the peer's optimiser: no gradient clipping, constant learning rate."""
    return [
        "MODEL_DIR='unused'",
        "MIXTURE_OR_TASK_NAME='unused'",
        f"BATCH_SIZE={case['batch_size']}",
        f"TASK_FEATURE_LENGTHS={{'targets': {case['length']}}}",
        "recipe.Recipe.learning_rate=@schedules.constant()",
        f"schedules.constant.peak={case['learning_rate']}",
        f"optimizers.adamw.b1={case['b1']}",
        f"optimizers.adamw.b2={case['b2']}",
        f"optimizers.adamw.eps={case['adam_eps']}",
        f"optimizers.adamw.weight_decay={case['weight_decay']}",
        "optimizers.adamw.max_grad_norm=None",
    ]
