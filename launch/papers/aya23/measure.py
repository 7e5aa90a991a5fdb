"""Aya 23 at small scale: runs the unfinished parts of the sweep, trains vocabularies and measures the bytes of caches."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.aya23 import fertility
from launch.papers.shared import domains, sweeps

TITLE = "Aya 23, 2405.15032"
SEEDS = 5
PARTS = {
    "toy": "made languages",
    "fertility": "vocabularies of real languages",
    "caches": "the bytes of caches",
}
HEADS, CACHED_KV = 4, (4, 2, 1)
_KEYS = ("run", "arm", "seed", "parents", "step", "tokens", "seconds", "evaluations", "digest")


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep, the parities of vocabularies by seed and the bytes of caches, by part.

    Args:
      model_dir: parent of the sweep's folder and of other measurements.
      seeds: number of seeds.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    measured: dict[str, Any] = {}
    if "toy" in parts:
        measured |= sweeps.parts(model_dir, {"toy": ("aya23/sweep", seeds)}, with_losses, **options)
    stages = sweeps.Stages(pathlib.Path(model_dir, "measured"))
    if "fertility" in parts:
        chosen = sweeps.seeds(seeds)
        settings = {**fertility.SETTINGS, "seeds": chosen}
        trained = stages.get("fertility", settings, lambda: fertility.measure(chosen))
        measured["fertility"] = trained["result"]
    if "caches" in parts:
        measured["caches"] = cache_bytes()
    return measured


def with_losses(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row: with 'held_out', its losses by task, and 'curve', [(step, mean loss)]."""
    curve: dict[int, list[float]] = {}
    for line in sweeps.metrics(directory):
        for key, value in line.items():
            if key.startswith("eval/") and key.endswith("/loss"):
                curve.setdefault(line["step"], []).append(value)
    return {
        **{key: row.get(key) for key in _KEYS},
        "held_out": domains.held_out({**row, "evaluations": {}}),
        "curve": [(step, sum(some) / len(some)) for step, some in sorted(curve.items())],
    }


def cache_bytes() -> dict[str, int]:
    """Returns the bytes of keys and values of 64 tokens by the number of their heads, as decoding allocates them."""
    import jax

    from model.attention import Attention
    from model.config import TransformerConfig
    from model.kv_cache.full import FullCache
    from model.transformer import Block, Transformer
    from trainers.decoding import prefill

    out = {}
    for count in CACHED_KV:
        config = TransformerConfig(
            vocab_size=48,
            num_layers=2,
            embed_dim=64,
            num_heads=HEADS,
            num_kv_heads=count,
            mlp_dim=128,
            scan_layers=False,
        )
        model = Transformer(config=config, block=functools.partial(Block, attention=Attention))
        caches = jax.eval_shape(
            lambda model=model: prefill.empty_caches(model, FullCache(), batch=1, length=64)
        )
        arrays = [array for cache in caches for array in (cache.slots.k_BKSH, cache.slots.v_BKSH)]
        out[str(count)] = sum(array.size * array.dtype.itemsize for array in arrays)
    return out
