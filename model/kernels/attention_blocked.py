"""Attention for CPUs: each block of query rows is multiplied only with the keys that it may see.

Causal attention needs half of the score matrix, and the scores in use should fit a core's cache. A loop
processes a few heads at a time. Each block of query rows is multiplied with the keys from the start of
its window to its last row, or with all keys. A bias of heads, such as T5's of relative positions, is added block by block,
and its gradient is summed over rows in the loop: neither is ever written for every row. The backward pass is written by hand: it saves only the output and the
log-sum-exp, and recomputes the scores. This is flash attention (Dao, arXiv 2307.08691), with one matrix
product instead of the loop over keys.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head dim,
P = B * K pairs of row and key/value head, R rows of a block, C keys a block sees.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # as in attention_ops: finite; the row maximum is at least half of it
# Query rows: products of this height run at full rate, and scores of 4 heads fit a core's cache.
BLOCK = 128
MAX_BLOCKS = 32
HEADS_AT_ONCE = 4  # query heads per iteration


class Form(NamedTuple):
    """The static arguments of a call.

    Attributes:
      offset: positions by which the first query is after the first key.
      blocks: number of blocks at most; they are unrolled, so long rows use larger blocks.
    """

    window: int | None
    scale: float
    softcap: float | None
    causal: bool
    offset: int = 0
    blocks: int = MAX_BLOCKS


def blocked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    *,
    bias_1NTS: jax.Array | None = None,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
) -> jax.Array:
    """Returns attention [B, T, N, H] on one device, in blocks of queries; positions of tokens are their indices.

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries, keys and values; K divides N.
      q_segments_BT, kv_segments_BS: tokens see only equal segments; None for one document per row.
      bias_1NTS: added to the logits of all rows.
      window: keys that a query sees, itself included; None for all earlier ones.
      scale, softcap: logits are softcap * tanh(scale * q k / softcap); a softcap of None only scales them.
      causal: whether a query sees only keys up to itself.
    """
    k_BSKH, v_BSKH = k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype)
    segments = None if q_segments_BT is None else (q_segments_BT, kv_segments_BS)
    form = Form(window, scale, softcap, causal)
    bias_KGTS = None
    if bias_1NTS is not None:
        bias_KGTS = bias_1NTS.reshape(k_BSKH.shape[2], -1, *bias_1NTS.shape[2:])
    return _attend(form, q_BTNH, k_BSKH, v_BSKH, bias_KGTS, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: Form, q_BTNH, k_BSKH, v_BSKH, bias_KGTS, segments):
    return _attend_fwd(form, q_BTNH, k_BSKH, v_BSKH, bias_KGTS, segments)[0]


def _attend_fwd(form: Form, q_BTNH, k_BSKH, v_BSKH, bias_KGTS, segments):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_PGTH = by_head(q_BTNH * form.scale, K)  # scale the queries, which are fewer than the scores
    k_PSH, v_PSH = (by_head(x, K)[:, 0] for x in (k_BSKH, v_BSKH))
    if segments is not None:
        segments = tuple(jnp.repeat(x, K, axis=0) for x in segments)
    arrays = (q_PGTH, k_PSH, v_PSH, segments)
    (out_PGTH, lse_PGT), _ = over_groups(functools.partial(forward, form), arrays, bias_KGTS)
    out_BTNH = by_row(out_PGTH, B)
    return out_BTNH, (*arrays, lse_PGT, out_BTNH, bias_KGTS)


def _attend_bwd(form: Form, residuals, dout_BTNH):
    *arrays, lse_PGT, out_BTNH, bias_KGTS = residuals
    B, T, N, H = out_BTNH.shape
    delta_BNT = jnp.einsum(
        "btnh,btnh->bnt", out_BTNH, dout_BTNH, preferred_element_type=lse_PGT.dtype
    )
    arrays += [
        lse_PGT,
        delta_BNT.reshape(lse_PGT.shape),
        by_head(dout_BTNH, N // lse_PGT.shape[1]),
    ]
    # Scores are transposed in the backward pass.
    bias_KSGT = None if bias_KGTS is None else bias_KGTS.transpose(0, 3, 1, 2)
    (dq_PGTH, *dkv_PSH), dbias_KSGT = over_groups(
        functools.partial(backward, form), tuple(arrays), bias_KSGT
    )
    dk_BSKH, dv_BSKH = (by_row(x_PSH[:, None], B) for x_PSH in dkv_PSH)
    dbias_KGTS = None if bias_KSGT is None else dbias_KSGT.transpose(0, 2, 3, 1)
    return by_row(dq_PGTH * form.scale, B), dk_BSKH, dv_BSKH, dbias_KGTS, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def by_head(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Reshapes [B, T, N, H] -> [P, G, T, H], one contiguous matrix per head."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.swapaxes(1, 2).reshape(B * kv_heads, N // kv_heads, T, H)


def by_row(x_PGTH: jax.Array, batch: int) -> jax.Array:
    """Reshapes [P, G, T, H] -> [B, T, N, H], the inverse of `by_head`."""
    return x_PGTH.reshape(batch, -1, *x_PGTH.shape[2:]).swapaxes(1, 2)


def _groups(pairs: int, heads: int, kv_heads: int) -> int:
    """Returns the number of iterations, each with about HEADS_AT_ONCE of the pairs * heads query heads.

    With a bias of `kv_heads`, an iteration has whole rows, or a part of one row's heads.
    """
    size = max(1, HEADS_AT_ONCE // heads)
    while pairs % size or (size % kv_heads and kv_heads % size):
        size -= 1
    return pairs // size


def over_groups(function, arrays, bias_K=None):
    """Maps `function` over groups of the leading axis P of every array in the tree.

    Args:
      function: called with a group's arrays and its part of `bias_K`; returns outputs, and the gradient of that part or None.
      bias_K: an array of K, the heads of each row; None for none.

    Returns:
      The outputs, with the leading axis P, and the sum over rows of the gradients, of the shape of `bias_K`.
    """
    P, G = arrays[0].shape[:2]
    K = 1 if bias_K is None else len(bias_K)
    groups = _groups(P, G, K)
    size = P // groups

    def of_group(total_K, group):
        index, own = group
        if bias_K is None:
            return None, function(own, None)[0]
        first, rows = index * size % K, max(1, size // K)
        part = jax.lax.dynamic_slice_in_dim(bias_K, first, min(size, K))
        out, change = function(own, jnp.tile(part, (rows,) + (1,) * (bias_K.ndim - 1)))
        if change is None:
            return total_K, out
        change = change.reshape(rows, -1, *change.shape[1:]).sum(0)
        before = jax.lax.dynamic_slice_in_dim(total_K, first, min(size, K))
        return jax.lax.dynamic_update_slice_in_dim(total_K, before + change, first, 0), out

    total_K = None if bias_K is None else jnp.zeros_like(bias_K)
    if groups == 1:
        total_K, out = of_group(total_K, (0, arrays))
        return out, total_K
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), arrays)
    total_K, out = jax.lax.scan(of_group, total_K, (jnp.arange(groups), split))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out), total_K


def _blocks(form: Form, T: int, S: int) -> list[tuple[slice, slice]]:
    """Returns the row blocks, each with the range of keys that any of its rows may see."""
    rows = max(BLOCK, -(-T // form.blocks // BLOCK) * BLOCK)
    blocks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first = 0 if form.window is None else max(0, start + form.offset - form.window + 1)
        last = min(stop + form.offset, S) if form.causal else S
        blocks.append((slice(start, stop), slice(min(first, last - 1), last)))
    return blocks


def _visible(form: Form, segments, rows: slice, keys: slice, scores: jax.Array, axes):
    """Returns the scores, MASKED where a mask excludes them; `axes` are the axes of rows and of keys."""
    row_axis, key_axis = axes

    def along(x: jax.Array, axis: int) -> jax.Array:
        """Reshapes [1 or P, length] to broadcast along an axis of the scores."""
        shape = [x.shape[0], 1, 1, 1]
        shape[axis] = x.shape[1]
        return x.reshape(shape)

    first, last = rows.start + form.offset, rows.stop + form.offset
    at_q = along(jnp.arange(first, last)[None], row_axis)
    at_k = along(jnp.arange(keys.start, keys.stop)[None], key_axis)
    parts = [at_k <= at_q] if form.causal else []
    if form.window is not None:
        parts.append(at_k > at_q - form.window)
    if segments is not None:
        q_segments_PT, kv_segments_PS = segments
        same = along(q_segments_PT[:, rows], row_axis) == along(kv_segments_PS[:, keys], key_axis)
        parts.append(same)
    if not parts:
        return scores
    return jnp.where(functools.reduce(jnp.logical_and, parts), scores, MASKED)


def _capped(form: Form, scores: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Returns the soft-capped scores and the derivative of the cap; None without a cap."""
    if form.softcap is None:
        return scores, None
    t = jnp.tanh(scores / form.softcap)
    return form.softcap * t, 1 - t * t


def forward(form: Form, arrays, bias_PGTS):
    """Returns (out [P, G, T, H], log-sum-exp [P, G, T]), and None."""
    q_PGTH, k_PSH, v_PSH, segments = arrays
    dot = _wide_dot(q_PGTH)
    outs, sums = [], []
    for rows, keys in _blocks(form, q_PGTH.shape[2], k_PSH.shape[1]):
        s, _ = _capped(form, dot("pgrh,pch->pgrc", q_PGTH[:, :, rows], k_PSH[:, keys]))
        if bias_PGTS is not None:
            s = s + bias_PGTS[:, :, rows, keys].astype(s.dtype)
        s = _visible(form, segments, rows, keys, s, axes=(2, 3))
        top = jnp.maximum(s.max(-1, keepdims=True), MASKED / 2)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        total = jnp.where(total > 0, total, 1)  # rows that see no key: out = 0
        o = dot("pgrc,pch->pgrh", p.astype(v_PSH.dtype), v_PSH[:, keys])
        outs.append((o / total).astype(q_PGTH.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    return (jnp.concatenate(outs, 2), jnp.concatenate(sums, 2)), None


def backward(form: Form, arrays, bias_PSGT):
    """Returns (dq [P, G, T, H], dk [P, S, H], dv [P, S, H]), and the gradient of the bias [P, S, G, T] or None.

    Scores are transposed, with keys first. The products for dk and dv then use their operands without
    a transposition; only dq is computed transposed and transposed back.
    """
    q_PGTH, k_PSH, v_PSH, segments, lse_PGT, delta_PGT, dout_PGTH = arrays
    S = k_PSH.shape[1]
    dot = _wide_dot(q_PGTH)
    dqs, dbiases = [], []
    dk_PSH = jnp.zeros(k_PSH.shape, lse_PGT.dtype)
    dv_PSH = jnp.zeros(k_PSH.shape, lse_PGT.dtype)
    for rows, keys in _blocks(form, q_PGTH.shape[2], S):
        q, dout = q_PGTH[:, :, rows], dout_PGTH[:, :, rows]
        k, v = k_PSH[:, keys], v_PSH[:, keys]
        s, slope = _capped(form, dot("pch,pgrh->pcgr", k, q))
        if bias_PSGT is not None:
            s = s + bias_PSGT[:, keys, :, rows].astype(s.dtype)
        s = _visible(form, segments, rows, keys, s, axes=(3, 1))
        p = jnp.exp(s - lse_PGT[:, None, :, rows])
        ds = p * (dot("pch,pgrh->pcgr", v, dout) - delta_PGT[:, None, :, rows])
        if bias_PSGT is not None:
            unseen = ((0, 0), (keys.start, S - keys.stop), (0, 0), (0, 0))
            dbiases.append(jnp.pad(ds.astype(bias_PSGT.dtype), unseen))
        if slope is not None:
            ds = ds * slope
        # Both operands contract their rows; XLA's CPU backend cannot do this with bfloat16.
        dq = dot("pch,pcgr->phgr", k.astype(ds.dtype), ds).astype(q.dtype)
        dqs.append(dq.transpose(0, 2, 3, 1))
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        outside = ((0, 0), (keys.start, S - keys.stop), (0, 0))
        dk_PSH = dk_PSH + jnp.pad(dot("pcgr,pgrh->pch", ds, q), outside)
        dv_PSH = dv_PSH + jnp.pad(dot("pcgr,pgrh->pch", p, dout), outside)
    dtype = q_PGTH.dtype
    dbias_PSGT = jnp.concatenate(dbiases, 3) if dbiases else None
    return (jnp.concatenate(dqs, 2), dk_PSH.astype(dtype), dv_PSH.astype(dtype)), dbias_PSGT


def _wide_dot(operand: jax.Array):
    """Returns an einsum that accumulates in float32 or wider."""
    wide = jnp.promote_types(operand.dtype, jnp.float32)
    return functools.partial(jnp.einsum, preferred_element_type=wide)
