"""BAM at small scale: runs the unfinished parts of the sweep, and measures the bytes of caches."""

import functools
from collections.abc import Sequence
from typing import Any

from launch.papers.shared import domains

TITLE = "BAM, 2408.08274"
SEEDS = 5
PARTS = {**domains.PARTS, "caches": "the bytes of caches"}
EXPERTS = (2, 3, 4, 6, 8)
CACHE_LENGTH = 256  # tokens of one row


def run(*, parts: Sequence[str] = tuple(PARTS), **settings: Any) -> dict[str, Any]:
    """Returns the parts of `domains.run`, and 'caches', the result of `cache_bytes`.

    Further arguments and errors are those of `domains.run`.
    """
    measured = domains.run("bam", parts=[p for p in parts if p in domains.PARTS], **settings)
    return measured | ({"caches": cache_bytes()} if "caches" in parts else {})


def cache_bytes() -> dict[str, list[int]]:
    """Returns {"experts", "dense", "shared_kv", "expert_kv"}, in the order of EXPERTS.

    The latter three are bytes of keys and values of all layers, as decoding allocates them; nothing is run.
    """
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
        lambda: prefill.empty_caches(model, FullCache(), batch=1, length=CACHE_LENGTH)
    )
    arrays = [array for cache in caches for array in (cache.slots.k_BKSH, cache.slots.v_BKSH)]
    return sum(array.size * array.dtype.itemsize for array in arrays)
