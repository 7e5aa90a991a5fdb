"""Attention over rows whose length the mesh splits (context parallelism).

Every device has a part of each row: T / C adjacent tokens on a mesh axis of C devices. Two methods have the same values:

ring: keys and values go round the devices, and each combines the parts that it has seen by their log-sum-exp (Liu et al., arXiv
2310.01889). No device ever has all keys. Under a causal mask without a window a device would wait for those with later
tokens, so the devices first exchange halves: device d of C then has the halves d and 2C - 1 - d of 2C, and all compute the same
amount in every step. With a window of W, parts go round only as far as W reaches. The backward pass sends keys and values
round again with their gradients, and recomputes the scores. The gradient of JAX would store the keys and values of all steps.

all_to_all: an exchange before and after attention splits heads instead of the length (Jacobs et al., arXiv 2309.14509). Between
the two, any implementation for whole rows computes a device's heads.

Shapes: B batch, T and S a device's queries and keys, N query heads, K key/value heads, G = N / K, H head dim, P = B * K,
U halves of a device (1 without an exchange of halves), '...' any others.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.kernels import attention_blocked, attention_fused
from espalier.model.kernels.attention_blocked import MASKED, Form, by_head, by_row, over_groups
from espalier.model.kernels.context_method import METHODS, method_for

_BLOCKS = 8  # of queries, in each step of a ring: with more, programs for TPUs take long to compile


def method_of(implementation: str, q_shape, k_shape) -> str:
    """Returns which of METHODS computes a call; '' where rows are whole, or this mesh does not divide them (initialisation).

    Args:
      implementation: one of METHODS, or 'auto', which is all_to_all if it can be.
      q_shape, k_shape: shapes of queries and keys on all devices.
    """
    specs = attention_fused.placement(q_shape, k_shape, parts=True)
    if implementation not in ("auto", *METHODS) or not specs or not len(specs[0]):
        return ""
    size = _devices(specs[0][1])
    if size == 1:
        return ""
    return method_for(implementation, size, k_shape[2] // _devices(specs[1][2]))


def context_attention(
    method: str,
    whole: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """Returns attention [B, T, N, H], split by length as queries are; keys and queries are of the same tokens.

    Args:
      method: see `method_of`.
      whole: attention over whole rows, called on a device as attention_ops.dot_product_attention.
      **options: causal, window, scale and softcap.
    """
    specs = attention_fused.placement(q_BTNH.shape, k_BSKH.shape, parts=True)
    assert specs is not None  # as `method_of` has seen
    kernel = _ring_attention if method == "ring" else functools.partial(_all_to_all, whole)
    return attention_fused.per_device(
        kernel,
        *(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS),
        parts=True,
        axis=specs[0][1],
        **options,
    )


def _devices(axis: str | tuple[str, ...] | None) -> int:
    """Returns the number of devices along an entry of a partition spec."""
    free = axes.free_mesh_axes()
    return math.prod(free[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))


def _all_to_all(whole, q_BTNH, k_BSKH, v_BSKH, q_segments, kv_segments, *, axis, **options):
    def by_heads(x_BTNH):
        return jax.lax.all_to_all(x_BTNH, axis, split_axis=2, concat_axis=1, tiled=True)

    if q_segments is not None:
        q_segments, kv_segments = (
            jax.lax.all_gather(x_BT, axis, axis=1, tiled=True) for x_BT in (q_segments, kv_segments)
        )
    out_BTNH = whole(
        *(by_heads(x) for x in (q_BTNH, k_BSKH, v_BSKH)),
        q_segments_BT=q_segments,
        kv_segments_BS=kv_segments,
        **options,
    )
    return jax.lax.all_to_all(out_BTNH, axis, split_axis=1, concat_axis=2, tiled=True)


class _Ring(NamedTuple):
    """The static arguments of a ring.

    Attributes:
      form: of attention within a device.
      axis, size: the mesh axes of the ring and the number of devices, C.
      halves: U.
      steps: number of devices before each whose keys it sees.
    """

    form: Form
    axis: Any
    size: int
    halves: int
    steps: int

    def send(self, x: Any, places: int = 1) -> Any:
        """Sends arrays to the device that is so many places later."""
        pairs = [(d, (d + places) % self.size) for d in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), x)

    def over_steps(self, step: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Returns the carry after step(i, carry) for i = 1, ..., steps."""
        if self.halves == 2 or not self.form.causal:
            return jax.lax.fori_loop(1, self.steps + 1, step, carry)
        for i in range(1, self.steps + 1):
            carry = step(i, carry)  # its mask depends on i
        return carry

    def pairs(self, i: Any, length: int) -> tuple[Form, jax.Array, jax.Array, jax.Array]:
        """Returns what queries see of the keys of the device i places before.

        Returns:
          The form, the indices of halves of queries, the indices of the halves of keys that these see, and whether they see any.
        """
        device, zero = jax.lax.axis_index(self.axis), jnp.zeros(1, jnp.int32)
        if self.halves == 2:
            # Later halves see the earlier one of any device. The sooner device's other pair depends on which has the sooner half.
            other = (device < i).astype(jnp.int32)[None]
            form = self.form._replace(causal=False)
            return form, jnp.append(other, 1), jnp.append(other, 0), jnp.array(True)
        form = self.form._replace(offset=i * length if self.form.causal else 0)
        return form, zero, zero, (device >= i) | (not self.form.causal)


def _ring_attention(
    q_BTNH, k_BSKH, v_BSKH, q_segments, kv_segments, *, axis, causal, window, scale, softcap
):
    size = jax.lax.axis_size(axis)
    B, T, K = len(q_BTNH), q_BTNH.shape[1], k_BSKH.shape[2]
    if window is not None and window >= size * T:
        window = None
    steps = size - 1 if window is None else min(size - 1, -(-(window - 1) // T))
    halves = 2 if causal and window is None and T % 2 == 0 else 1
    form = Form(window, scale, softcap, causal, blocks=_BLOCKS)
    ring = _Ring(form, axis, size, halves, steps)
    arrays: Any = (q_BTNH * scale, k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype))
    segments: Any = None if q_segments is None else (q_segments, kv_segments)
    if halves == 2:
        arrays, segments = jax.tree.map(lambda x: _exchanged(ring, x), (arrays, segments))
    q_PGTH, k_P1SH, v_P1SH = (by_head(x, K) for x in arrays)
    segments = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), segments)
    out_PGTH = _ring(ring, q_PGTH, k_P1SH[:, 0], v_P1SH[:, 0], segments or (None, None))
    out_BTNH = by_row(out_PGTH, B)
    return _exchanged(ring, out_BTNH, back=True) if halves == 2 else out_BTNH


def _exchanged(ring: _Ring, x_BTX: jax.Array, *, back: bool = False) -> jax.Array:
    """Sends the halves 2d and 2d + 1 of a device d, so that it has d and 2C - 1 - d; `back` is the inverse."""
    # Of the even halves each device gets one, and one of the odd ones.
    routes = [
        [(d, min(h, 2 * ring.size - 1 - h)) for d, h in enumerate(range(first, 2 * ring.size, 2))]
        for first in (0, 1)
    ]
    odd = jax.lax.axis_index(ring.axis) % 2 == 1

    def ordered(halves):
        return [jnp.where(odd, *pair) for pair in (halves[::-1], halves)]

    halves = jnp.split(x_BTX, 2, axis=1)
    if back:
        routes = [[(to, d) for d, to in route] for route in routes]
        halves = ordered(halves)
    halves = [
        jax.lax.ppermute(x, ring.axis, route) for x, route in zip(halves, routes, strict=True)
    ]
    return jnp.concatenate(halves if back else ordered(halves), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: _Ring, q_PGTH, k_PSH, v_PSH, segments):
    return _ring_fwd(ring, q_PGTH, k_PSH, v_PSH, segments)[0]


def _attend(ring_form: Form, function, q_side, keys):
    """Returns `function` (of attention_blocked) of the arrays of queries and of keys."""
    q_PGTH, q_segments, *more = q_side
    k_PSH, v_PSH, kv_segments = keys
    segments = None if q_segments is None else (q_segments, kv_segments)
    arrays = (q_PGTH, k_PSH, v_PSH, segments, *more)
    return over_groups(functools.partial(function, ring_form), arrays)[0]


def _split(ring: _Ring, x: Any, axis: int) -> Any:
    """Reshapes arrays to their halves [U, ...]."""
    return jax.tree.map(lambda x: jnp.stack(jnp.split(x, ring.halves, axis)), x)


def _joined(x_U: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_split`."""
    return jnp.concatenate(list(x_U), axis)


def _chosen(x_U: Any, index: jax.Array) -> Any:
    """Returns the halves of these indices, joined along their first axis, P."""
    return jax.tree.map(lambda x: x[index].reshape(-1, *x.shape[2:]), x_U)


def _ring_fwd(ring: _Ring, q_PGTH, k_PSH, v_PSH, segments):
    q_segments, kv_segments = segments
    keys = (k_PSH, v_PSH, kv_segments)
    out_PGTH, lse_PGT = _attend(ring.form, attention_blocked.forward, (q_PGTH, q_segments), keys)
    q_U = (_split(ring, q_PGTH, 2), _split(ring, q_segments, 1))
    sums_U = (_split(ring, out_PGTH.astype(lse_PGT.dtype), 2), _split(ring, lse_PGT, 2))

    def step(i, carry):
        keys_U, sums_U = carry
        form, q_index, k_index, seen = ring.pairs(i, q_PGTH.shape[2])
        out, lse = _attend(
            form, attention_blocked.forward, _chosen(q_U, q_index), _chosen(keys_U, k_index)
        )
        out, lse = jnp.where(seen, out, 0), jnp.where(seen, lse, MASKED / 2)
        parts = (x.reshape(len(q_index), -1, *x.shape[1:]) for x in (out, lse))
        for half, *part in zip(q_index, *parts, strict=True):
            merged = _merged(tuple(x[half] for x in sums_U), part)
            sums_U = tuple(x.at[half].set(new) for x, new in zip(sums_U, merged, strict=True))
        # The last step's keys go on in vain: sending does not wait for the products here, nor these for it.
        return ring.send(keys_U), sums_U

    carry = ring.send(_split(ring, keys, 1)), sums_U
    out_PGTH, lse_PGT = (_joined(x_U, 2) for x_U in ring.over_steps(step, carry)[1])
    out_PGTH = out_PGTH.astype(q_PGTH.dtype)
    return out_PGTH, (q_PGTH, k_PSH, v_PSH, segments, lse_PGT, out_PGTH)


def _merged(one, other):
    """Returns weighted means of values (out [P, G, T, H], log-sum-exp [P, G, T]) over disjoint keys, over all of them."""
    lse = jnp.logaddexp(one[1], other[1])
    out = sum(out * jnp.exp(part - lse)[..., None] for out, part in (one, other))
    return out, lse


def _ring_bwd(ring: _Ring, residuals, dout_PGTH):
    q_PGTH, k_PSH, v_PSH, (q_segments, kv_segments), lse_PGT, out_PGTH = residuals
    delta_PGT = (out_PGTH.astype(lse_PGT.dtype) * dout_PGTH).sum(-1)
    keys = (k_PSH, v_PSH, kv_segments)
    q_side = (q_PGTH, q_segments, lse_PGT, delta_PGT, dout_PGTH)
    own = _attend(ring.form, attention_blocked.backward, q_side, keys)
    dq_PGTH, *dkeys = (x.astype(lse_PGT.dtype) for x in own)
    q_U = tuple(_split(ring, x, 1 if x is q_segments else 2) for x in q_side)

    def step(i, carry):
        keys_U, dq_U, dkeys_U = carry
        form, q_index, k_index, seen = ring.pairs(i, q_PGTH.shape[2])
        grads = _attend(
            form, attention_blocked.backward, _chosen(q_U, q_index), _chosen(keys_U, k_index)
        )
        grads = (jnp.where(seen, x, 0).reshape(len(q_index), -1, *x.shape[1:]) for x in grads)
        dq, *dk = (x.astype(lse_PGT.dtype) for x in grads)
        # Gradients of keys go round with them.
        dkeys_U = [x.at[k_index].add(new) for x, new in zip(ring.send(dkeys_U), dk, strict=True)]
        return ring.send(keys_U), dq_U.at[q_index].add(dq), dkeys_U

    carry = ring.send(_split(ring, keys, 1)), _split(ring, dq_PGTH, 2), _split(ring, dkeys, 1)
    _, dq_U, dkeys_U = ring.over_steps(step, carry)
    home = ring.send(dkeys_U, -ring.steps)
    grads = (_joined(dq_U, 2), *(_joined(x_U, 1) for x_U in home))
    return *(x.astype(q_PGTH.dtype) for x in grads), None


_ring.defvjp(_ring_fwd, _ring_bwd)
