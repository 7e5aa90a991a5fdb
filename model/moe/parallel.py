"""Experts on a mesh: every device sorts its own tokens and sends rows to the devices of their experts.

Without this, XLA would gather all tokens to sort them. The logical rules say which mesh axes split tokens
(axes.BATCH), experts (axes.EXPERT) and the experts' hidden width (axes.MLP). An axis that splits experts must also split
tokens; outside of the experts it is a data-parallel axis (GShard, arXiv 2006.16668). Devices that split the hidden width
have the same tokens, each computes with its slice of every expert, and their results are summed.

`mixed` does it all in one `shard_map`. Where other modules work on the rows, they stay between `send` and `collect` on
the devices of their experts, and `per_device` multiplies them.

Shapes: B batch, T length, D width, F hidden width, K experts per token, E experts; G devices over which tokens are split;
P devices, with E / P experts each, that exchange rows; N devices that split the hidden width; C choices and R rows of a
device; S rows that a device can send to one other device; X in and Y out of a product. Lower-case letters are a device's
part of a dimension.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from espalier.model import axes
from espalier.model.moe import routing
from espalier.model.moe.routing import Dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """The mesh axes that split tokens, with G devices, those that also split experts, with P devices, and those that split
    the experts' hidden width, with N devices."""

    tokens: tuple[str, ...]
    experts: tuple[str, ...]
    width: tuple[str, ...]
    token_shards: int
    expert_shards: int
    width_shards: int

    def map(
        self, local: Callable[..., Any], *specs: PartitionSpec, out: PartitionSpec | None = None
    ) -> Callable[..., Any]:
        """Returns `local` mapped over the devices; results are concatenated along their first dimension, or by `out`."""
        return jax.shard_map(
            local,
            in_specs=specs,
            out_specs=self.split if out is None else out,
            # Pallas kernels compile only where `shard_map` names every axis of the mesh, axes of one device included.
            axis_names={*self.tokens, *self.width} | axes.single_mesh_axes(),
            check_vma=False,
        )

    @property
    def split(self) -> PartitionSpec:
        return PartitionSpec(self.tokens)

    def total(self, local: Callable[..., Any], *specs: PartitionSpec) -> Callable[..., jax.Array]:
        """Returns `local` mapped over the devices, with its results summed over those that split the hidden width."""

        def part(*args):
            return local(*args)[None]

        # XLA sums outside of `shard_map`: its gradient sends nothing there.
        parts = self.map(part, *specs, out=PartitionSpec(self.width, self.tokens))
        return lambda *args: jax.lax.reduce_sum(parts(*args), axes=(0,))

    def kernel(self, *names: str) -> PartitionSpec:
        """Returns how a kernel [E, X, Y] is split, of whose last two dimensions these are the logical names."""
        split = (self.width or None if name == axes.MLP else None for name in names)
        return PartitionSpec(self.experts or None, *split)


def placement(rows: int, num_experts: int, width: int) -> Placement | None:
    """Returns the placement of `rows` of tokens and the experts of this hidden `width`.

    None if no axis splits them, if one of the three does not divide evenly, or if an axis splits only experts.
    """
    rules = nn.get_logical_axis_rules()
    active = _active(rules) if rules else None
    if active is None or rows % active.token_shards or num_experts % active.expert_shards:
        return None
    return None if width % active.width_shards else active


def _active(rules: Sequence[tuple[str, Any]]) -> Placement | None:
    free = axes.free_mesh_axes()

    def split_by(logical: str) -> tuple[str, ...]:
        target = dict(rules).get(logical)
        names = (target,) if isinstance(target, str) else target or ()
        return tuple(name for name in names if name in free)

    tokens, experts = split_by(axes.BATCH), split_by(axes.EXPERT)
    width = tuple(name for name in split_by(axes.MLP) if name not in tokens)
    if not tokens + width or not set(experts) <= set(tokens):
        return None
    return Placement(
        tokens=tokens,
        experts=experts,
        width=width,
        token_shards=math.prod(free[name] for name in tokens),
        expert_shards=math.prod(free[name] for name in experts),
        width_shards=math.prod(free[name] for name in width),
    )


def first_to_one(
    experts_btk: jax.Array, count: int, num_experts: int, place: Placement
) -> jax.Array:
    """Returns this device's first `count` choices of each device's experts; E replaces the other choices."""
    devices_btk = experts_btk // (num_experts // place.expert_shards)
    line = devices_btk.reshape(1, -1, experts_btk.shape[-1])
    sent = routing.first_in_line(line, count, none=place.expert_shards) < place.expert_shards
    return jnp.where(sent.reshape(experts_btk.shape), experts_btk, num_experts)


@flax.struct.dataclass
class Exchange:
    """How a device's choices were sent to the devices of their experts, for `collect`.

    Attributes:
      own: the device's choices, sorted by expert and so by device.
      slot_C: for every choice, the index of its row among the P * S rows that are sent and returned.
      received: the received rows, sorted by expert; None if every device has all experts.
    """

    own: Dispatch
    slot_C: jax.Array | None
    received: Dispatch | None


def send(
    x_BTD: jax.Array, experts_BTK: jax.Array, num_experts: int, place: Placement, *, rows: int
) -> tuple[jax.Array, jax.Array, Exchange]:
    """Sends rows of tokens to the devices of their experts.

    Args:
      x_BTD: tokens.
      experts_BTK: experts of the tokens; E for none.
      num_experts, place: E and the placement of tokens and experts.
      rows: S; no device may have more choices for the experts of one device.

    Returns:
      Rows, sorted by expert on each device; the number of rows of each expert [G, E / P]; and the
      `Exchange` for `collect`.
    """

    def local(x_btd, experts_btk):
        return _send(x_btd, experts_btk, num_experts, place, rows)

    return place.map(local, place.split, place.split)(x_BTD, experts_BTK)


def _send(
    x_btd: jax.Array, experts_btk: jax.Array, num_experts: int, place: Placement, rows: int
) -> tuple[jax.Array, jax.Array, Exchange]:
    if place.expert_shards == 1:
        rows_RD, own = routing.send(x_btd, experts_btk, num_experts)
        return rows_RD, own.sizes_E.reshape(1, -1), Exchange(own, None, None)
    own = routing.dispatch(experts_btk.reshape(-1), num_experts)
    x_md = x_btd.reshape(-1, x_btd.shape[-1])
    rows_RD, slot_C, received = _exchange(x_md, experts_btk.shape[-1], own, place, rows)
    return rows_RD, received.sizes_E.reshape(1, -1), Exchange(own, slot_C, received)


def _exchange(
    x_md: jax.Array, top_k: int, own: Dispatch, place: Placement, rows: int
) -> tuple[jax.Array, jax.Array, Dispatch]:
    """Returns the rows for this device's experts, from all devices; and slot_C and `received` of `Exchange`."""
    sizes_Pe = own.sizes_E.reshape(place.expert_shards, -1)
    ends_P = jnp.cumsum(sizes_Pe.sum(-1))
    starts_P = ends_P - sizes_Pe.sum(-1)
    # Rows for one device are adjacent; the slots after them carry unused rows.
    index_PS = starts_P.reshape(-1, 1) + jnp.arange(rows).reshape(1, -1)
    choice_PS = own.order_R[jnp.minimum(index_PS, len(own.order_R) - 1)]
    rows_PSD = _all_to_all(x_md[choice_PS // top_k], place)
    sizes_Pe = _all_to_all(sizes_Pe, place)
    device_C = jnp.searchsorted(ends_P, own.rank_C, side="right")
    device_C = jnp.minimum(device_C, place.expert_shards - 1)
    slot_C = device_C * rows + own.rank_C - starts_P[device_C]
    # Rows from one device are sorted by expert; rows after its last expert's have no expert.
    expert_PS = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(rows), side="right"))(
        jnp.cumsum(sizes_Pe, axis=-1)
    )
    received = routing.dispatch(expert_PS.reshape(-1), sizes_Pe.shape[-1])
    rows_RD = rows_PSD.reshape(-1, x_md.shape[-1])[received.order_R]
    return rows_RD, slot_C, received


def _all_to_all(parts_PX: jax.Array, place: Placement) -> jax.Array:
    """Sends part p to device p; returns the parts received, in the order of the devices."""
    return jax.lax.all_to_all(parts_PX, place.experts, split_axis=0, concat_axis=0)


def collect(
    rows_RD: jax.Array, weights_BTK: jax.Array, exchange: Exchange, place: Placement
) -> jax.Array:
    """Returns each token's weighted sum of its experts' rows, [B, T, D], on the token's device."""

    def local(rows_RD, weights_btk, exchange):
        return _collect(rows_RD, weights_btk, exchange, place)

    return place.map(local, *(place.split,) * 3)(rows_RD, weights_BTK, exchange)


def _collect(
    rows_RD: jax.Array, weights_btk: jax.Array, exchange: Exchange, place: Placement
) -> jax.Array:
    own = exchange.own
    if exchange.received is not None:
        rows_PSD = routing.by_choice(rows_RD, exchange.received)
        rows_PSD = rows_PSD.reshape(place.expert_shards, -1, rows_RD.shape[-1])
        rows_RD = _all_to_all(rows_PSD, place).reshape(rows_RD.shape)
        assert exchange.slot_C is not None
        rank_C = jnp.minimum(exchange.slot_C, len(rows_RD) - 1)
        own = Dispatch(own.order_R, rank_C, own.used_C, own.sizes_E)
    return routing.collect(rows_RD, weights_btk, own)


def mixed(
    mlp: Callable[..., jax.Array],
    x_BTD: jax.Array,
    experts_BTK: jax.Array,
    weights_BTK: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
    place: Placement,
    *,
    rows: int,
) -> jax.Array:
    """Returns each token's weighted sum of its experts' results, [B, T, D], on the token's device.

    Args:
      mlp: returns the results of rows [R, D] that are sorted by expert, called with them, a device's kernels and its
        experts' numbers of rows.
      kernels: gate [E, D, F], up [E, D, F] and down [E, F, D].
      x_BTD, experts_BTK, place, rows: as of `send`; weights_BTK: as of `collect`.
    """
    num_experts = len(kernels[0])

    def local(x_btd, experts_btk, weights_btk, *kernels):
        rows_RD, sizes_1e, exchange = _send(x_btd, experts_btk, num_experts, place, rows)
        return _collect(mlp(rows_RD, kernels, sizes_1e[0]), weights_btk, exchange, place)

    inward, down = place.kernel(axes.EMBED, axes.MLP), place.kernel(axes.MLP, axes.EMBED)
    mapped = place.total(local, *(place.split,) * 3, inward, inward, down)
    return mapped(x_BTD, experts_BTK, weights_BTK, *kernels)


def per_device(
    product: Callable[..., jax.Array],
    rows_RX: jax.Array,
    kernel_EXY: jax.Array,
    sizes_Ge: jax.Array,
    names: Sequence[str],
    *scales_EY: jax.Array,
) -> jax.Array:
    """Returns product(rows, kernels, *scales, sizes) on every device, for its rows and its part of the kernels.

    Args:
      names: logical names of the kernel's last two dimensions.
      *scales_EY: the scales of the kernel's outputs, if it has any.
    """
    place = _active(nn.get_logical_axis_rules())
    assert place is not None  # the sizes were computed with a placement

    def local(rows_RX, sizes_e, *of_experts):
        return product(rows_RX, *of_experts, sizes_e.reshape(-1))

    kernel = place.kernel(*names)
    of_experts, of_x, of_y = kernel
    scales = [PartitionSpec(of_experts, of_y)] * len(scales_EY)
    specs = (PartitionSpec(place.tokens, of_x), place.split, kernel, *scales)
    if of_x:
        mapped = place.total(local, *specs)
    else:
        mapped = place.map(local, *specs, out=PartitionSpec(place.tokens, of_y))
    return mapped(rows_RX, sizes_Ge, kernel_EXY, *scales_EY)
