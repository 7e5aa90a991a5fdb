"""Storage shared by the cache policies: slots for tokens, filled in order or as a ring.

Keys and values are stored by head, [B, K, S, H], so that attention's products read them in order. In
the order [B, S, K, H] they would be transposed for every new token.

Shapes: B batch, T new tokens, S slots, C slots chosen, K key/value heads, X 1 or K, H head dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.kv_cache.base import KeyValues

_INT8_MAX = 127.0
_VALUES = ("k_BKSH", "v_BKSH", "k_scale_BKS", "v_scale_BKS")  # fields of `Slots`


@flax.struct.dataclass
class Slots:
    """Keys and values; the next token of every row goes to slot `at`, whatever its position.

    Attributes:
      k_BKSH, v_BKSH: rotated keys, and values.
      positions_BXS: positions of the tokens, -1 for empty slots; X = 1 if all heads hold the same tokens.
      at: index of the next slot, scalar.
      k_scale_BKS, v_scale_BKS: factors on int8 keys and values; None for floats.
      ring: index of the first slot of the ring; after the last slot, this slot is overwritten. None
        without a ring: the caller has reserved slots for all tokens.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BXS: jax.Array
    at: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None
    ring: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def length(self) -> int:
        return self.k_BKSH.shape[2]

    def put(self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "Slots":
        """Returns the slots with T tokens added.

        Raises:
          ValueError: T > 1 with a ring. The last tokens would overwrite tokens that the first still sees. Or T exceeds the
            empty slots; compiled code, which does not know `at`, overwrites the last slots then.
        """
        T = k_BTKH.shape[1]
        if self.ring is None:
            used = 0 if isinstance(self.at, jax.core.Tracer) else int(self.at)
            if used + T > self.length:
                raise ValueError(
                    f"A cache of {self.length} slots with {self.length - used} empty ones takes no {T} tokens more: compress "
                    "it with a larger `length`, or read all tokens again into an empty one."
                )
        if self.ring is not None and T != 1:
            raise ValueError(
                f"A cache of a fixed number of slots takes one token at a time after the prompt, "
                f"not {T}: read prompts whole or in chunks before compressing, or use the policy "
                "'full' on layers without a window."
            )
        k_BKTH, k_scale_BKT = self._encode(k_BTKH)
        v_BKTH, v_scale_BKT = self._encode(v_BTKH)
        positions_BXT = jnp.broadcast_to(
            positions_BT.astype(jnp.int32)[:, None],
            (positions_BT.shape[0], self.positions_BXS.shape[1], T),
        )

        at = functools.partial(_put, at=self.at)
        after = self.at + T
        if self.ring is not None:
            after = jnp.where(after == self.length, self.ring, after)
        return dataclasses.replace(
            self,
            k_BKSH=at(self.k_BKSH, k_BKTH),
            v_BKSH=at(self.v_BKSH, v_BKTH),
            positions_BXS=at(self.positions_BXS, positions_BXT),
            k_scale_BKS=jax.tree.map(at, self.k_scale_BKS, k_scale_BKT),
            v_scale_BKS=jax.tree.map(at, self.v_scale_BKS, v_scale_BKT),
            at=after,
        )

    def with_first_keys(self, k_BPKH: jax.Array, positions_BXP: jax.Array) -> "Slots":
        """Returns the slots with new keys and positions in the first P slots."""
        first = functools.partial(_put, at=0)
        k_BKPH, k_scale_BKP = self._encode(k_BPKH)
        return dataclasses.replace(
            self,
            k_BKSH=first(self.k_BKSH, k_BKPH),
            positions_BXS=first(self.positions_BXS, positions_BXP),
            k_scale_BKS=jax.tree.map(first, self.k_scale_BKS, k_scale_BKP),
        )

    def _encode(self, x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns keys or values in the layout and dtype of the slots, and their scales or None."""
        x_BKTH = x_BTKH.swapaxes(1, 2)
        if self.k_scale_BKS is not None:
            return quantise(x_BKTH)
        return x_BKTH.astype(self.k_BKSH.dtype), None

    def take(self, index_BXC: jax.Array) -> "Slots":
        """Returns the slots at these indices; X = 1 uses the same indices for all heads."""
        return dataclasses.replace(
            self,
            k_BKSH=jnp.take_along_axis(self.k_BKSH, index_BXC[..., None], axis=2),
            v_BKSH=jnp.take_along_axis(self.v_BKSH, index_BXC[..., None], axis=2),
            positions_BXS=jnp.take_along_axis(self.positions_BXS, index_BXC, axis=2),
            at=jnp.asarray(index_BXC.shape[2], jnp.int32),
        ).constrained()

    def with_room(self, length: int) -> "Slots":
        """Returns the slots with `length` more empty slots at the end."""

        def pad(x: jax.Array, value: int = 0) -> jax.Array:
            after = [(0, length if axis == 2 else 0) for axis in range(x.ndim)]
            return jnp.pad(x, after, constant_values=value)

        return self._each(pad, pad(self.positions_BXS, -1))

    def with_row(self, row: jax.Array | int, other: "Slots", length: jax.Array | int) -> "Slots":
        """Returns the ring with the first row of `other` as its row `row`; the next slot of all rows stays the same.

        Args:
          other: slots of the same dtype in the order of the tokens, of which the first row has `length`. Of these, the last
            that fit are put before slot `at`, so that they are the last to be overwritten.
        """
        size = min(self.length, other.length)
        first = jnp.maximum(length - self.length, 0)
        shift = self.at - jnp.minimum(length, self.length)

        def put(held: jax.Array, new: jax.Array, fill: int = 0) -> jax.Array:
            new = jax.lax.dynamic_slice_in_dim(new[0], first, size, axis=1)
            after = [(0, self.length - size if axis == 1 else 0) for axis in range(new.ndim)]
            new = jnp.roll(jnp.pad(new, after, constant_values=fill), shift, axis=1)
            return held.at[row].set(new)

        arrays = {
            name: jax.tree.map(put, getattr(self, name), getattr(other, name)) for name in _VALUES
        }
        positions_BXS = put(self.positions_BXS, other.positions_BXS, -1)
        return dataclasses.replace(self, positions_BXS=positions_BXS, **arrays).constrained()

    def resized(self, rows_R: jax.Array, length: int) -> "Slots":
        """Returns the ring with the rows at these indices, and `length` slots: those of the latest tokens, or empty ones too."""
        more = max(length - self.length, 0)

        def fit(x: jax.Array, fill: int = 0) -> jax.Array:
            x = jnp.roll(x[rows_R], -self.at, axis=2)[:, :, -length:]  # the oldest first
            after = [(0, more if axis == 2 else 0) for axis in range(x.ndim)]
            return jnp.pad(x, after, constant_values=fill)

        at = jnp.asarray(self.length if more else 0, jnp.int32)
        fitted = self._each(fit, fit(self.positions_BXS, -1))
        return dataclasses.replace(fitted, at=at).constrained()

    def stored_as(self, dtype: Any) -> "Slots":
        """Returns the slots with keys and values as int8 or another float type; None changes nothing."""
        if dtype is None or jnp.dtype(dtype) == self.k_BKSH.dtype:
            return self
        k_BKSH, k_scale_BKS = stored_as(self.k_BKSH, dtype)
        v_BKSH, v_scale_BKS = stored_as(self.v_BKSH, dtype)
        return dataclasses.replace(
            self, k_BKSH=k_BKSH, v_BKSH=v_BKSH, k_scale_BKS=k_scale_BKS, v_scale_BKS=v_scale_BKS
        ).constrained()

    def constrained(self) -> "Slots":
        """Returns the slots with their sharding constrained: split over rows and key/value heads."""
        # Slots that all heads share (AdaKV) are replicated.
        heads = axes.ACT_KV_HEADS if self.k_BKSH.shape[1] > 1 else None
        own = heads if self.positions_BXS.shape[1] > 1 else None

        def split(x: jax.Array, heads: str | None = heads) -> jax.Array:
            return axes.constrain(x, axes.BATCH, heads, *[None] * (x.ndim - 2))

        return self._each(split, split(self.positions_BXS, own))

    def _each(self, change: Callable[[Any], Any], positions_BXS: jax.Array) -> "Slots":
        """Returns the slots with other positions, and changed keys, values and scales."""
        arrays = {name: jax.tree.map(change, getattr(self, name)) for name in _VALUES}
        return dataclasses.replace(self, positions_BXS=positions_BXS, **arrays)

    def view(self) -> KeyValues:
        """Returns the keys and values for attention; XLA fuses the transposition into its products."""

        def by_token(x: jax.Array) -> jax.Array:
            return x.swapaxes(1, 2)

        shared = self.positions_BXS.shape[1] == 1
        return KeyValues(
            k_BSKH=by_token(self.k_BKSH),
            v_BSKH=by_token(self.v_BKSH),
            positions_BS=self.positions_BXS[:, 0] if shared else self.positions_BXS,
            k_scale_BSK=jax.tree.map(by_token, self.k_scale_BKS),
            v_scale_BSK=jax.tree.map(by_token, self.v_scale_BKS),
        )


def empty(shape_BKSH: tuple[int, int, int, int], dtype: Any) -> Slots:
    """Returns empty slots in which all heads hold the same tokens."""
    B, _, S, _ = shape_BKSH
    return Slots(
        k_BKSH=jnp.zeros(shape_BKSH, dtype),
        v_BKSH=jnp.zeros(shape_BKSH, dtype),
        positions_BXS=jnp.full((B, 1, S), -1, jnp.int32),
        at=jnp.zeros((), jnp.int32),
    ).constrained()


def _put(held: jax.Array, new: jax.Array, at: jax.Array | int) -> jax.Array:
    """Returns `held` [B, K or X, S, ...] with `new` written from slot `at` on.

    The update is computed without axes of size 1, as `carried` arrays have none.
    """
    ones = _ones(held)
    written = jax.lax.dynamic_update_slice_in_dim(
        held.squeeze(ones), new.squeeze(ones), at, axis=2 - len(ones)
    )
    return written.reshape(held.shape)


def carried(caches: Any) -> Any:
    """Returns caches without the axes of a single row or head, as the carry of a loop over tokens.

    XLA drops axes of size 1 in products. On CPUs it would merge this reshape into the update of the
    cache, and so copy the cache.
    """
    return jax.tree.map(lambda x: x.squeeze(_ones(x)), caches)


def restored(caches: Any, like: Any) -> Any:
    """Inverts `carried`: returns caches with the shapes of `like`."""
    return jax.tree.map(lambda x, y: x.reshape(y.shape), caches, like)


def _ones(x: jax.Array) -> tuple[int, ...]:
    return tuple(axis for axis in range(min(2, x.ndim - 1)) if x.shape[axis] == 1)


def stored_as(x_BKSH: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Returns keys or values as int8, with their scales [B, K, S], or as another float type without scales.

    Raises:
      ValueError: a dtype that is neither int8 nor a float type.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.int8:
        return quantise(x_BKSH)
    if jnp.issubdtype(dtype, jnp.floating):
        return x_BKSH.astype(dtype), None
    raise ValueError(f"cache dtype = {dtype.name!r}: use int8, a float dtype or None.")


def quantise(x_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns int8 values and float32 scales [B, K, S]: |x - value * scale| <= scale / 2 = max|x| / 254."""
    x_BKSH = x_BKSH.astype(jnp.float32)
    scale_BKS = jnp.abs(x_BKSH).max(-1) / _INT8_MAX
    divisor_BKS = jnp.where(scale_BKS > 0, scale_BKS, 1.0)
    return jnp.round(x_BKSH / divisor_BKS[..., None]).astype(jnp.int8), scale_BKS


def latest(positions_BS: jax.Array, count: int) -> jax.Array:
    """Returns the slot indices [B, count] of the latest tokens of every row, in order of position."""
    return jnp.flip(jax.lax.top_k(positions_BS, count)[1], axis=-1)
