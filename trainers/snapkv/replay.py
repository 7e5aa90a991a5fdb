"""Records queries, keys and values of prompts once, and replays them for many cache policies.

Reading a long prompt costs far more than compressing its cache and generating an answer. The inputs of a
policy while a prompt is read do not depend on the policy, so they are computed only once. The bytes of the caches are
calculated from the shapes of their states.

Shapes: B batch, T prompt length, X tokens of a suffix, N query heads, K key/value heads, H head dim, V
vocabulary.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model.kv_cache.base import AttentionForm, CachePolicy, KeyValues
from espalier.model.kv_cache.by_layer import ByLayer
from espalier.model.kv_cache.full import FullCache
from espalier.model.kv_cache.selecting import Random
from espalier.model.kv_cache.snapkv import PyramidKV
from espalier.trainers.decoding.decode import Decoded, Settings, decode
from espalier.trainers.decoding.prefill import prefill, read


@flax.struct.dataclass
class LayerRecord:
    """One layer's inputs of its policy: rotated queries and keys, values, positions and attention form.

    Positions are -1 for padding.
    """

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    positions_BT: jax.Array
    form: AttentionForm = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Recording:
    """Each layer's record of prompts, their numbers of tokens, and the logits after their last tokens."""

    layers: tuple[LayerRecord, ...]
    lengths_B: jax.Array
    logits_BV: jax.Array


class _Recorder:
    """A cache policy that records its inputs; further tokens can be read after them."""

    future = 0

    def init(self, **sizes: Any) -> Any:
        del sizes
        return ()

    def append(self, state: Any, *, form: AttentionForm, **arrays: jax.Array) -> LayerRecord:
        if isinstance(state, LayerRecord):
            arrays = {
                name: jnp.concatenate([getattr(state, name), new], axis=1)
                for name, new in arrays.items()
            }
        return LayerRecord(form=form, **arrays)

    def view(self, state: LayerRecord) -> KeyValues:
        return KeyValues(k_BSKH=state.k_BTKH, v_BSKH=state.v_BTKH, positions_BS=state.positions_BT)

    def compress(self, state: Any, *, length: int, dtype: Any = None) -> Any:
        del length, dtype
        return state


def record(model: Any, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array) -> Recording:
    """Returns a recording of prompts of lengths_B >= 1 tokens, padded on the right; the model has unrolled layers."""
    logits_BV, layers = prefill(model, params, _Recorder(), tokens_BT, lengths_B, room=0)
    return Recording(layers=tuple(layers), lengths_B=lengths_B, logits_BV=logits_BV)


def record_more(
    model: Any, params: Any, recording: Recording, tokens_BX: jax.Array, counts_B: jax.Array
) -> Recording:
    """Returns a recording extended by counts_B >= 1 tokens of each prompt, padded on the right."""
    logits_BV, layers = read_on(
        model, params, _Recorder(), list(recording.layers), recording.lengths_B, tokens_BX, counts_B
    )
    lengths_B = recording.lengths_B + counts_B
    return Recording(layers=tuple(layers), lengths_B=lengths_B, logits_BV=logits_BV)


def whole(model: Any, policy: CachePolicy, recording: Recording) -> list[Any]:
    """Returns the policy's state of each layer after the whole prompt, uncompressed."""
    return [_read(model, policy, layer, i) for i, layer in enumerate(recording.layers)]


def compressed(
    model: Any, policy: CachePolicy, recording: Recording, *, room: int, cache_dtype: Any = None
) -> list[Any]:
    """Returns the caches that `prefill` would return with this policy, with room for `room` more tokens."""

    def compressed_layer(layer: LayerRecord, index: int) -> Any:
        state = _read(model, policy, layer, index)
        return policy.compress(state, length=room, dtype=cache_dtype)

    layers = recording.layers
    # Whether the computation depends on the layer.
    differs = isinstance(policy, (ByLayer, PyramidKV, Random))
    if differs or len({layer.form for layer in layers}) > 1:
        return [compressed_layer(layer, i) for i, layer in enumerate(layers)]
    # Layers with the same computation are one loop, which compiles much faster.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    states = jax.lax.map(lambda layer: compressed_layer(layer, 0), stacked)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(len(layers))]


def _read(model: Any, policy: CachePolicy, layer: LayerRecord, index: int) -> Any:
    B, T = layer.k_BTKH.shape[:2]
    state = policy.init(batch=B, length=T, **model.cache_sizes(index))
    return policy.append(state, **vars(layer))


def decoding_policy(policy: CachePolicy) -> CachePolicy:
    """Returns the simplest policy that can decode with the compressed caches of `policy`.

    Policies that only select tokens of a prompt decode like FullCache, so they can share programs.
    """
    kind: Any = type(policy)
    alike = isinstance(policy, FullCache) and kind.extend == FullCache.extend
    return FullCache() if alike and kind.view == FullCache.view else policy


def answer(
    model: Any,
    params: Any,
    policy: CachePolicy,
    caches: Any,
    lengths_B: jax.Array,
    logits_BV: jax.Array,
    settings: Settings,
) -> Decoded:
    """Returns continuations of prompts of lengths_B tokens, from their compressed caches and last logits."""
    B = len(lengths_B)
    active_B, keys_B = jnp.ones(B, bool), jax.random.split(jax.random.key(0), B)
    decoded, _ = decode(
        model, params, policy, logits_BV, caches, lengths_B, active_B, keys_B, settings
    )
    return decoded


def read_on(
    model: Any,
    params: Any,
    policy: CachePolicy,
    caches: Any,
    lengths_B: jax.Array,
    tokens_BX: jax.Array,
    counts_B: jax.Array,
) -> tuple[jax.Array, Any]:
    """Reads counts_B >= 1 tokens after prompts of lengths_B tokens, padded on the right.

    Returns:
      Logits [B, V] after the last token of each row, and caches with the new tokens uncompressed.
    """
    positions_BX = _positions_after(lengths_B, tokens_BX, counts_B)
    out = read(model, params, policy, tokens_BX, positions_BX, caches)
    last_B1D = jnp.take_along_axis(out.hidden_BTD, (counts_B - 1)[:, None, None], axis=1)
    return model.apply({"params": params}, last_B1D, method="logits")[:, 0], out.caches


def _positions_after(lengths_B: jax.Array, tokens_BX: jax.Array, counts_B: jax.Array) -> jax.Array:
    at_X = jnp.arange(tokens_BX.shape[1], dtype=jnp.int32)[None]
    return jnp.where(at_X < counts_B[:, None], lengths_B[:, None] + at_X, -1)


def log_probabilities(
    model: Any,
    params: Any,
    policy: CachePolicy,
    caches: Any,
    lengths_B: jax.Array,
    logits_BV: jax.Array,
    tokens_BX: jax.Array,
    counts_B: jax.Array,
) -> jax.Array:
    """Returns the log-probabilities [B, X], float32, of counts_B >= 1 given tokens after prompts of lengths_B tokens.

    The first token's follows from logits_BV, those after the prompts; padding on the right has zeros.
    """
    positions_BX = _positions_after(lengths_B, tokens_BX, counts_B)
    hidden_BYD = read(model, params, policy, tokens_BX, positions_BX, caches).hidden_BTD[:, :-1]
    later_BYV = model.apply({"params": params}, hidden_BYD, method="logits")
    logits_BXV = jnp.concatenate([logits_BV[:, None], later_BYV], axis=1).astype(jnp.float32)
    given_BX1 = jnp.take_along_axis(logits_BXV, tokens_BX[..., None], axis=-1)
    log_BX = given_BX1[..., 0] - jax.nn.logsumexp(logits_BXV, axis=-1)
    return jnp.where(positions_BX >= 0, log_BX, 0.0)


def cache_bytes(
    model: Any,
    params: Any,
    policy: CachePolicy,
    *,
    length: int,
    room: int,
    batch: int = 1,
    depth: int = 1,
) -> dict[str, int]:
    """Returns the bytes of the caches of prompts, for `depth` times as many layers.

    Args:
      model: a model with unrolled layers.
      params: its parameters, or their shapes.
      policy: of the caches.
      length, batch: tokens of a prompt, and number of prompts.
      room: further tokens that the caches can hold.
      depth: how often the model's layers are counted.

    Returns:
      {"decode": bytes of all layers after the prompt, "peak": the most that is held at any time}. While the prompt is
      read, only the current layer's cache is uncompressed (trainers/decoding/prefill.py).
    """
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    recording = jax.eval_shape(
        lambda params, tokens, lengths: record(model, params, tokens, lengths),
        *(params, tokens, lengths),
    )
    states = jax.eval_shape(lambda seen: compressed(model, policy, seen, room=room), recording)
    after = [_size(state) for state in states] * depth
    whole = [_size((seen.k_BTKH, seen.v_BTKH)) for seen in recording.layers] * depth
    peak = max(
        max(w, k) + sum(after[:i]) for i, (w, k) in enumerate(zip(whole, after, strict=True))
    )
    return {"decode": sum(after), "peak": max(peak, sum(after))}


def longest_prompt(
    model: Any, params: Any, policy: CachePolicy, *, limit: int, shortest: int, **sizes: int
) -> int:
    """Returns the number of tokens of the longest prompts whose caches stay within `limit` bytes.

    Args:
      model, params: a model with unrolled layers, and its parameters or their shapes.
      policy: of the caches.
      limit: bytes that all caches together may take, while the prompt is read too.
      shortest: a number of tokens that fits.
      **sizes: `room`, `batch` and `depth` of `cache_bytes`.
    """

    def fits(length: int) -> bool:
        return cache_bytes(model, params, policy, length=length, **sizes)["peak"] <= limit

    low, high = shortest, 2 * shortest
    while high < 2**24 and fits(high):
        low, high = high, 2 * high
    high = min(high, 2**24)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
