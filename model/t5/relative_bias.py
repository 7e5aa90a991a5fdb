"""T5's relative position bias: a learned number per head and bucket of distances, added to attention's logits.

Half of the buckets of a direction are exact distances; the others grow logarithmically up to `max_distance`, and the
last holds all larger distances (Raffel et al., arXiv 1910.10683, section 2.1).

Shapes: B batch, T query length, S key length, N heads, X buckets, Y 1, or heads with keys of their own.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import Size, recordable
from espalier.model import axes


@flax.struct.dataclass
class PositionBias:
    """The bias of one stack, which all of its layers share; see model/attention.py.

    Attributes:
      by_index_1NTS: bias of rows whose tokens have adjacent positions, also of packed rows: a document's tokens are
        adjacent, and documents do not see each other.
      table_XN: the bias of each bucket.
      buckets: bucket of key position minus query position, an array of `reach` + 1 distances to each side.
    """

    by_index_1NTS: jax.Array
    table_XN: jax.Array
    buckets: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def at(self, q_positions_BT: jax.Array, kv_positions_BS: jax.Array) -> jax.Array:
        """Returns the bias [B, N, T, S] between positions; kv_positions is [B, S] or [B, Y, S], see attention_ops."""
        kv_positions_BYS = kv_positions_BS.reshape(
            len(kv_positions_BS), -1, kv_positions_BS.shape[-1]
        )
        difference_BYTS = kv_positions_BYS[:, :, None] - q_positions_BT[:, None, :, None]
        bucket_BYTS = bucket_of(difference_BYTS, self.buckets)
        heads = self.table_XN.shape[1]
        bucket_BNTS = jnp.repeat(bucket_BYTS, heads // bucket_BYTS.shape[1], axis=1)
        return self.table_XN.T[jnp.arange(heads).reshape(1, -1, 1, 1), bucket_BNTS]


@recordable
class RelativeBias(nn.Module):
    """The table of a stack.

    Attributes:
      num_heads: N.
      bidirectional: whether keys after the query have buckets of their own (encoders), half of all.
      num_buckets: X.
      max_distance: distance from which on all distances share a bucket.

    Raises:
      ValueError: too few buckets, or a `max_distance` that the exact buckets reach.
    """

    num_heads: Size
    bidirectional: bool
    num_buckets: Size = 32
    max_distance: Size = 128
    embedding_init: Callable = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, length: int, key_length: int) -> PositionBias:
        buckets = bucket_table(
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        shape, names = (self.num_buckets, self.num_heads), (axes.UNMODELED, axes.HEADS)
        table_XN = axes.parameter(
            self, "embedding", self.embedding_init, names, shape, self.param_dtype
        ).astype(self.dtype)
        return PositionBias(
            by_index_1NTS=_by_index(table_XN, buckets, length, key_length),
            table_XN=table_XN,
            buckets=buckets,
        )


def bucket_table(*, bidirectional: bool, num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Returns the buckets of key position minus query position, from -max_distance to max_distance.

    Raises:
      ValueError: see `RelativeBias`.
    """
    per_side = num_buckets // 2 if bidirectional else num_buckets
    exact = per_side // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"RelativeBias: {per_side} buckets for a direction, {exact} of them exact, do not fit max_distance = "
            f"{max_distance}: num_buckets must be at least {4 if bidirectional else 2}, and max_distance above the "
            "exact buckets."
        )

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        # The small number makes whole numbers of powers of two, which rounding may leave just below.
        share = math.log(distance / exact) / math.log(max_distance / exact) + 1e-9
        return min(exact + int(share * (per_side - exact)), per_side - 1)

    before = [bucket(distance) for distance in range(max_distance, -1, -1)]
    after = [per_side + bucket(d) if bidirectional else 0 for d in range(1, max_distance + 1)]
    return tuple(before + after)


def bucket_of(difference: jax.Array, buckets: tuple[int, ...]) -> jax.Array:
    """Returns the buckets of key positions minus query positions, of any shape."""
    reach = len(buckets) // 2
    return jnp.asarray(buckets, jnp.int32)[jnp.clip(difference, -reach, reach) + reach]


def _by_index(table_XN: jax.Array, buckets: tuple[int, ...], T: int, S: int) -> jax.Array:
    """Returns the bias [1, N, T, S] between indices of queries and keys.

    It depends only on the difference j - i. Row i is therefore a window of one list of all differences, which is
    repeated and cut so that each row begins one place further left. Neither this nor its gradient gathers T * S numbers.
    """
    # Differences 0, ..., S - 1, one that no row reads, and -(T - 1), ..., -1: read from place -i on, cyclically.
    difference = np.arange(T + S)
    difference = np.where(difference < S, difference, difference - (T + S))
    bias_NW = table_XN.T[:, bucket_of(jnp.asarray(difference), buckets)]
    heads = len(bias_NW)
    rows_NTW = jnp.tile(bias_NW, (1, T))[:, : T * (T + S - 1)].reshape(heads, T, T + S - 1)
    bias_1NTS = rows_NTW[None, :, :, :S]
    return axes.constrain(bias_1NTS, None, axes.ACT_HEADS, None, None)
