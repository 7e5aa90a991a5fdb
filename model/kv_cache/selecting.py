"""Policies that keep the best tokens of a prompt and all generated tokens.

Tokens are selected once, after the whole prompt. Selected keys and generated tokens have their true
positions; nothing is renumbered. A row with fewer tokens than the capacity keeps all of them.

Shapes: B batch, T new tokens, W observed queries, S slots, N query heads, K key/value heads, G query heads
of each, X 1 or K, H head dim.
"""

import dataclasses
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model.kv_cache import scores, slots
from espalier.model.kv_cache.full import FullCache, Reading, check_positive
from espalier.model.kv_cache.scores import GroupVote
from espalier.model.kv_cache.slots import Slots


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
        held = state.slots.take(scores.best(self.scores(state), budget))
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
class Tova(Selecting):
    """TOVA (arXiv 2401.06104): keeps the last token, and the tokens that it attends to most on average.

    The average is over all heads. The paper also evicts tokens during generation; here only the prompt is
    compressed.
    """

    @property
    def observed(self) -> int:
        return 1

    def scores(self, state: Reading) -> jax.Array:
        seen = state.evidence
        votes_BKGS = scores.votes(seen.q_BWNH, seen.positions_BW, state.slots, state.known_form)
        return scores.ranked(votes_BKGS.mean((1, 2))[:, None], state.positions_BS, window=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Selecting):
    """H2O (arXiv 2306.14048): keeps recent tokens, and those with the most attention of all queries.

    The paper also evicts one token for every new one. Here generated tokens are not evicted, as in
    comparisons with SnapKV. Attention is recomputed for a block of queries at a time.

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
        return state.evidence + scores.votes(q_BTNH, positions_BT, state.slots, state.known_form)

    def scores(self, state: Reading) -> jax.Array:
        votes_BKS = scores.of_group(state.evidence, self.group_vote)
        window = self.capacity // 2 if self.window is None else self.window
        return scores.ranked(votes_BKS, state.positions_BS, window)


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
        return scores.ranked(drawn_BSK.swapaxes(1, 2), state.positions_BS, self.window)


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
        votes_BKGS = scores.votes(seen.q_BWNH, seen.positions_BW, held, state.known_form)
        future_BS = scores.recent(state.positions_BS, self.future)
        held = dataclasses.replace(
            held, positions_BXS=jnp.where(future_BS[:, None], -1, held.positions_BXS)
        )
        state = dataclasses.replace(state, slots=held, evidence=votes_BKGS)
        return super().compress(state, length=length, dtype=dtype)

    def scores(self, state: Reading) -> jax.Array:
        return scores.ranked(scores.of_group(state.evidence, "mean"), state.positions_BS, window=0)
