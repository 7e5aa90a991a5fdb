"""A mixture of attention experts: a token mixes the outputs of all, or of its `top_k` (BAM, arXiv 2408.08274).

MoA(x)_t = sum_j g_j(x_t) A_j(x)_t: the gates are the query's, and every expert attends over all tokens before it
with its own keys and values, or with keys and values that all share. Experts are heads: E experts of h heads are E h
heads, multiplied with gates before one output projection, so that caches, kernels and shardings work as for attention.

Shapes: B batch, T length, D width, E experts, K key/value heads, G query heads for each, H head dim. Heads are in
the order [E, K, G] where experts have keys and values of their own, and [K, E, G] where they share them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.attention import Attention
from model.linear import Dense
from model.moe import routing
from model.protocol import AttentionSettings


class MixtureOfAttention(Attention):
    """Attention experts behind a router of their own.

    The fields of `Attention` describe each expert; `config` counts the heads of one. The gates of all experts are sown as `router_probs` [B, T, E] into the collection 'intermediates', statistics into 'metrics'.

    Attributes:
      num_experts: E.
      top_k: experts that a token mixes, by their probabilities; None for all of them (soft routing).
      shared_kv: whether keys and values are one set for all experts, which makes the cache a dense model's.
      router: factory of the router's projection, computed in float32.
      balance_loss: weight of routing.balance_loss, for `top_k`.

    Raises:
      ValueError: more experts per token than there are.
    """

    num_experts: int = 4
    top_k: int | None = None
    shared_kv: bool = False
    router: Callable[..., nn.Module] = Dense
    balance_loss: float = 0.0

    def __post_init__(self):
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"MixtureOfAttention.top_k = {self.top_k} must lie between 1 and num_experts = "
                f"{self.num_experts}; None mixes all."
            )
        super().__post_init__()

    @property
    def query_heads(self) -> int:
        return self.num_experts * self.config.num_heads

    @property
    def cache_heads(self) -> int:
        return self.config.kv_heads * (1 if self.shared_kv else self.num_experts)

    @property
    def settings(self) -> AttentionSettings:
        return dataclasses.replace(
            super().settings,
            experts=self.num_experts,
            top_k=self.top_k,
            shared_kv=self.shared_kv,
        )

    @nn.nowrap
    def flops_per_token(self, shapes: Mapping[str, Any], *, length: int) -> float:
        """Counts all experts, whatever a token mixes: all queries, keys and values are computed."""
        own = {name: shapes[name] for name in shapes if name != "router"}
        router = routing.router_of(self).flops_per_token(shapes["router"], length=length)
        return router + super().flops_per_token(own, length=length)

    def gate_heads(
        self, heads_BTNH: jax.Array, x_BTD: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        """Multiplies heads with the gate of their expert."""
        gates_BTE = self._gates(x_BTD, segments_BT).astype(heads_BTNH.dtype)
        inner = self.config.num_heads // self.config.kv_heads  # heads that lie together
        outer = self.config.kv_heads
        if not self.shared_kv:
            inner, outer = inner * outer, 1
        gates_BTN = jnp.tile(jnp.repeat(gates_BTE, inner, axis=-1), outer)
        return heads_BTNH * gates_BTN[..., None]

    def _gates(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """The weight of each expert, 0 for those that a token does not mix, float32."""
        logits_BTE = routing.router_of(self)(x_BTD)
        probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        self.sow("intermediates", "router_probs", probs_BTE)
        routes = routing.route(probs_BTE, top_k=self.top_k or self.num_experts, renormalise=False)
        real_BT = jnp.ones(x_BTD.shape[:2], bool) if segments_BT is None else segments_BT != 0
        if self.balance_loss:
            balance = routing.balance_loss(probs_BTE, routes.experts_MK, real_BT)
            self.sow("losses", "balance", self.balance_loss * balance)
        if self.is_mutable_collection("metrics"):
            all_MK = jnp.ones(routes.experts_MK.shape, bool)
            statistics = routing.statistics(probs_BTE, routes.experts_MK, all_MK, real_BT)
            for name in ("load", "load_max", "entropy", "top_probability"):
                self.sow("metrics", f"router_{name}", statistics[name])
        if self.top_k is None:
            return probs_BTE
        chosen_BTE = jax.nn.one_hot(routes.experts_MK, self.num_experts).sum(-2)
        return probs_BTE * chosen_BTE


def experts_of(
    *,
    attention: Callable[..., Any] = Attention,
    moa: Callable[..., MixtureOfAttention] = MixtureOfAttention,
) -> Callable[..., MixtureOfAttention]:
    """Returns the `attention` factory of a model whose attentions become experts.

    Args:
      attention: factory of one expert; the mixture takes its settings.
      moa: factory of the mixture, called with them.

    Raises:
      ValueError: (the returned factory) `attention` makes another class than `Attention`.
    """

    def make(**passed: Any) -> MixtureOfAttention:
        one = attention(**{**passed, "name": None, "parent": None})
        if type(one) is not Attention:
            raise ValueError(
                f"moa.experts_of: the experts are plain attentions, not {type(one).__name__}, whose own "
                "computation would be dropped. Use ATTENTION = @attention.Attention, or one method less."
            )
        return moa(**{name: getattr(one, name) for name in _FIELDS}, **passed)

    return make


# Settings of `Attention`, without the fields that its owner passes.
_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(Attention)
    if field.init and field.name not in ("config", "kind", "name", "parent")
)
