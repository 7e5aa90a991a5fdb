"""A mixture of attention experts: each token mixes all experts or its `top_k` (BAM, arXiv 2408.08274).

MoA(x)_t = sum_j g_j(x_t) A_j(x)_t. The gates depend on the query token t. Every expert A_j attends over all tokens
up to t, with its own keys and values or with keys and values that all experts share. E experts of h heads are
implemented as E h heads, which are multiplied by their gates before one output projection. Caches, kernels and
shardings therefore work as for plain attention.

Shapes: B batch, T length, D width, E experts, K key/value heads, G query heads for each, H head dim. Heads are in
the order [E, K, G] where experts have keys and values of their own, and [K, E, G] where they share them.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import NonNegative, Size, recordable, refuse_set
from espalier.model.attention import Attention
from espalier.model.like import like
from espalier.model.linear import Dense
from espalier.model.moe import routing
from espalier.model.protocol import AttentionSettings
from espalier.model.transforms.experts import ExpertAxis


@recordable
class MixtureOfAttention(Attention):
    """Attention experts with their own router.

    The fields of `Attention` describe one expert; `config` has the number of heads of one expert. The gates of all
    experts are sown as `router_probs` [B, T, E] into the collection 'intermediates', and statistics into 'metrics'.

    Attributes:
      num_experts: E.
      top_k: the number of experts that a token mixes, weighted by their probabilities; None for all experts (soft
        routing).
      shared_kv: whether all experts share one set of keys and values; the cache is then as large as a dense model's.
      router: factory of the router's projection, computed in float32.
      balance_loss: weight of routing.balance_loss, for `top_k`.

    Raises:
      ValueError: `top_k` is larger than the number of experts, `balance_loss` without it, or norms over all heads.
    """

    num_experts: Size = 4
    top_k: Size | None = None
    shared_kv: bool = False
    router: routing.Router = Dense
    balance_loss: NonNegative = 0.0

    def __post_init__(self):
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"MixtureOfAttention.top_k = {self.top_k} must lie between 1 and num_experts = "
                f"{self.num_experts}; None mixes all."
            )
        if self.top_k is None:
            refuse_set(self, ("balance_loss",), "top_k = None, which loads all experts alike")
        if self.qk_norm_of == "projection":
            raise ValueError(
                "MixtureOfAttention.qk_norm_of = 'projection' would norm the heads of all experts as one: use 'head'."
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
        """Counts all experts: queries, keys and values of all experts are computed whatever `top_k` is."""
        own = {name: shapes[name] for name in shapes if name != "router"}
        router = routing.router_of(self).flops_per_token(shapes["router"], length=length)
        return router + super().flops_per_token(own, length=length)

    def gate_heads(
        self, heads_BTNH: jax.Array, x_BTD: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        """Multiplies each head by the gate of its expert."""
        gates_BTE = self._gates(x_BTD, segments_BT).astype(heads_BTNH.dtype)
        # The number of adjacent heads with the same gate.
        inner = self.config.num_heads // self.config.kv_heads
        outer = self.config.kv_heads
        if not self.shared_kv:
            inner, outer = inner * outer, 1
        gates_BTN = jnp.tile(jnp.repeat(gates_BTE, inner, axis=-1), outer)
        return heads_BTNH * gates_BTN[..., None]

    def _gates(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """Returns each token's expert weights [B, T, E], float32; 0 for experts that it does not use."""
        probs_BTE = routing.scored(self, x_BTD).probs_ME
        routes = routing.route(probs_BTE, top_k=self.top_k or self.num_experts, renormalise=False)
        real_BT = routing.real_tokens(x_BTD, segments_BT)
        routing.report(self, probs_BTE, routes.experts_MK, real_BT)
        if self.top_k is None:
            return probs_BTE
        chosen_BTE = jax.nn.one_hot(routes.experts_MK, self.num_experts).sum(-2)
        return probs_BTE * chosen_BTE


@recordable
def experts_of(
    *,
    attention: Callable[..., Any] = Attention,
    moa: Callable[..., MixtureOfAttention] = MixtureOfAttention,
) -> Callable[..., MixtureOfAttention]:
    """Returns an `attention` factory that makes mixtures of attention experts.

    Args:
      attention: factory of one expert; the mixture uses the expert's settings.
      moa: factory of the mixture, called with these settings.

    Raises:
      ValueError: (raised by the returned factory) `attention` makes a class other than `Attention`.
    """
    return like(attention, moa, of=Attention)


_HEADS = r"(.*/)?attention/(query|key|value|out)/(kernel|bias)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionExperts:
    """A `model.transforms.experts.AttentionExperts` in the order of heads of a MixtureOfAttention.

    Attributes:
      kv_heads: K.
      shared_kv: whether experts share keys and values, which are the mean of all models.
      averaged: see the protocol.
    """

    kv_heads: int
    shared_kv: bool = False
    averaged: bool = False

    def axis(self, path: str) -> ExpertAxis | None:
        match = re.fullmatch(_HEADS, path)
        if match is None:
            return None
        # By expert, or by key/value head if experts share these.
        name, kind = match[2], match[3]
        groups = self.kv_heads if self.shared_kv else 1
        if name == "out":
            return ExpertAxis(-2, groups) if kind == "kernel" else None  # one bias is added once
        return None if self.shared_kv and name in ("key", "value") else ExpertAxis(-1, groups)
