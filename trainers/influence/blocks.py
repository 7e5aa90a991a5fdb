"""Kronecker factors in blocks: a side of d dimensions is split into n blocks of s = ceil(d / n), padded with zeros.

A covariance is then [n, s, s], and its eigenvectors are block-diagonal. With n = 1 nothing is split. Padding has no
variance, so it changes no result.

Shapes: d dimensions of a side, n blocks, s size of a block; X inputs and Y outputs of a matrix.
"""

from typing import Literal

import jax
import jax.numpy as jnp

# Of products on accelerators, which round the operands of float32 products by default: to bfloat16 on TPUs, to 10 bits on GPUs.
# Rounded, rotations into the eigenbasis are wrong by about 0.1 to 4 %, and most where eigenvalues are small.
Precision = Literal["highest", "high", "default"]


def block_size(width: int, blocks: int) -> int:
    """Returns s."""
    return -(-width // blocks)


def padded_width(width: int, blocks: int) -> int:
    """Returns n s, the width of rotated vectors."""
    return blocks * block_size(width, blocks)


def split(x: jax.Array, blocks: int) -> jax.Array:
    """Reshapes [..., d] -> [..., n, s], padded by zeros."""
    size = block_size(x.shape[-1], blocks)
    missing = blocks * size - x.shape[-1]
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], blocks, size)


def rotate(x: jax.Array, q_NSK: jax.Array) -> jax.Array:
    """Returns x Q for vectors [..., d]: their coordinates [..., n s] in the eigenbasis."""
    parts = split(x, q_NSK.shape[0])
    return _joined(jnp.einsum("...ns,nsk->...nk", parts, q_NSK.astype(x.dtype)))


def rotate_back(x: jax.Array, q_NSK: jax.Array, width: int) -> jax.Array:
    """Returns x Q^T [..., d] for coordinates [..., n s], the inverse of `rotate`."""
    parts = x.reshape(*x.shape[:-1], *q_NSK.shape[:2])
    return _joined(jnp.einsum("...nk,nsk->...ns", parts, q_NSK.astype(x.dtype)))[..., :width]


def rotate_matrix(v_XY: jax.Array, qa: jax.Array, qs: jax.Array) -> jax.Array:
    """Returns Q_A^T V Q_S of a matrix [X, Y], in the padded widths."""
    return rotate(rotate(v_XY, qs).T, qa).T


def rotate_matrix_back(v: jax.Array, qa: jax.Array, qs: jax.Array, shape) -> jax.Array:
    """Returns Q_A V Q_S^T [X, Y], the inverse of `rotate_matrix`."""
    inputs, outputs = shape
    return rotate_back(rotate_back(v, qs, outputs).T, qa, inputs).T


def _joined(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)
