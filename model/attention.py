"""Self-attention module: projections, rotary embedding and cache around one attention function.

Shapes: B batch, T query length, S key length, D width, N query heads, K key/value heads, H head dim.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from model import axes
from model.config import LayerKind, TransformerConfig
from model.flops import Counted, mean_keys
from model.kernels.attention_ops import Implementation, dot_product_attention
from model.kv_cache.base import AttentionForm, CachePolicy
from model.linear import Dense
from model.protocol import AttentionSettings
from model.ranges import Positive
from model.rope import Rope


class Attention(Counted):
    """Multi-head, grouped-query or multi-query causal attention.

    Attributes:
      config: shared sizes; num_kv_heads selects the variant.
      dense: factory of the four projections.
      adapters: factory that wraps each of them, called with (projection, heads=, layer_input=), or None; see
        model/adapters/adapter.py.
      rope: rotary embedding; None for models with a learned position table.
      qk_norm: factory of norms over the heads of queries and keys, or None.
      qkv_bias: biases on query, key and value projections.
      out_bias: bias on the output projection.
      scale: factor on the logits; None for H^-1/2.
      softcap: c in c * tanh(logits / c), or None.
      implementation: implementation used in training, see attention_ops.dot_product_attention.
        Ignored with a cache: prompts use 'auto', and attention over the cache has one
        implementation.
    """

    config: TransformerConfig
    kind: LayerKind = LayerKind()
    dense: Callable[..., nn.Module] = Dense
    adapters: Callable[..., Any] | None = None
    rope: Rope | None = Rope()
    qk_norm: Callable[..., nn.Module] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    scale: Positive | None = None
    softcap: Positive | None = None
    implementation: Implementation = "auto"

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
        )

    @nn.nowrap
    def flops_per_token(self, shapes: Mapping[str, Any], *, length: int) -> float:
        """Counts the projections, scores and weighted sums."""
        keys = mean_keys(length, self.kind.window)
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
        cache: Any = None,
        policy: CachePolicy | None = None,
    ) -> tuple[jax.Array, Any]:
        """Returns (output [B, T, D], updated cache); the cache is None while training.

        With a cache and no segments_BT, the new tokens attend over the updated cache, masked by
        position. With a cache and segments_BT, the new tokens attend only to each other, masked by
        index and segment as in training. A prompt is read into an empty cache this way, so its
        [T, T] scores are never in memory.
        """
        config = self.config
        q_BTNH = self._heads("query", self.query_heads, axes.HEADS, x_BTD)
        k_BTKH = self._heads("key", self.cache_heads, axes.KV_HEADS, x_BTD)
        v_BTKH = self._heads("value", self.cache_heads, axes.KV_HEADS, x_BTD)
        if self.qk_norm is not None:
            q_BTNH = self.qk_norm(name="query_norm")(q_BTNH)
            k_BTKH = self.qk_norm(name="key_norm")(k_BTKH)
        rope = self.rope if self.kind.rope else None
        if rope is not None:
            q_BTNH = rope(q_BTNH, positions_BT)
            k_BTKH = rope(k_BTKH, positions_BT)
        q_BTNH = axes.constrain(q_BTNH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_HEADS, None)
        k_BTKH = axes.constrain(k_BTKH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_KV_HEADS, None)
        v_BTKH = axes.constrain(v_BTKH, axes.BATCH, axes.INNER_LENGTH, axes.ACT_KV_HEADS, None)

        form = AttentionForm(
            scale=config.per_head_dim**-0.5 if self.scale is None else float(self.scale),
            softcap=self.softcap,
            window=self.kind.window,
            rope=rope,
        )
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
                k_scale_BSK=held.k_scale_BSK,
                v_scale_BSK=held.v_scale_BSK,
                **form.arguments(),
            )
        out_BTNH = self.gate_heads(out_BTNH, x_BTD, segments_BT)
        out_BTX = out_BTNH.reshape(*x_BTD.shape[:-1], -1)
        out_BTX = axes.constrain(out_BTX, axes.BATCH, axes.INNER_LENGTH, axes.ACT_HEADS)
        out = self._dense("out", config.embed_dim, (axes.HEADS, axes.EMBED), self.out_bias)
        if self.adapters is not None:
            out = self.adapters(out, layer_input=x_BTD)
        return out(out_BTX), cache

    def _heads(self, name: str, heads: int, axis: str, x_BTD: jax.Array) -> jax.Array:
        head_dim = self.config.per_head_dim
        dense = self._dense(name, heads * head_dim, (axes.EMBED, axis), self.qkv_bias)
        if self.adapters is not None:
            dense = self.adapters(dense, heads=heads, layer_input=x_BTD)
        return dense(x_BTD).reshape(*x_BTD.shape[:-1], heads, head_dim)

    def _dense(self, name: str, features: int, names: tuple[str, str], use_bias: bool) -> Any:
        return self.dense(
            features=features,
            axes=names,
            use_bias=use_bias,
            dtype=self.config.compute_dtype,
            param_dtype=self.config.storage_dtype,
            name=name,
        )
