"""Policies that keep the best tokens of a prompt and all generated tokens, and the scores that say which are best.

Tokens are selected once, after the whole prompt. Selected keys and generated tokens have their true
positions; nothing is renumbered. A row with fewer tokens than the capacity keeps all of them.

Scores are of keys by the attention of some queries, pure functions in float32.

Shapes: B batch, T new tokens or queries, W observed queries, S slots, C slots chosen, N query heads, K key/value
heads, G = N / K query heads of each, X heads that choose their own slots (1 or K), H head dim.
"""

import dataclasses
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model.kernels.attention_ops import received_attention
from espalier.model.kv_cache import slots
from espalier.model.kv_cache.base import AttentionForm
from espalier.model.kv_cache.full import FullCache, Reading, check_positive
from espalier.model.kv_cache.slots import Slots

Pooling = Literal["max", "average"]
GroupVote = Literal["mean", "max"]

# Number of queries whose attention weights are in memory at a time. With few queries the weights stay in a
# CPU's caches: of 8, 16 and 32 this is the fastest at 16,384 keys, and 64 take several times as long.
_BLOCK = 16


def votes(
    q_BTNH: jax.Array, positions_BT: jax.Array, held: Slots, form: AttentionForm
) -> jax.Array:
    """Returns the attention [B, K, G, S] that each slot receives, summed over the queries.

    The weights are the layer's attention weights: a softmax over all keys that a query sees. The sum is
    computed for some queries at a time. Queries at position -1 do not count.
    """

    def received(q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        seen = held.view()  # inside the loop: outside it the transposition would be a copy
        return received_attention(
            q_BTNH,
            seen.k_BSKH,
            q_positions_BT=positions_BT,
            kv_positions_BS=seen.positions_BS,
            **form.arguments(),
        )

    B, T, N, _ = q_BTNH.shape
    blocks = -(-T // _BLOCK)
    if blocks == 1:
        return received(q_BTNH, positions_BT)
    more = blocks * _BLOCK - T
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, more), (0, 0), (0, 0)))
    positions_BT = jnp.pad(positions_BT, ((0, 0), (0, more)), constant_values=-1)

    def add(i: jax.Array, total_BKGS: jax.Array) -> jax.Array:
        q_BUNH, positions_BU = (
            jax.lax.dynamic_slice_in_dim(x, i * _BLOCK, _BLOCK, axis=1)
            for x in (q_BTNH, positions_BT)
        )
        return total_BKGS + received(q_BUNH, positions_BU)

    K, S = held.k_BKSH.shape[1:3]
    return jax.lax.fori_loop(0, blocks, add, jnp.zeros((B, K, N // K, S), jnp.float32))


def of_group(votes_BKGS: jax.Array, group_vote: GroupVote) -> jax.Array:
    """Returns one vote [B, K, S] per key/value head, from the query heads that share it."""
    return votes_BKGS.mean(2) if group_vote == "mean" else votes_BKGS.max(2)


def pooled(
    votes_BXS: jax.Array, eligible_BS: jax.Array, kernel: int, pooling: Pooling
) -> jax.Array:
    """Pools votes along slots with stride 1, so that neighbouring tokens are kept together.

    Ineligible slots do not raise their neighbours' votes: they count as -inf in a maximum and as zero in
    an average. An average divides by the kernel size also at the edges (arXiv 2404.14469, listing 1). The
    results at ineligible slots are undefined.
    """
    outside = -jnp.inf if pooling == "max" else 0.0
    combine = jax.lax.max if pooling == "max" else jax.lax.add
    inside_BXS = jnp.where(eligible_BS[:, None], votes_BXS, outside)
    half = kernel // 2
    out_BXS = jax.lax.reduce_window(
        inside_BXS,
        jnp.asarray(outside, votes_BXS.dtype),
        combine,
        window_dimensions=(1, 1, kernel),
        window_strides=(1, 1, 1),
        padding=((0, 0), (0, 0), (half, half)),
    )
    return out_BXS if pooling == "max" else out_BXS / kernel


def recent(positions_BS: jax.Array, window: int) -> jax.Array:
    """Returns True [B, S] for the last `window` tokens of every row."""
    last_B1 = positions_BS.max(1, keepdims=True)
    return (positions_BS >= 0) & (positions_BS > last_B1 - window)


def ranked(scores_BXS: jax.Array, positions_BS: jax.Array, window: int) -> jax.Array:
    """Returns scores that rank the last `window` tokens of a row first and empty slots last."""
    recent_BS, real_BS = recent(positions_BS, window), positions_BS >= 0
    scores_BXS = jnp.where(recent_BS[:, None], jnp.inf, scores_BXS)
    return jnp.where(real_BS[:, None], scores_BXS, -jnp.inf)


def best(scores_BXS: jax.Array, count: int) -> jax.Array:
    """Returns the indices [B, X, C] of the `count` highest scores, ascending; ties go to the first."""
    return jnp.sort(jax.lax.top_k(scores_BXS, count)[1], axis=-1)


@flax.struct.dataclass
class Observed:
    """The last W queries of every row, right-aligned; position -1 where a row has fewer."""

    q_BWNH: jax.Array
    positions_BW: jax.Array

    @classmethod
    def none(cls, held: Slots, num_heads: int, count: int) -> "Observed":
        batch, _, _, head_dim = held.k_BKSH.shape
        return cls(
            q_BWNH=jnp.zeros((batch, count, num_heads, head_dim), held.k_BKSH.dtype),
            positions_BW=jnp.full((batch, count), -1, jnp.int32),
        )

    def then(self, q_BTNH: jax.Array, positions_BT: jax.Array) -> "Observed":
        """Returns the last W queries after T more queries."""
        q_BUNH = jnp.concatenate([self.q_BWNH, q_BTNH.astype(self.q_BWNH.dtype)], axis=1)
        positions_BU = jnp.concatenate([self.positions_BW, positions_BT.astype(jnp.int32)], axis=1)
        index_BW = slots.latest(positions_BU, self.positions_BW.shape[1])
        return Observed(
            q_BWNH=jnp.take_along_axis(q_BUNH, index_BW[:, :, None, None], axis=1),
            positions_BW=jnp.take_along_axis(positions_BU, index_BW, axis=1),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selecting(FullCache):
    """Keeps `capacity` tokens of a prompt in every layer.

    Attributes:
      capacity: slots per key/value head for the prompt, including recent tokens.
    """

    capacity: int = 1024

    def __post_init__(self):
        check_positive(self, "capacity")

    def most(self, state: Reading) -> int:
        return self.capacity

    def no_evidence(self, held: Slots, num_heads: int) -> Any:
        return Observed.none(held, num_heads, self.observed) if self.observed else None

    def observe(self, state: Reading, q_BTNH: jax.Array, positions_BT: jax.Array) -> Any:
        return state.evidence.then(q_BTNH, positions_BT) if self.observed else None

    def keep(self, state: Reading, *, length: int, dtype: Any) -> Any:
        budget = self.most(state)
        if budget >= state.slots.length:
            return super().keep(state, length=length, dtype=dtype)
        return self.chosen(state, budget, length=length, dtype=dtype)

    def chosen(self, state: Reading, budget: int, *, length: int, dtype: Any) -> Any:
        """Returns the slots of the best `budget` tokens of each head."""
        held = state.slots.take(best(self.scores(state), budget))
        return held.stored_as(dtype).with_room(length).constrained()

    # Members that policies override.

    @property
    def observed(self) -> int:
        """The number of last queries that `scores` needs in state.evidence."""
        return 0

    def scores(self, state: Reading) -> jax.Array:
        """Returns scores [B, X, S], -inf for empty slots; the slots with the highest scores are kept."""
        raise NotImplementedError


def check_window(capacity: int, window: int) -> None:
    """Raises ValueError unless 1 <= window < capacity."""
    if not 1 <= window < capacity:
        raise ValueError(f"window = {window} must be at least 1 and below capacity = {capacity}")


def check_choice(policy: Any, name: str, choices: Any) -> None:
    """Raises ValueError unless the setting `name` of a policy is in the Literal `choices`."""
    if (value := getattr(policy, name)) not in get_args(choices):
        raise ValueError(f"{name} = {value!r} must be one of {get_args(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voted(Selecting):
    """Keeps the last tokens of a prompt, and the earlier ones with the most votes, pooled along the prompt.

    Attributes:
      kernel: odd width of the pooling; 1 for none.
      pooling: 'max' or 'average'.
    """

    kernel: int = 1
    pooling: Pooling = "max"

    def __post_init__(self):
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel = {self.kernel} must be odd and positive")
        check_choice(self, "pooling", Pooling)

    def pooled_scores(self, votes_BXS: jax.Array, state: Reading, window: int) -> jax.Array:
        """Returns scores [B, X, S]; the last `window` tokens rank first, and lend no votes to their neighbours."""
        at_BS = state.positions_BS
        prefix_BS = (at_BS >= 0) & ~recent(at_BS, window)
        votes_BXS = pooled(votes_BXS, prefix_BS, self.kernel, self.pooling)
        return ranked(votes_BXS, at_BS, window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tova(Voted):
    """TOVA (arXiv 2401.06104): keeps the last token, and the tokens that it attends to most on average.

    The average is over all heads. The paper also evicts tokens during generation; here only the prompt is
    compressed. The paper does not pool: `kernel` and `pooling` are SnapKV's, to compare both at the same pooling.
    """

    @property
    def observed(self) -> int:
        return 1

    def scores(self, state: Reading) -> jax.Array:
        seen = state.evidence
        votes_BKGS = votes(seen.q_BWNH, seen.positions_BW, state.slots, state.known_form)
        return self.pooled_scores(votes_BKGS.mean((1, 2))[:, None], state, window=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Voted):
    """H2O (arXiv 2306.14048): keeps recent tokens, and those with the most attention of all queries.

    The paper also evicts one token for every new one. Here generated tokens are not evicted, as in
    comparisons with SnapKV. Attention is recomputed for a block of queries at a time. The paper does not
    pool: `kernel` and `pooling` are SnapKV's, to compare both at the same pooling.

    Attributes:
      window: number of recent tokens, which are always kept; None for half the capacity, as in the paper.
      group_vote: 'mean' or 'max' over the query heads of a key/value head.
    """

    window: int | None = None
    group_vote: GroupVote = "mean"

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None:
            check_window(self.capacity, self.window)
        check_choice(self, "group_vote", GroupVote)

    def no_evidence(self, held: Slots, num_heads: int) -> jax.Array:
        B, K, S, _ = held.k_BKSH.shape
        return jnp.zeros((B, K, num_heads // K, S), jnp.float32)

    def observe(self, state: Reading, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return state.evidence + votes(q_BTNH, positions_BT, state.slots, state.known_form)

    def scores(self, state: Reading) -> jax.Array:
        votes_BKS = of_group(state.evidence, self.group_vote)
        window = self.capacity // 2 if self.window is None else self.window
        return self.pooled_scores(votes_BKS, state, window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Selecting):
    """Keeps the last `window` tokens and random earlier tokens: a baseline that any method must beat.

    The choice depends only on seed, layer, head and position, not on the batch or on padding.

    Attributes:
      window: number of last tokens, which are always kept.
      seed: seed of the random choice.
    """

    window: int = 32
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_window(self.capacity, self.window)

    def scores(self, state: Reading) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.seed), state.layer)
        heads = (state.slots.k_BKSH.shape[1],)
        keys_BS = jax.vmap(jax.vmap(lambda at: jax.random.fold_in(key, at)))(
            jnp.maximum(state.positions_BS, 0)
        )
        drawn_BSK = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, heads)))(keys_BS)
        return ranked(drawn_BSK.swapaxes(1, 2), state.positions_BS, self.window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(Selecting):
    """Keeps the prompt's tokens that its known continuation attends to most; no real method knows these.

    The continuation is the last `future` tokens that are read. They vote and are then dropped. Decoding starts at
    their first position, `length - future`, from the logits after the token before it
    (trainers/decoding/prefill.py). Every row must have more than `future` tokens.

    Attributes:
      future: number of tokens of the continuation.
    """

    future: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "future")

    @property
    def observed(self) -> int:
        return self.future

    def compress(self, state: Reading, *, length: int, dtype: Any = None) -> Any:
        seen, held = state.evidence, state.slots
        votes_BKGS = votes(seen.q_BWNH, seen.positions_BW, held, state.known_form)
        future_BS = recent(state.positions_BS, self.future)
        held = dataclasses.replace(
            held, positions_BXS=jnp.where(future_BS[:, None], -1, held.positions_BXS)
        )
        state = dataclasses.replace(state, slots=held, evidence=votes_BKGS)
        return super().compress(state, length=length, dtype=dtype)

    def scores(self, state: Reading) -> jax.Array:
        return ranked(of_group(state.evidence, "mean"), state.positions_BS, window=0)
