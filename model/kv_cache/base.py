"""The interface of cache policies, which decide what keys and values a decoder stores.

A policy is a stateless object: its methods take a state, a pytree, and return a new one. Every slot has
the position of its token, -1 while empty. Padding, unequal prompts, eviction and windows are therefore
all one mask by position.

A state has two phases. First, `init` and `append` read a prompt, whole or in chunks, and drop nothing.
`compress` then returns the state that decoding starts from, and `append` adds generated tokens. Every
array of a state has the batch as its first axis or is a scalar, so that rows can be repeated and
reordered.

Shapes: B batch, T new tokens, S slots, N query heads, K key/value heads, X heads with tokens of their
own, H head dim.
"""

import dataclasses
from typing import Any, Protocol, TypedDict, Unpack

import flax.struct
import jax

from espalier.model.config import LayerKind
from espalier.model.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """Settings of a layer's attention, see dot_product_attention; `rope` has rotated queries and keys."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    rope: Rope | None = None

    def arguments(self) -> dict[str, Any]:
        """Returns keywords of attention_ops.dot_product_attention."""
        return {"scale": self.scale, "softcap": self.softcap, "window": self.window}


@flax.struct.dataclass
class KeyValues:
    """Keys and values that attention reads; slots with position -1 are empty.

    Positions are [B, S], or [B, X, S] where heads hold different tokens. X divides N and is a multiple of
    the number of heads of k and v, so heads can share keys and values but see different slots. With
    scales, k and v are int8 and their values are k * k_scale and v * v_scale.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    k_scale_BSK: jax.Array | None = None
    v_scale_BSK: jax.Array | None = None


class CacheSizes(TypedDict):
    """Sizes of one layer's cache, keywords of `CachePolicy.init`; `layer` counts from 0."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    layer: int
    num_layers: int
    kind: LayerKind


class CachePolicy(Protocol):
    """What stays in the key/value cache of one layer: pure functions of its state, a tree of arrays of fixed shapes.

    `init` makes an empty state. `append` adds the tokens of a prompt, or one new token. `compress` is called once, between
    the prompt and the first new token, and drops what the policy does not keep. `view` returns what queries attend to.
    Shapes: B batch, T tokens, K heads of keys and values, N heads of queries, H width of a head.

    `future` is the number of last tokens that are read but then dropped, so that decoding starts before
    them; 0 for all policies except the oracle.
    """

    future: int

    def init(self, *, batch: int, length: int, **sizes: Unpack[CacheSizes]) -> Any:
        """Returns an empty state with room for `length` tokens."""
        ...

    def append(
        self,
        state: Any,
        *,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        positions_BT: jax.Array,
        q_BTNH: jax.Array,
        form: AttentionForm,
    ) -> Any:
        """Returns the state with T more tokens; position -1 marks padding.

        Policies that score keys use the queries, which are rotated like the keys, and the settings of the
        layer's attention. When a prompt is read at once, its tokens attend to each other and not to the
        state (model/attention.py), so the new state may already be compressed.
        """
        ...

    def view(self, state: Any) -> KeyValues:
        """Returns the keys and values to attend to."""
        ...

    def compress(self, state: Any, *, length: int, dtype: Any = None) -> Any:
        """Returns the state that decoding starts from.

        Args:
          state: the state after a prompt.
          length: number of further tokens to reserve room for.
          dtype: dtype of the stored keys and values. None does not change it; int8 stores integers
            with a float32 scale per token and head.
        """
        ...
