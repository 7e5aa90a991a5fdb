"""The workloads of the benchmark `accelerator`, as JSON that both sides read; no side imports the other's library."""

from collections.abc import Mapping
from typing import Any

# Llama 3.2 1B, Llama 3.1 8B (arXiv 2407.21783) and Mixtral 8x7B (arXiv 2401.04088).
LLAMA_1B: dict[str, Any] = {
    "num_layers": 16,
    "embed_dim": 2048,
    "num_heads": 32,
    "num_kv_heads": 8,
    "mlp_dim": 8192,
    "vocab_size": 128_256,
    "tied": True,
}
LLAMA_8B: dict[str, Any] = {
    "num_layers": 32,
    "embed_dim": 4096,
    "num_heads": 32,
    "num_kv_heads": 8,
    "mlp_dim": 14_336,
    "vocab_size": 128_256,
    "tied": False,
}
MIXTRAL: dict[str, Any] = {**LLAMA_8B, "vocab_size": 32_000, "num_experts": 8, "top_k": 2}
_MIXTRAL_SLICES: dict[str, Any] = {"rows": 32_768, "embed_dim": 4096, "mlp_dim": 14_336}

WORKLOADS: dict[str, dict[str, Any]] = {
    "train_1b": {"kind": "train", "model": LLAMA_1B, "batch_size": 4, "length": 4096},
    "train_8b": {"kind": "train", "model": LLAMA_8B, "batch_size": 2, "length": 4096},
    "moe": {"kind": "train", "model": MIXTRAL, "batch_size": 4, "length": 4096},
    "dpo": {"kind": "dpo", "model": LLAMA_1B, "batch_size": 4, "length": 4096},
    "decode": {
        "kind": "decode",
        "model": LLAMA_1B,
        "batch_size": 8,
        "length": 16_384,
        "new": 129,
        "snapkv": {"capacity": 2048, "window": 64, "kernel": 5, "pooling": "average"},
    },
    "attention": {
        "kind": "attention",
        "batch_size": 2,
        "length": 16_384,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "window": 1024,
        "documents": 8,
    },
    "experts_8": {"kind": "experts", "num_experts": 8, **_MIXTRAL_SLICES},
    "experts_64": {"kind": "experts", "num_experts": 64, **_MIXTRAL_SLICES, "mlp_dim": 2048},
}

_TINY: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 48,
    "vocab_size": 128,
    "length": 64,
    "batch_size": 2,
    "new": 5,
    "snapkv": {"capacity": 16, "window": 4, "kernel": 5, "pooling": "average"},
    "head_dim": 8,
    "window": 16,
    "rows": 128,
}
# Every state needs float32 parameters, their gradients and two moments of AdamW.
STATE_BYTES = 16
# The rest of the memory is for activations, logits and the compiler's temporaries.
STATE_SHARE = 0.7
WARM_UP = 3


def workloads(*, tiny: bool) -> dict[str, dict[str, Any]]:
    """Returns the workloads by name; with `tiny`, of sizes that a CPU computes in seconds."""
    return {name: _shrunk(work) if tiny else work for name, work in WORKLOADS.items()}


def _shrunk(work: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _shrunk(value) if key == "model" else _TINY.get(key, value)
        for key, value in work.items()
    }


def with_layers(work: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Returns the workload with another number of layers."""
    return {**work, "model": {**work["model"], "num_layers": layers}}


def fitting_layers(work: Mapping[str, Any], parameters: tuple[int, int], memory: int | None) -> int:
    """Returns the most layers, up to the model's own, whose training state takes STATE_SHARE of the memory.

    Args:
      work: a workload with a model.
      parameters: numbers of parameters with one layer and with two.
      memory: bytes of the device; None for all layers.
    """
    layers = work["model"]["num_layers"]
    if memory is None:
        return layers
    first, second = parameters
    each = second - first
    room = STATE_SHARE * memory / STATE_BYTES - (first - each)
    return max(1, min(layers, int(room // each)))


def expert_sizes(work: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns numbers of rows by expert: equal ones, and ones of which the n-th is proportional to 1 / n."""
    rows, experts = work["rows"], work["num_experts"]
    harmonic = sum(1 / n for n in range(1, experts + 1))
    skewed = [int(rows / n / harmonic) for n in range(1, experts + 1)]
    skewed[0] += rows - sum(skewed)
    return {"balanced": [rows // experts] * experts, "skewed": skewed}
