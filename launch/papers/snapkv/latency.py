"""Milliseconds per generated token against the length of the prompt, with whole and compressed caches.

The prompt's keys and values are random, which does not change the time of attention, so that no prompt of 16K tokens
is read. Every step generates from the same compiled loop.

Shapes: B batch, T prompt length, N query heads, K key/value heads, H head dim.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from launch.papers.snapkv.methods import FULL, Method, methods
from model.config import TransformerConfig
from model.kv_cache.base import AttentionForm
from model.rope import Rope
from model.transformer import Transformer
from trainers import initialise
from trainers.decoding.decode import decode
from trainers.decoding.settings import Settings
from trainers.snapkv import replay

CONFIG = TransformerConfig(
    vocab_size=1024,
    num_layers=4,
    embed_dim=256,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=512,
    scan_layers=False,
)
WINDOW = 32


def latencies(
    *, lengths: Sequence[int], capacity: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Measures decoding times of full cache and SnapKV in turns, so that the machine's load affects both.

    Returns:
      {method: {length: {"ms": [repeats] per token, "compress_ms", "cache_bytes"}}}.
    """
    model = Transformer(config=CONFIG)
    params = nn.meta.unbox(initialise.variables(model, jax.random.key(0)))["params"]
    cases = {"full": FULL, "snapkv": methods(window=WINDOW, kernel=7)["snapkv"]}
    out: dict[str, Any] = {name: {} for name in cases}
    for length in tqdm(lengths, desc="latency", unit="length", disable=None):
        recording = _random_recording(length)
        prepared = {
            name: _prepare(model, params, method, recording, capacity, new_tokens)
            for name, method in cases.items()
        }
        measured: Mapping[str, list[float]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, (generate, caches, _) in prepared.items():
                # The program consumes its caches, so that its loop copies nothing.
                fresh = jax.block_until_ready(jax.tree.map(jnp.copy, caches))
                began = time.perf_counter()
                jax.block_until_ready(generate(params, fresh))
                measured[name].append((time.perf_counter() - began) / new_tokens * 1e3)
        for name, (_, caches, compress_ms) in prepared.items():
            out[name][str(length)] = {
                "ms": [round(ms, 4) for ms in measured[name]],
                "compress_ms": compress_ms,
                "cache_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(caches)),
            }
    return out


def _random_recording(length: int) -> replay.Recording:
    rng = np.random.default_rng(length)
    N, K, H = CONFIG.num_heads, CONFIG.kv_heads, CONFIG.per_head_dim

    def draw(heads: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((1, length, heads, H), np.float32))

    form = AttentionForm(scale=H**-0.5, rope=Rope())
    layers = [
        replay.LayerRecord(
            q_BTNH=draw(N),
            k_BTKH=draw(K),
            v_BTKH=draw(K),
            positions_BT=jnp.arange(length, dtype=jnp.int32)[None],
            form=form,
        )
        for _ in range(CONFIG.num_layers)
    ]
    return replay.Recording(
        layers=tuple(layers),
        lengths_B=jnp.full(1, length, jnp.int32),
        logits_BV=jnp.zeros((1, CONFIG.vocab_size)),
    )


def _prepare(
    model: Any,
    params: Any,
    method: Method,
    recording: replay.Recording,
    capacity: int,
    new_tokens: int,
) -> tuple[Any, Any, float]:
    """Returns (generating function, caches, milliseconds of compression), all compiled and warm."""
    policy = method.at(capacity)
    settings = Settings(max_new_tokens=new_tokens + 1)  # the first follows from the prompt's logits
    compress = jax.jit(functools.partial(replay.compressed, model, policy, room=new_tokens))
    jax.block_until_ready(compress(recording))
    began = time.perf_counter()
    caches = jax.block_until_ready(compress(recording))
    compress_ms = round((time.perf_counter() - began) * 1e3, 2)

    @functools.partial(jax.jit, donate_argnums=1)
    def generate(params: Any, caches: Any) -> Any:
        return decode(
            model,
            params,
            policy,
            recording.logits_BV,
            caches,
            recording.lengths_B,
            jnp.ones(1, bool),
            jax.random.split(jax.random.key(0), 1),
            settings,
        )

    jax.block_until_ready(generate(params, jax.tree.map(jnp.copy, caches)))
    return generate, caches, compress_ms
