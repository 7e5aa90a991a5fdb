"""Sends tokens to rows sorted by expert, and collects the experts' results by token.

Shapes: B batch, T length, D width; M = B * T tokens, K experts per token, C = M * K choices, R rows
(`sizes_E` counts the used rows of each expert), E experts; expert E means none.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Dispatch:
    """Rows sorted by expert: row r has choice order_R[r]; choice c has row rank_C[c] if used_C[c]."""

    order_R: jax.Array
    rank_C: jax.Array
    used_C: jax.Array
    sizes_E: jax.Array


def dispatch(experts_C: jax.Array, num_experts: int, *, rows: int | None = None) -> Dispatch:
    """Sorts choices by expert, stably; choices without an expert are last.

    Args:
      experts_C: expert of each choice; num_experts for none.
      num_experts: E.
      rows: R; at most R choices may have an expert. None for one row per choice.
    """
    count = len(experts_C)
    sorted_C, order_C = jax.lax.sort((experts_C, jnp.arange(count)), num_keys=1, is_stable=True)
    rank_C = jnp.zeros_like(order_C).at[order_C].set(jnp.arange(count), unique_indices=True)
    ends_E = jnp.searchsorted(sorted_C, jnp.arange(num_experts), side="right")
    rows = count if rows is None else min(rows, count)
    return Dispatch(
        order_R=order_C[:rows],
        rank_C=jnp.minimum(rank_C, rows - 1),
        used_C=(experts_C < num_experts) & (rank_C < rows),
        sizes_E=jnp.diff(ends_E, prepend=0),
    )


def send(
    x_BTD: jax.Array, experts_BTK: jax.Array, num_experts: int, *, rows: int | None = None
) -> tuple[jax.Array, Dispatch]:
    """Returns the tokens' rows [R, D] sorted by expert, and the `Dispatch` for `collect`."""
    plan = dispatch(experts_BTK.reshape(-1), num_experts, rows=rows)
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    return x_MD[plan.order_R // experts_BTK.shape[-1]], plan


def collect(rows_RD: jax.Array, weights_BTK: jax.Array, plan: Dispatch) -> jax.Array:
    """Returns each token's weighted sum of its experts' rows, [B, T, D].

    The sum is computed in float32 and returned in the dtype of the rows. A choice without a row adds
    nothing.
    """
    rows_BTKD = by_choice(rows_RD, plan).reshape(*weights_BTK.shape, -1)
    summed = jnp.einsum("btk,btkd->btd", weights_BTK, rows_BTKD.astype(jnp.float32))
    return summed.astype(rows_RD.dtype)


def by_choice(rows_RD: jax.Array, plan: Dispatch) -> jax.Array:
    """Returns the rows in the order of the choices, [C, D]; zeros for choices without a row."""
    # `where`, not a product with zero: unused rows may contain NaN.
    return jnp.where(plan.used_C.reshape(-1, 1), rows_RD[plan.rank_C], 0)
