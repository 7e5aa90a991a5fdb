"""Reads prompts into key/value caches, all at once or in chunks of tokens.

A batch may have prompts of unequal length: they are padded on the right. Padding has position -1, and no
token attends to it. A generation whose caches cannot be in memory is refused before they are allocated.

Shapes: B batch, T prompt length, C tokens of a chunk, D width, V vocabulary.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from espalier.model.kv_cache.base import AttentionForm, CachePolicy, KeyValues
from espalier.model.protocol import LanguageModel

_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def prefill(
    model: Any,
    params: Any,
    policy: CachePolicy,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    room: int,
    cache_dtype: Any = None,
    chunk: int | None = None,
    encoder: Mapping[str, jax.Array] = MappingProxyType({}),
) -> tuple[jax.Array, Any]:
    """Reads prompts of lengths_B >= 1 tokens.

    Args:
      model: a model with unrolled layers.
      tokens_BT: prompts, padded on the right.
      lengths_B: lengths of the prompts, including the last policy.future tokens, which are read and then dropped.
      room: number of further tokens that the caches have room for.
      cache_dtype: dtype of the caches, see CachePolicy.compress.
      chunk: None reads all tokens at once and compresses each layer's cache as soon as its keys are computed, so only one
        layer's uncompressed keys are in memory. An integer C reads C tokens at a time: activations of C tokens are in
        memory, with the uncompressed keys of all layers, which are compressed after the last chunk.
      encoder: an encoder-decoder's inputs by keyword, see `hidden` in model/t5/encoder_decoder.py; only with `chunk` None.

    Returns:
      Logits [B, V] after the last token of each prompt, and the caches that decoding starts from.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk} must be at least 1, or None to read prompts at once.")
    B, T = tokens_BT.shape
    empty = empty_caches(model, policy, batch=B, length=T)
    at_T = jnp.arange(T, dtype=jnp.int32)[None]
    positions_BT = jnp.where(at_T < lengths_B[:, None], at_T, -1)
    last_B = lengths_B - 1 - policy.future
    if chunk is None:
        # With segments, tokens attend only to the prompt and not to the cache (model/attention.py).
        segments_BT = (positions_BT >= 0).astype(jnp.int32)
        at_once = _CompressedAtOnce(policy, room, cache_dtype)
        out = read(model, params, at_once, tokens_BT, positions_BT, empty, segments_BT, **encoder)
        caches = out.caches
        if encoder:  # the policy has the decoder's keys and values alone
            caches = [cache.with_encoded_as(cache_dtype) for cache in caches]
        last_BD = jnp.take_along_axis(out.hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    else:
        last_BD, whole = _read_chunks(
            model, params, policy, tokens_BT, positions_BT, empty, last_B, chunk
        )
        caches = [policy.compress(cache, length=room, dtype=cache_dtype) for cache in whole]
    return model.apply({"params": params}, last_BD[:, None], method="logits")[:, 0], caches


def empty_caches(
    model: LanguageModel, policy: CachePolicy, *, batch: int, length: int
) -> list[Any]:
    """Returns an empty cache for every layer, with room for `length` tokens."""
    return [
        policy.init(batch=batch, length=length, **model.cache_sizes(layer))
        for layer in range(model.config.num_layers)
    ]


def read(model, params, policy, tokens_BT, positions_BT, caches, segments_BT=None, **encoder):
    """Returns the hidden states of tokens and the updated caches, see `hidden` in model/transformer.py."""
    return model.apply(
        {"params": params},
        tokens_BT,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        caches=caches,
        policy=policy,
        **encoder,
        method="hidden",
    )


@dataclasses.dataclass(frozen=True)
class _CompressedAtOnce:
    """A policy that compresses each cache in the call that reads the prompt."""

    policy: CachePolicy
    room: int
    dtype: Any
    future = 0  # `prefill` reads policy.future instead

    def append(self, state: Any, *, form: AttentionForm, **arrays: jax.Array) -> Any:
        state = self.policy.append(state, form=form, **arrays)
        return self.policy.compress(state, length=self.room, dtype=self.dtype)

    def view(self, state: Any) -> KeyValues:
        return self.policy.view(state)


def _read_chunks(
    model, params, policy, tokens_BT, positions_BT, empty, last_B, chunk
) -> tuple[jax.Array, Any]:
    """Returns the hidden state [B, D] of each row's token at index last_B, and caches of all tokens."""
    B, T = tokens_BT.shape

    def read_chunk(carry: tuple[jax.Array, Any], start: jax.Array | int, length: int):
        last_BD, caches = carry
        tokens_BC = jax.lax.dynamic_slice_in_dim(tokens_BT, start, length, axis=1)
        positions_BC = jax.lax.dynamic_slice_in_dim(positions_BT, start, length, axis=1)
        # Without segments, tokens attend to the caches, masked by position.
        out = read(model, params, policy, tokens_BC, positions_BC, caches)
        at_B = jnp.clip(last_B - start, 0, length - 1)
        chunk_last_BD = jnp.take_along_axis(out.hidden_BTD, at_B[:, None, None], axis=1)[:, 0]
        in_chunk_B = (last_B >= start) & (last_B < start + length)
        return jnp.where(in_chunk_B[:, None], chunk_last_BD, last_BD), out.caches

    carry = (jnp.zeros((B, model.config.embed_dim), model.config.compute_dtype), empty)
    chunks, rest = divmod(T, chunk)
    if chunks:
        # A state records its AttentionForm at the first token, but a loop's carry needs it from the start.
        structure = jax.tree.structure(
            jax.eval_shape(lambda carry: read_chunk(carry, 0, chunk), carry)
        )
        carry = jax.tree.unflatten(structure, jax.tree.leaves(carry))
        carry = jax.lax.fori_loop(
            0, chunks, lambda i, carry: read_chunk(carry, i * chunk, chunk), carry
        )
    if rest:
        carry = read_chunk(carry, chunks * chunk, rest)
    return carry


def repeated(tree: Any, copies: int) -> Any:
    """Returns a tree with each row of its arrays repeated `copies` times, adjacent; scalars do not change."""
    if copies == 1:
        return tree
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0) if x.ndim else x, tree)


class TooLargeError(ValueError):
    """The caches of a generation need more memory than there is."""


def check_memory(state: Any, *, what: str, remedy: str, devices: int) -> None:
    """Raises TooLargeError unless the arrays of a state can be in the memory of the devices.

    Args:
      state: shapes and dtypes of all arrays that a generation holds besides the parameters.
      what, remedy: what needs the memory, and how to need less, for the error.
      devices: number of devices that the rows are split over.
    """
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    limit = _memory_limit(devices)
    if needed > limit:
        raise TooLargeError(
            f"{what} needs {needed / 1e9:,.1f} GB for keys, values and tokens, and there are {limit / 1e9:,.1f} GB: {remedy}."
        )


def _memory_limit(devices: int) -> float:
    """Returns the bytes of the devices' memory, or, for devices that do not tell, of the machine's."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] * devices
    limit = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    text = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return min(limit, float(text)) if text.isdecimal() else limit
