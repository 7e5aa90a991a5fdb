"""Factorised matrices, U V^T of rank r instead of W: ranks, initial values, decay and spectra.

In a tree of parameters, a module has the two arrays `u` [..., rows, rank] and `v` [..., rank, columns]. `v` is the
transpose of V in Kamalakara et al. (arXiv 2209.13569). Leading axes stack layers or experts.

Shapes: X rows, Y columns, R rank, '...' stacked layers or experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from espalier.model.transforms.base import aligned

RankRule = Literal["min_dim", "param_ratio", "absolute"]
RANK_RULES = get_args(RankRule)

# Without this, accelerators round the operands to bfloat16.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def rank_of(rank: float, rule: RankRule, rows: int, columns: int, *, multiple: int = 1) -> int:
    """Returns the rank of the factors of a matrix [rows, columns], at least 1.

    Args:
      rank: with 'min_dim', a fraction of the smaller side; with 'param_ratio', a fraction of the
        matrix's parameters; with 'absolute', the rank itself.
      multiple: ranks from a fraction are rounded to a multiple of this, if the matrix is large enough.

    Raises:
      ValueError: an unknown rule, a fractional 'absolute' rank, or a rank outside [1, min(rows, columns)].
    """
    if rule not in RANK_RULES:
        raise ValueError(f"rank_rule={rule!r}: choose from {', '.join(map(repr, RANK_RULES))}.")
    most = min(rows, columns)
    if rule == "absolute":
        if rank != int(rank):
            raise ValueError(
                f"rank={rank} is not a whole number, as rank_rule='absolute' needs; for a fraction, use "
                "'min_dim' or 'param_ratio'."
            )
        chosen = int(rank)
    else:
        size = most if rule == "min_dim" else rows * columns / (rows + columns)
        chosen = max(round(rank * size), 1) if rank > 0 else 0
        if 1 <= chosen <= most and multiple <= most:
            chosen = min(max(round(chosen / multiple), 1) * multiple, most)
    if not 1 <= chosen <= most:
        raise ValueError(
            f"rank={rank} with rank_rule={rule!r} gives a matrix [{rows}, {columns}] the rank {chosen}; it "
            f"can have 1 to {most}."
        )
    return chosen


def he_factors(
    key: jax.Array, init: Callable[..., jax.Array], shape: tuple[int, int], rank: int
) -> tuple[jax.Array, jax.Array]:
    """Returns independent U and V^T: U is drawn like columns of the dense kernel, V^T with variance 1/rank.

    The outputs of U V^T have the same variance as the dense kernel's outputs, whatever the rank.
    """
    key_u, key_v = jax.random.split(key)
    u_XR = init(key_u, shape, jnp.float32)[:, :rank]
    v_RY = jax.random.normal(key_v, (rank, shape[1])) * rank**-0.5
    return u_XR, v_RY


def spectral_factors(
    kernel: jax.Array, rank: int, *, ones: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of the best approximation of this rank; each has the roots of the singular values.

    Args:
      kernel: [..., X, Y], finite.
      rank: R.
      ones: a number that replaces every singular value; None for the true values.

    Returns:
      U [..., X, R] and V^T [..., R, Y], float32.
    """
    left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    values = values[..., :rank]
    root = jnp.sqrt(values if ones is None else jnp.full_like(values, ones))
    return left[..., :rank] * root[..., None, :], root[..., :, None] * right[..., :rank, :]


def decomposition(
    kernel: jax.Array, gram: jax.Array | None = None, *, damping: float = 1e-6
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the singular value decomposition of kernels W, or of the outputs X W for inputs X.

    With a gram matrix X^T X of the inputs, the result has the singular values of X W. The rank-r part of
    left * values @ right is then the rank-r matrix that changes X W least (SVD-LLM, arXiv 2403.07378).

    Args:
      kernel: W [..., X, Y], finite.
      gram: second moments of the inputs [..., X, X], of any scale; None decomposes W itself.
      damping: minimum of the gram's eigenvalues, as a fraction of their mean. Directions that the inputs
        hardly use then have a small weight instead of none.

    Returns:
      left [..., X, R], values [..., R] in descending order, right [..., R, Y]; all float32. W is
      left * values @ right.
    """
    kernel = kernel.astype(jnp.float32)
    if gram is None:
        left, values, right = jnp.linalg.svd(kernel, full_matrices=False)
        return left, values, right
    squares, basis = jnp.linalg.eigh(gram.astype(jnp.float32))
    mean = squares.mean(-1, keepdims=True)
    squares = jnp.where(mean > 0, jnp.maximum(squares, damping * mean), 1.0)
    root, turned = jnp.sqrt(squares)[..., :, None], _product(jnp.swapaxes(basis, -2, -1), kernel)
    left, values, right = jnp.linalg.svd(root * turned, full_matrices=False)
    return _product(basis, left / root), values, right


def truncated(
    left: jax.Array, values: jax.Array, right: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array]:
    """Returns balanced factors U and V^T of this rank from the result of `decomposition`."""
    return balanced(left[..., :rank], values[..., :rank, None] * right[..., :rank, :])


def balanced(u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 factors with the same product and U^T U = V^T V.

    Adaptive optimisers depend on how the product is split into factors.
    """
    q_u, r_u = jnp.linalg.qr(u.astype(jnp.float32))
    q_v, r_v = jnp.linalg.qr(jnp.swapaxes(v, -2, -1).astype(jnp.float32))
    core = _product(r_u, jnp.swapaxes(r_v, -2, -1))
    left, values, right = jnp.linalg.svd(core, full_matrices=False)
    root = jnp.sqrt(values)
    of_v = _product(root[..., :, None] * right, jnp.swapaxes(q_v, -2, -1))
    return _product(q_u, left) * root[..., None, :], of_v


def rank_for_energy(values: jax.Array, energy: float) -> int:
    """Returns the smallest rank that preserves this fraction of the sum of squared singular values [..., R].

    Stacked matrices share one rank: the largest that any of them needs.

    Raises:
      ValueError: the fraction is outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"rank={energy} with rank_rule='energy' must lie in (0, 1].")
    squares = np.square(np.asarray(values, np.float64))
    total = np.cumsum(squares, axis=-1)
    # Rank 1 suffices for a zero matrix.
    enough = total >= energy * total[..., -1:] * (1 - 1e-12)
    return int(enough.argmax(-1).max()) + 1


def frobenius_decay(u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of 1/2 |U V^T|^2 (Khodak et al., arXiv 2105.01029): U (V^T V) and (U^T U) V^T."""
    gram_u, gram_v = jnp.swapaxes(u, -2, -1) @ u, v @ jnp.swapaxes(v, -2, -1)
    return u @ gram_v, gram_u @ v


def singular_values(u: jax.Array, v: jax.Array) -> jax.Array:
    """Returns the singular values of each product u v, [..., R], in descending order, float32.

    They equal the singular values of R_u R_v^T, where u = Q_u R_u and v^T = Q_v R_v, so no matrix is
    larger than the factors.
    """
    wide = jnp.float32
    r_u = jnp.linalg.qr(u.astype(wide), mode="r")
    r_v = jnp.linalg.qr(jnp.swapaxes(v, -2, -1).astype(wide), mode="r")
    return jnp.linalg.svd(_product(r_u, jnp.swapaxes(r_v, -2, -1)), compute_uv=False)


def singular_values_of(kernel: jax.Array) -> jax.Array:
    """Returns the singular values of dense kernels [..., X, Y], in descending order, float32."""
    return jnp.linalg.svd(kernel.astype(jnp.float32), compute_uv=False)


def recomposed(u: jax.Array, v: jax.Array) -> jax.Array:
    """Returns U V^T, computed in float32, in the dtype of u."""
    return _product(u.astype(jnp.float32), v.astype(jnp.float32)).astype(u.dtype)


def effective_rank(values: jax.Array) -> jax.Array:
    """Returns the nuclear norm divided by the operator norm, from singular values [..., R].

    The result is between 1 and R; it is 0 for a zero matrix.
    """
    largest = values.max(axis=-1)
    return jnp.where(largest > 0, values.sum(axis=-1) / jnp.where(largest > 0, largest, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Factors:
    """A factorised matrix [rows, columns] of the module at `path`; `count` matrices are stacked."""

    path: str
    shape: tuple[int, int]
    rank: int
    count: int

    @property
    def dense(self) -> int:
        """The number of parameters of the dense matrices."""
        return self.count * self.shape[0] * self.shape[1]

    @property
    def factors(self) -> int:
        """The number of parameters of the factors."""
        return self.count * self.rank * (self.shape[0] + self.shape[1])


def find_factors(params: Any) -> list[Factors]:
    """Returns all factorised matrices of a tree of arrays or shapes, in the order of the tree."""
    arrays = traverse_util.flatten_dict(params, sep="/")
    factorised = []
    for path, u in arrays.items():
        module, _, name = path.rpartition("/")
        if name == "u" and (v := arrays.get(path[:-1] + "v")) is not None:
            *stack, rows, rank = u.shape
            factorised.append(Factors(module, (rows, v.shape[-1]), rank, math.prod(stack)))
    return factorised


def is_factorised(node: Any) -> bool:
    """Returns whether a node of a tree has the two factors of a matrix."""
    return isinstance(node, Mapping) and node.get("u") is not None and node.get("v") is not None


def table(factorised: Sequence[Factors]) -> list[str]:
    """Returns lines of a table of the matrices and their total; marks factors larger than the dense matrix."""
    rows = [("layer", "matrix", "rank", "dense", "factors", "ratio")]
    for matrix in factorised:
        count = f" x {matrix.count}" if matrix.count > 1 else ""
        shape = f"{matrix.shape[0]} x {matrix.shape[1]}{count}"
        larger = " LARGER" if matrix.factors > matrix.dense else ""
        ratio = f"{matrix.factors / matrix.dense:.3f}{larger}"
        sizes = (str(matrix.rank), f"{matrix.dense:,}", f"{matrix.factors:,}", ratio)
        rows.append((matrix.path, shape, *sizes))
    if factorised:
        dense = sum(matrix.dense for matrix in factorised)
        factors = sum(matrix.factors for matrix in factorised)
        rows.append(("total", "", "", f"{dense:,}", f"{factors:,}", f"{factors / dense:.3f}"))
    return aligned(rows, right=(2, 3, 4))
