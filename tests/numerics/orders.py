"""Sums of eight bfloat16 arrays in the orders in which chips may add them, each partial sum rounded to bfloat16.

Shapes: P = 8 devices, N elements.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

DEVICES = 8
# float32: the reference. ascending, descending: one chain from the first or the last device. ring: each eighth of the elements
# is a chain that begins at another device, as in a reduce-scatter. pairs: neighbours, then pairs of pairs, as in a tree.
ORDERS = ("float32", "ascending", "descending", "ring", "pairs")


def rounded(x: jax.Array) -> jax.Array:
    """Returns float32 values rounded to bfloat16, as float32; XLA may drop a conversion, but not this."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def total(terms_PN: jax.Array, order: str) -> jax.Array:
    """Returns the sum over P as float32 [N]; the sum of two bfloat16 values in float32 is exact enough to round once."""
    terms_PN = terms_PN.astype(jnp.float32)
    if order == "float32":
        return _chain(terms_PN, lambda x: x)
    if order == "descending":
        return _chain(terms_PN[::-1], rounded)
    if order == "ring":
        block_N = jnp.arange(terms_PN.shape[1]) * DEVICES // terms_PN.shape[1]
        places_PN = (jnp.arange(DEVICES)[:, None] + block_N[None] + 1) % DEVICES
        return _chain(jnp.take_along_axis(terms_PN, places_PN, axis=0), rounded)
    if order == "pairs":
        while len(terms_PN) > 1:
            terms_PN = rounded(terms_PN[::2] + terms_PN[1::2])
        return terms_PN[0]
    assert order == "ascending"
    return _chain(terms_PN, rounded)


def _chain(terms_PN: jax.Array, after: Callable[[jax.Array], jax.Array]) -> jax.Array:
    partial_N = terms_PN[0]
    for term_N in terms_PN[1:]:
        partial_N = after(partial_N + term_N)
    return partial_N
