"""The dtype that trained parameters are stored in, and stochastic rounding of the updates of narrow ones.

A bfloat16 number has 8 significant bits: an update below 1/512 of its parameter is lost if the sum is rounded to nearest. Most
updates of fine-tuning are. So trained parameters are float32, unless a run chooses a rounding:

* None: a model with a trained parameter narrower than float32 is stored in float32 as a whole. A base model that is frozen
  as a whole, as below adapters, keeps its dtype.
* 'stochastic': parameters keep the model's dtype. Updates are computed in float32, moments included, and their sums with
  the parameters are rounded up or down at random, so that the expected value is the sum (Gupta et al., arXiv 1502.02551).
  This needs half the memory of float32 parameters. A float32 copy beside bfloat16 parameters is None with
  Recipe.gradient_dtype = 'bfloat16'.
* 'nearest': parameters and moments in the model's dtype. It loses updates; it is there for runs that began so.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from espalier.trainers import trainable

Rounding = Literal["stochastic", "nearest"]

_STREAM = 2**32 - 1  # of random numbers; step s of a run has stream s for its dropout


def wide(leaf: jax.Array) -> jax.Array:
    """Returns an array in float32 if it is a narrower float, else unchanged."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if _is_narrow(leaf) else leaf


def narrow_dtypes(params: Any, mask: Any) -> list[str]:
    """Returns the names of the floats narrower than float32 that trained parameters have."""
    trained, _ = trainable.split(params, mask)
    return sorted({leaf.dtype.name for leaf in jax.tree.leaves(trained) if _is_narrow(leaf)})


def check(rounding: Rounding | None, narrow: list[str]) -> None:
    """Raises ValueError if trained parameters of these narrow dtypes cannot be rounded so, or if there are none."""
    setting = f"Recipe.rounding = {rounding!r}"
    if rounding is not None and not narrow:
        raise ValueError(
            f"{setting} has no effect: all trained parameters are float32. Set it to None, or store the model in bfloat16, "
            "config.TransformerConfig.param_dtype = 'bfloat16'."
        )
    if rounding == "stochastic" and narrow != ["bfloat16"]:
        raise ValueError(
            f"{setting} is for bfloat16, and trained parameters are {', '.join(narrow)}: set it to None, which stores them in "
            "float32, or config.TransformerConfig.param_dtype = 'bfloat16'."
        )


class Rounded(NamedTuple):
    """State of an optimiser with stochastic rounding: the number of updates, and the state of the optimiser."""

    step: jax.Array
    inner: Any


def stochastic(
    optimizer: optax.GradientTransformation, *, seed: int
) -> optax.GradientTransformation:
    """Returns an optimiser that computes in float32 and whose updates lead to stochastically rounded parameters.

    Update s of parameter i is rounded with the key fold_in(fold_in(base, s), i), where base depends on the seed alone: the
    same after a restart, and on any mesh.
    """

    def init(params: Any) -> Rounded:
        return Rounded(jnp.zeros([], jnp.int32), optimizer.init(jax.tree.map(wide, params)))

    def update(updates: Any, state: Rounded, params: Any = None) -> tuple[Any, Rounded]:
        before = jax.tree.map(wide, params)
        updates, inner = optimizer.update(jax.tree.map(wide, updates), state.inner, before)

        base = jax.random.fold_in(jax.random.key(seed), _STREAM)
        key = jax.random.fold_in(base, state.step)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.tree.unflatten(
            structure, [jax.random.fold_in(key, i) for i in range(len(leaves))]
        )

        def one(param: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
            if not _is_narrow(param):
                return update
            # The sum of the parameter and this difference, rounded to nearest, is the rounded sum; if the update shrinks a
            # parameter by more than 2^14, it is so up to an error of float32.
            return to_bfloat16(wide(param) + update, key).astype(jnp.float32) - wide(param)

        return jax.tree.map(one, params, updates, keys), Rounded(state.step + 1, inner)

    return optax.GradientTransformation(init, update)


def to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns float32 numbers rounded to one of the two nearest bfloat16 numbers, with their expected values exact.

    A bfloat16 number is the upper half of a float32 number. Adding a uniform number to the lower half carries into the upper
    one with a probability of the lower half over 2^16.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _is_narrow(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
