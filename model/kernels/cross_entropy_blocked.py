"""Cross-entropy computed over blocks of the vocabulary, for large tables split over many devices.

Each device reads each row of the table twice, in the forward and backward pass, and sends its gradient
once. A table split over devices therefore crosses the network three times whatever the number of tokens.
(A loop over chunks of *tokens* would gather the whole table for every chunk.) Only one block's logits
are in memory at a time; the backward pass recomputes them.

Shapes: T tokens, D width, V vocabulary, J blocks, C rows of a block.
"""

import functools

import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.kernels.vocab_logits import LogitForm, join_rows, split_rows

BLOCK = 32_768  # rows: the size of a whole vocabulary whose logits do fit in memory with a model


def split(head_VD: jax.Array, block: int = BLOCK) -> jax.Array:
    """Returns the blocks [J, C, D] of a table, see `split_rows`."""
    (blocks_JCD,) = split_rows(block, head_VD)
    return axes.constrain(blocks_JCD, None, axes.VOCAB, axes.EMBED)


def _block_logits(form: LogitForm, h_TD, block_CD, j, J: int, rows: int):
    """Returns the logits [T, C] of block j, -inf for padding rows, and the vocabulary row of each column."""
    # Replicate the width: contracting a split width would need an all-reduce of the logits.
    block_CD = axes.constrain(block_CD, axes.VOCAB, None)
    row_C = jnp.arange(block_CD.shape[0], dtype=jnp.int32) * J + j
    logits_TC = form.logits(h_TD, block_CD)
    return jnp.where(row_C[None, :] < rows, logits_TC, -jnp.inf), row_C, block_CD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def blocked_nll(form: LogitForm, h_TD, head_VD, targets_T, block: int = BLOCK):
    """Returns (nll_T, log_z_T), float32, with exact gradients of h and head."""
    V = head_VD.shape[0]
    blocks_JCD = split(head_VD, block)
    J = blocks_JCD.shape[0]

    def body(carry, xs):
        max_T, sum_T, target_T = carry
        j, block_CD = xs
        logits_TC, row_C, _ = _block_logits(form, h_TD, block_CD, j, J, V)
        new_max_T = jnp.maximum(max_T, logits_TC.max(-1))
        sum_T = sum_T * jnp.exp(max_T - new_max_T)
        sum_T = sum_T + jnp.exp(logits_TC - new_max_T[:, None]).sum(-1)
        hit_TC = targets_T[:, None] == row_C[None, :]
        target_T = target_T + jnp.where(hit_TC, logits_TC, 0).sum(-1)
        return (new_max_T, sum_T, target_T), None

    wide = jnp.promote_types(h_TD.dtype, jnp.float32)
    zero_T = jnp.zeros(h_TD.shape[:1], wide)
    lowest_T = jnp.full_like(zero_T, jnp.finfo(wide).min)
    (max_T, sum_T, target_T), _ = jax.lax.scan(
        body, (lowest_T, zero_T, zero_T), (jnp.arange(J, dtype=jnp.int32), blocks_JCD)
    )
    log_z_T = max_T + jnp.log(sum_T)
    return log_z_T - target_T, log_z_T


def _forward(form, h_TD, head_VD, targets_T, block):
    outs = blocked_nll(form, h_TD, head_VD, targets_T, block)
    return outs, (h_TD, head_VD, targets_T, outs[1])


def _backward(form, block, residuals, cotangents):
    h_TD, head_VD, targets_T, log_z_T = residuals
    dnll_T, dlog_z_T = cotangents
    V = head_VD.shape[0]
    blocks_JCD = split(head_VD, block)
    J = blocks_JCD.shape[0]

    def body(dh_TD, xs):
        j, block_CD = xs
        logits_TC, row_C, block_CD = _block_logits(form, h_TD, block_CD, j, J, V)
        d_TC = (dnll_T + dlog_z_T)[:, None] * jnp.exp(logits_TC - log_z_T[:, None])
        hit_TC = targets_T[:, None] == row_C[None, :]
        d_TC = d_TC - jnp.where(hit_TC, dnll_T[:, None], 0)
        logits_TC = jnp.where(row_C[None, :] < V, logits_TC, 0)
        d_TC = form.product_gradient(d_TC, logits_TC).astype(h_TD.dtype)
        wide = dh_TD.dtype
        dh_TD = dh_TD + jnp.einsum("tc,cd->td", d_TC, block_CD, preferred_element_type=wide)
        dblock_CD = jnp.einsum("tc,td->cd", d_TC, h_TD, preferred_element_type=wide)
        dblock_CD = axes.constrain(dblock_CD, axes.VOCAB, axes.EMBED)
        return dh_TD, dblock_CD.astype(head_VD.dtype)

    zero_TD = jnp.zeros(h_TD.shape, jnp.promote_types(h_TD.dtype, jnp.float32))
    dh_TD, dblocks_JCD = jax.lax.scan(body, zero_TD, (jnp.arange(J, dtype=jnp.int32), blocks_JCD))
    return dh_TD.astype(h_TD.dtype), join_rows(V, dblocks_JCD), None


blocked_nll.defvjp(_forward, _backward)
