"""The seam at which other code reads the inputs of projections, and their outputs' gradients.

Every projection calls `projection` with its input and output, once for each of its matrices. Without a tap, which is the
default, the output is returned, and programs are the same as without this module. A tap may return another array of the
same value, for example one with a backward pass of its own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import flax.linen as nn
import jax


class Tap(Protocol):
    """Receives the projections of a model while it is traced; compared by identity."""

    def projection(
        self, module: nn.Module, name: str, x: Any, y: Any, *, bias: bool, sizes: Any, rows: Any
    ) -> jax.Array:
        """Returns an array equal to y; the function `projection` describes the arguments. `rows` are the tokens of experts' rows."""

    def lookup(self, module: nn.Module, name: str, ids: Any, y: Any) -> jax.Array:
        """Returns an array equal to the rows y [..., D] of a table at `ids`."""


# Part of JAX's trace cache key, like the settings of model/kernels/platform.py.
_tap = jax.make_user_context(None)
_rows: list[Any] = []


def is_active() -> bool:
    """Returns whether a tap is installed."""
    return _tap.value is not None


@contextlib.contextmanager
def installed(tap: Tap) -> Iterator[None]:
    """Context manager that installs a tap: models that are traced inside it call the tap at every projection and table."""
    with _tap(tap):
        yield


@contextlib.contextmanager
def expert_rows(choices_R: jax.Array, top_k: int) -> Iterator[None]:
    """Context manager around experts that tells the tap which token each of their rows belongs to.

    Row r is the choice of number choices_R[r], and so belongs to the token of index choices_R[r] // top_k.
    """
    if not is_active():
        yield
        return
    _rows.append(choices_R // top_k)
    try:
        yield
    finally:
        _rows.pop()


def projection(
    module: nn.Module,
    name: str,
    x: jax.Array,
    y: jax.Array,
    *,
    bias: bool = False,
    sizes: jax.Array | None = None,
) -> jax.Array:
    """Returns the output y = x @ matrix (+ bias) of a projection: what the tap returns for it, or y without a tap.

    Args:
      module, name: the module and its parameter that is the matrix.
      x, y: input [..., X] and output [..., Y]; rows sorted by expert with `sizes`.
      bias: whether the module's parameter 'bias' is in y.
      sizes: number of rows of each expert; None for one matrix.
    """
    tap = _tap.value
    if tap is None:
        return y
    rows = _rows[-1] if _rows else None
    return tap.projection(module, name, x, y, bias=bias, sizes=sizes, rows=rows)


def lookup(module: nn.Module, name: str, ids: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the rows y [..., D] of a table at `ids`: what the tap returns for them, or y without a tap."""
    tap = _tap.value
    return y if tap is None else tap.lookup(module, name, ids, y)
