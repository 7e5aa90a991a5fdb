"""Logical axis names, by which models describe the sharding of their arrays.

Parameters and activations are annotated with these names; a rule set (trainers/partitioning.py) maps
each name to mesh axes. Activations have their own names because they often shard differently from
parameters: FSDP splits a kernel's EMBED rows but not the width of the residual stream.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
from jax.sharding import AxisType

# Parameters.
VOCAB = "vocab"
EMBED = "embed"
HEADS = "heads"  # query heads x head dim, joined: one column block per head
KV_HEADS = "kv_heads"  # key/value heads x head dim, joined
HEAD_DIM = "head_dim"
MLP = "mlp"
NORM = "norm"  # of gains and biases: small, replicated, not decayed
POSITION = "position"  # rows of a learned position table
LAYERS = "layers"  # the axis nn.scan adds
EXPERT = "expert"  # stacked experts
CHANNELS = "channels"  # output channels of convolutions
# Input channels of convolutions; never split, because a name may occur only once in an array.
CHANNELS_IN = "channels_in"
RANK = "rank"  # inner dimension of a factorised kernel or adapter
CONTEXT = "context"  # width of what a layer reads of a whole row, which no rule set splits
UNMODELED = "unmodeled"  # small dimensions that no rule set splits
CONSTANT = "constant"  # rows of data stored among the parameters: see `constant`

PARAMETER_AXES = (
    *(VOCAB, EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, NORM, POSITION, LAYERS),
    *(EXPERT, CHANNELS, CHANNELS_IN, RANK, CONTEXT, UNMODELED, CONSTANT),
)

# Activations.
BATCH = "act_batch"
LOOKUP_BATCH = "act_lookup_batch"  # batch of looked-up rows, where EMBED splits their width
LENGTH = "act_length"
INNER_LENGTH = "act_inner_length"  # length inside attention and MLP, where heads or width are split
ACT_EMBED = "act_embed"
ACT_HEADS = "act_heads"
ACT_KV_HEADS = "act_kv_heads"
ACT_MLP = "act_mlp"

ACTIVATION_AXES = (
    *(BATCH, LOOKUP_BATCH, LENGTH, INNER_LENGTH),
    *(ACT_EMBED, ACT_HEADS, ACT_KV_HEADS, ACT_MLP),
)

ALL_AXES = PARAMETER_AXES + ACTIVATION_AXES

# Pairs of a logical name and the mesh axes that split it, one or several; None replicates.
Rules = tuple[tuple[str, Any], ...]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical names; a no-op outside a mesh.

    Raises:
      ValueError: a name has no rule while rules are active; a misspelt name would replicate silently.
    """
    rules = nn.get_logical_axis_rules()
    if not rules:
        return x
    known = {name for name, _ in rules}
    unknown = [name for name in names if name is not None and name not in known]
    if unknown:
        raise ValueError(
            f"Activation axes {unknown} have no rule in the active rule set {sorted(known)}: "
            "add a rule in trainers/partitioning.py or correct the name."
        )
    return nn.with_logical_constraint(x, names)


def free_mesh_axes() -> dict[str, int]:
    """Returns the sizes of the mesh axes over which arrays may be split, outside of any `shard_map`."""
    return {name: size for name, size in _mesh_axes().items() if size > 1}


def single_mesh_axes() -> set[str]:
    """Returns the mesh axes of one device, outside of any `shard_map`."""
    return {name for name, size in _mesh_axes().items() if size == 1}


def _mesh_axes() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """Returns a parameter of `module` whose dimensions have logical names."""
    boxed = nn.with_logical_partitioning(init, names)
    return unboxed(module.param(name, boxed, shape, dtype, unbox=False))


def constant(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """Returns an array [rows, ...] that is stored among the parameters of `module` but never trained.

    It has no gradient, and trainers/trainable.py excludes it from optimisers and weight decay.
    """
    names = (CONSTANT, *(UNMODELED,) * (len(shape) - 1))
    return jax.lax.stop_gradient(parameter(module, name, init, names, shape, dtype))


def is_boxed(leaf: Any) -> bool:
    """Returns whether a leaf is a flax box: an array with logical axis names."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def unboxed(value: Any) -> jax.Array:
    """Returns the array in a flax box, constrained to its sharding.

    An array with a rank axis is not constrained, because the mesh need not divide the rank.
    """
    if isinstance(value, nn.LogicallyPartitioned):
        return value.unbox(apply_constraint=RANK not in value.names)
    return cast(jax.Array, value)
