"""Runs an attention kernel on every device's own rows and heads.

XLA cannot partition a loop over heads or a Pallas call. On a mesh of several devices the kernel therefore
runs inside `shard_map`: the active logical rules split batch and heads, and nothing is gathered.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from espalier.model import axes


def placement(q_shape, k_shape) -> tuple[PartitionSpec, PartitionSpec] | None:
    """Returns the partition specs of queries and keys over batch and heads.

    The result is None if batch or heads do not divide evenly over the mesh, or if the length is split.
    Both specs are empty outside a mesh, on a mesh of one device, and inside a `shard_map`, where the
    arrays are already local.
    """
    free = axes.free_mesh_axes()
    if not free:
        return PartitionSpec(), PartitionSpec()
    rules = nn.get_logical_axis_rules()
    if not rules:
        return None
    q_axes, k_axes = (
        _within(nn.logical_to_mesh_axes((axes.BATCH, axes.INNER_LENGTH, heads), rules), free)
        for heads in (axes.ACT_HEADS, axes.ACT_KV_HEADS)
    )
    if q_axes[1] or k_axes[1]:
        return None  # the length is split
    if q_axes[2] != k_axes[2] and k_shape[2] > 1:
        return None  # a device would have query heads without their key/value head
    for dims, shape in ((q_axes, q_shape), (k_axes, k_shape)):
        if any(shape[i] % math.prod(free[name] for name in dims[i]) for i in (0, 2)):
            return None
    return PartitionSpec(*q_axes), PartitionSpec(*k_axes)


def _within(spec: Any, free: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Returns the mesh axes of every dimension; axes that are not in `free` are dropped."""
    entries = ((part,) if isinstance(part, str) else part or () for part in spec or ())
    return [tuple(name for name in part if name in free) for part in entries]


def per_device(
    kernel: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """Returns kernel(q, k, v, q_segments, kv_segments, **options), computed on local shards.

    Raises:
      ValueError: batch or heads do not divide over the mesh, or the length is split.
    """
    specs = placement(q_BTNH.shape, k_BSKH.shape)
    if specs is None:
        raise ValueError(
            "This attention implementation needs batch and heads divided evenly over the mesh by the "
            "active logical axis rules, and whole rows: use 'auto' or 'xla'."
        )

    def local(q_BTNH, k_BSKH, v_BSKH, *segments):
        return kernel(q_BTNH, k_BSKH, v_BSKH, *(segments or (None, None)), **options)

    segments = () if q_segments_BT is None else (q_segments_BT, kv_segments_BS)
    q_spec, k_spec = specs
    if not len(q_spec):
        return local(q_BTNH, k_BSKH, v_BSKH, *segments)
    rows = (PartitionSpec(q_spec[0]),) * len(segments)
    mapped = jax.shard_map(
        local, in_specs=(q_spec, k_spec, k_spec, *rows), out_specs=q_spec, check_vma=False
    )
    return mapped(q_BTNH, k_BSKH, v_BSKH, *segments)
