"""Bytes of the caches of attention experts, as decoding allocates them; nothing is run."""

import functools
from typing import Any

EXPERTS = (2, 3, 4, 6, 8)
LENGTH = 256  # tokens of one row
NAMES = {"shared_kv": "shared keys and values", "expert_kv": "own keys and values"}


def measure() -> dict[str, list[int]]:
    """{"experts", "dense", "shared_kv", "expert_kv"}, in the order of EXPERTS: bytes of keys and values of all layers."""
    from model.attention import Attention
    from model.bam.moa import MixtureOfAttention

    out: dict[str, list[int]] = {"experts": [], "dense": [], "shared_kv": [], "expert_kv": []}
    for count in EXPERTS:
        kinds: dict[str, Any] = {
            "dense": Attention,
            "shared_kv": functools.partial(MixtureOfAttention, num_experts=count, shared_kv=True),
            "expert_kv": functools.partial(MixtureOfAttention, num_experts=count),
        }
        out["experts"].append(count)
        for kind, attention in kinds.items():
            out[kind].append(_bytes(attention))
    return out


def _bytes(attention: Any) -> int:
    import jax

    from model.config import TransformerConfig
    from model.kv_cache.full import FullCache
    from model.transformer import Block, Transformer
    from trainers.decoding import prefill

    config = TransformerConfig(
        vocab_size=48, num_layers=3, embed_dim=64, num_heads=4, mlp_dim=128, scan_layers=False
    )
    model = Transformer(config=config, block=functools.partial(Block, attention=attention))
    caches = jax.eval_shape(
        lambda: prefill.empty_caches(model, FullCache(), batch=1, length=LENGTH)
    )
    held = [array for cache in caches for array in (cache.slots.k_BKSH, cache.slots.v_BKSH)]
    return sum(array.size * array.dtype.itemsize for array in held)
