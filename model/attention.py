"""Attention modules: projections, rotary embedding and cache around one attention function.

Shapes: B batch, T query length, S key length, D width, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from espalier.common.ranges import Decay, Positive, check_choice, recordable, refuse_set
from espalier.model import axes
from espalier.model.config import LayerKind, TransformerConfig
from espalier.model.flops import Counted, mean_keys, weights
from espalier.model.kernels.attention_ops import Implementation, dot_product_attention
from espalier.model.kv_cache import slots
from espalier.model.kv_cache.base import AttentionForm, CachePolicy
from espalier.model.linear import Dense, dropped
from espalier.model.protocol import AttentionSettings
from espalier.model.rope import Rope

NormedPart = Literal["head", "projection"]


class PositionBias(Protocol):
    """A number per head and pair of positions, added to logits; model/t5/relative_bias.py has T5's.

    Attributes:
      by_index_1NTS: the bias of rows whose tokens have adjacent positions.
    """

    by_index_1NTS: jax.Array

    def at(self, q_positions_BT: jax.Array, kv_positions_BS: jax.Array) -> jax.Array:
        """Returns the bias [B, N, T, S] between positions of queries and keys; a key at position -1 is an empty slot."""
        ...


@flax.struct.dataclass
class Encoded:
    """What the layers of a decoder read of an encoder.

    Attributes:
      states_BSD: the encoder's output; None where a layer has the keys and values.
      segments_BS: a token sees the encoder's tokens of its own segment; None for one document without padding. Tokens
        without segments are of segment 1.
      keys_values: keys and values [B, K, S, H] of one layer, computed from the states; None before. Heads come first, as
        in caches: decoding reads them for every token.
      scales: factors [B, K, S] on int8 keys and values; None for floats.
    """

    states_BSD: jax.Array | None
    segments_BS: jax.Array | None = None
    keys_values: tuple[jax.Array, jax.Array] | None = None
    scales: tuple[jax.Array, jax.Array] | None = None

    def stored_as(self, dtype: Any) -> "Encoded":
        """Returns this with keys and values of another dtype, see `CachePolicy.compress`; None changes nothing."""
        if dtype is None or self.keys_values is None:
            return self
        (keys, k_scale), (values, v_scale) = (slots.stored_as(x, dtype) for x in self.keys_values)
        scales = None if k_scale is None or v_scale is None else (k_scale, v_scale)
        return dataclasses.replace(self, keys_values=(keys, values), scales=scales)


@recordable
class Attention(Counted):
    """Multi-head, grouped-query or multi-query self-attention, causal unless `kind` is of an encoder.

    Attributes:
      config: shared sizes; num_kv_heads selects the variant.
      dense: factory of the four projections.
      adapters: factory that wraps each of them, called with (projection, heads=, layer_input=), or None; see
        model/adapters/adapter.py.
      rope: rotary embedding; None for models with a learned position table.
      local_rope: rotary embedding of layers with a window (Gemma 3); None for `rope`.
      qk_norm: factory of norms of queries and keys, or None.
      qk_norm_of: what one norm is over: the dimensions of a 'head' (Qwen3), or of the whole 'projection' (OLMo 2).
      qkv_bias: biases on query, key and value projections.
      out_bias: bias on the output projection.
      query_init: initialiser of the query projection's kernel; None for the initialiser of `dense`.
      scale: factor on the logits; None for H^-1/2.
      softcap: c in c * tanh(logits / c), or None.
      dropout: share of the attention weights that training drops; a key is dropped for all queries of a head.
      implementation: implementation used in training, see attention_ops.dot_product_attention.
        Ignored with a cache: prompts use 'auto', and attention over the cache has one
        implementation.

    Raises:
      ValueError: an unknown `qk_norm_of`, or one without `qk_norm`.
    """

    config: TransformerConfig
    kind: LayerKind = LayerKind()
    dense: Callable[..., nn.Module] = Dense
    adapters: Callable[..., Any] | None = None
    rope: Rope | None = Rope()
    local_rope: Rope | None = None
    qk_norm: Callable[..., nn.Module] | None = None
    qk_norm_of: NormedPart = "head"
    qkv_bias: bool = False
    out_bias: bool = False
    query_init: Callable | None = None
    scale: Positive | None = None
    softcap: Positive | None = None
    dropout: Decay = 0.0
    implementation: Implementation = "auto"

    def __post_init__(self):
        check_choice("Attention.qk_norm_of", self.qk_norm_of, NormedPart)
        if self.qk_norm is None:
            refuse_set(self, ("qk_norm_of",), "qk_norm = None")
        super().__post_init__()

    @property
    def query_heads(self) -> int:
        return self.config.num_heads

    @property
    def cache_heads(self) -> int:
        return self.config.kv_heads

    @property
    def settings(self) -> AttentionSettings:
        return AttentionSettings(
            query_heads=self.query_heads,
            cache_heads=self.cache_heads,
            head_dim=self.config.per_head_dim,
            adapters=self.adapters,
            implementation=self.implementation,
        )

    @nn.nowrap
    def flops_per_token(self, shapes: Mapping[str, Any], *, length: int) -> float:
        """Counts the projections, scores and weighted sums."""
        keys = mean_keys(length, self.kind.window) if self.kind.causal else length
        products = 4.0 * keys * self.query_heads * self.config.per_head_dim
        return super().flops_per_token(shapes, length=length) + products

    def gate_heads(
        self, heads_BTNH: jax.Array, x_BTD: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        """Returns the input of the output projection; mixtures multiply the heads by gates here."""
        del x_BTD, segments_BT
        return heads_BTNH

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        bias: PositionBias | None = None,
        cache: Any = None,
        policy: CachePolicy | None = None,
    ) -> tuple[jax.Array, Any]:
        """Returns (output [B, T, D], updated cache); the cache is None while training.

        `bias` is added to the logits.
        With a cache and no segments_BT, the new tokens attend over the updated cache, masked by
        position. With a cache and segments_BT, the new tokens attend only to each other, masked by
        index and segment as in training. A prompt is read into an empty cache this way, so its
        [T, T] scores are never in memory.
        """
        q_BTNH = self._query(x_BTD)
        k_BTKH, v_BTKH = self._key_value(x_BTD)
        rope = self._rope()
        if rope is not None:
            q_BTNH = rope(q_BTNH, positions_BT)
            k_BTKH = rope(k_BTKH, positions_BT)
        q_BTNH = axes.constrain(q_BTNH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_HEADS, None)
        k_BTKH = axes.constrain(k_BTKH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_KV_HEADS, None)
        v_BTKH = axes.constrain(v_BTKH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_KV_HEADS, None)

        form = self._form(rope)
        if policy is not None:
            cache = policy.append(
                cache,
                k_BTKH=k_BTKH,
                v_BTKH=v_BTKH,
                positions_BT=positions_BT,
                q_BTNH=q_BTNH,
                form=form,
            )
        if policy is None or segments_BT is not None:
            out_BTNH = dot_product_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                q_segments_BT=segments_BT,
                kv_segments_BS=segments_BT,
                bias=None if bias is None else bias.by_index_1NTS,
                causal=self.kind.causal,
                # `implementation` may not support the prompt's length.
                implementation=self.implementation if policy is None else "auto",
                **form.arguments(),
            )
        else:
            held = policy.view(cache)
            out_BTNH = dot_product_attention(
                q_BTNH,
                held.k_BSKH,
                held.v_BSKH,
                q_positions_BT=positions_BT,
                kv_positions_BS=held.positions_BS,
                bias=None if bias is None else bias.at(positions_BT, held.positions_BS),
                k_scale_BSK=held.k_scale_BSK,
                v_scale_BSK=held.v_scale_BSK,
                **form.arguments(),
            )
        return self._out(out_BTNH, x_BTD, segments_BT), cache

    def _rope(self) -> Rope | None:
        """Returns the rotary embedding of this layer, if it has one."""
        if not self.kind.rope:
            return None
        local = self.kind.window is not None and self.local_rope is not None
        return self.local_rope if local else self.rope

    def _form(self, rope: Rope | None) -> AttentionForm:
        return AttentionForm(
            scale=self.config.per_head_dim**-0.5 if self.scale is None else float(self.scale),
            softcap=self.softcap,
            window=self.kind.window,
            rope=rope,
        )

    def _query(self, x_BTD: jax.Array) -> jax.Array:
        init = {} if self.query_init is None else {"kernel_init": self.query_init}
        q_BTNH = self._heads("query", self.query_heads, axes.HEADS, x_BTD, **init)
        return self._qk_normed("query_norm", q_BTNH)

    def _key_value(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        k_BSKH = self._heads("key", self.cache_heads, axes.KV_HEADS, x_BSD)
        v_BSKH = self._heads("value", self.cache_heads, axes.KV_HEADS, x_BSD)
        k_BSKH = self._qk_normed("key_norm", k_BSKH)
        # A weight that is dropped for all queries of a head is a value that is dropped.
        return k_BSKH, dropped(self, v_BSKH, self.dropout, over=-1)

    def _qk_normed(self, name: str, x_BTNH: jax.Array) -> jax.Array:
        """Returns queries or keys after their norm, if they have one."""
        if self.qk_norm is None:
            return x_BTNH
        norm = self.qk_norm(name=name)
        if self.qk_norm_of == "head":
            return norm(x_BTNH)
        if norm.scale_dims != 1:
            raise ValueError(
                f"Attention.qk_norm_of = 'projection' has one gain for each dimension of all heads: remove "
                f"{type(norm).__name__}.scale_dims = {norm.scale_dims}."
            )
        return norm(x_BTNH.reshape(*x_BTNH.shape[:-2], -1)).reshape(x_BTNH.shape)

    def _out(
        self, out_BTNH: jax.Array, x_BTD: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        out_BTNH = self.gate_heads(out_BTNH, x_BTD, segments_BT)
        out_BTX = out_BTNH.reshape(*x_BTD.shape[:-1], -1)
        out_BTX = axes.constrain(out_BTX, axes.BATCH, axes.INNER_LENGTH, axes.ACT_HEADS)
        out = self._dense("out", self.config.embed_dim, (axes.HEADS, axes.EMBED), self.out_bias)
        if self.adapters is not None:
            out = self.adapters(out, layer_input=x_BTD)
        return out(out_BTX)

    def _heads(
        self, name: str, heads: int, axis: str, x_BTD: jax.Array, **init: Callable
    ) -> jax.Array:
        head_dim = self.config.per_head_dim
        dense = self._dense(name, heads * head_dim, (axes.EMBED, axis), self.qkv_bias, **init)
        if self.adapters is not None:
            dense = self.adapters(dense, heads=heads, layer_input=x_BTD)
        return dense(x_BTD).reshape(*x_BTD.shape[:-1], heads, head_dim)

    def _dense(
        self, name: str, features: int, names: tuple[str, str], use_bias: bool, **init: Callable
    ) -> Any:
        return self.dense(
            **init,
            features=features,
            axes=names,
            use_bias=use_bias,
            dtype=self.config.compute_dtype,
            param_dtype=self.config.storage_dtype,
            name=name,
        )


@recordable
class CrossAttention(Attention):
    """Attention of a decoder's tokens [B, T, D] over an encoder's output [B, S, D], without positions.

    `Attention` describes the attributes.

    Raises:
      ValueError: there is a rotary embedding, which would have no effect.
    """

    rope: Rope | None = None

    def __post_init__(self):
        if self.rope is not None:
            raise ValueError(
                "CrossAttention.rope has no effect, as there are no positions: remove it."
            )
        refuse_set(self, ("local_rope",), "an encoder's output, which has no positions")
        super().__post_init__()

    @nn.nowrap
    def cross_flops_per_token(
        self, shapes: Mapping[str, Any], *, length: int, encoder_length: int
    ) -> float:
        """Returns the FLOPs for one of `length` tokens, with their share of keys and values of `encoder_length`."""
        once = 2.0 * sum(weights(shapes[name]) for name in ("key", "value"))
        products = 4.0 * encoder_length * self.query_heads * self.config.per_head_dim
        return 2.0 * weights(shapes) - once + once * encoder_length / length + products

    @nn.compact
    def __call__(  # type: ignore[override]
        self, x_BTD: jax.Array, *, encoded: Encoded, segments_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Encoded]:
        """Returns the output [B, T, D], and `encoded` with this layer's keys and values instead of the states."""
        q_BTNH = self._query(x_BTD)
        if encoded.keys_values is None:
            assert encoded.states_BSD is not None  # see Encoded
            k_BSKH, v_BSKH = self._key_value(encoded.states_BSD)
            keys_values = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
            encoded = Encoded(None, encoded.segments_BS, keys_values)
        else:
            k_BSKH, v_BSKH = (x_BKSH.swapaxes(1, 2) for x_BKSH in encoded.keys_values)
        k_scale_BSK, v_scale_BSK = (
            (x.swapaxes(1, 2) for x in encoded.scales) if encoded.scales else (None, None)
        )
        q_BTNH = axes.constrain(q_BTNH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_HEADS, None)
        k_BSKH = axes.constrain(k_BSKH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_KV_HEADS, None)
        v_BSKH = axes.constrain(v_BSKH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_KV_HEADS, None)
        q_segments_BT = None
        if encoded.segments_BS is not None:
            q_segments_BT = segments_BT
            if q_segments_BT is None:
                q_segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
        form = self._form(None).arguments() | {"window": None}
        out_BTNH = dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_segments_BT=q_segments_BT,
            kv_segments_BS=encoded.segments_BS,
            k_scale_BSK=k_scale_BSK,
            v_scale_BSK=v_scale_BSK,
            causal=False,
            implementation=self.implementation if encoded.scales is None else "auto",
            **form,
        )
        return self._out(out_BTNH, x_BTD, segments_BT), encoded
