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
        """Returns y; see `projection` of this module. `rows` are the tokens of experts' rows."""

    def lookup(self, module: nn.Module, name: str, ids: Any, y: Any) -> jax.Array:
        """Returns y; see `lookup` of this module."""


# Part of JAX's trace cache key, like the settings of model/kernels/platform.py.
_tap = jax.make_user_context(None)
_rows: list[Any] = []


def is_active() -> bool:
    """Returns whether a tap is installed."""
    return _tap.value is not None


@contextlib.contextmanager
def installed(tap: Tap) -> Iterator[None]:
    """Context manager: models that are traced inside call the tap."""
    with _tap(tap):
        yield


@contextlib.contextmanager
def expert_rows(choices_R: jax.Array, top_k: int) -> Iterator[None]:
    """Context manager: row r inside experts is choice choices_R[r], of the token of index choices_R[r] // top_k."""
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
    """Returns the output y = x @ matrix (+ bias) of a projection, as the tap has it.

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
    """Returns the rows y [..., D] of a table at `ids`, as the tap has them."""
    tap = _tap.value
    return y if tap is None else tap.lookup(module, name, ids, y)
