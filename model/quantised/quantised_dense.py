"""Projections whose products are of 8-bit numbers in training (the library qwix, extra `quantised`).

The parameters stay as they are: inputs and kernels are rounded in every step, with a scale for each row of the inputs and each
output channel, and gradients pass the rounding as if it were not there.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from espalier.common.ranges import recordable
from espalier.model.axes import parameter
from espalier.model.kernels import int8
from espalier.model.kernels.platform import reference_forms
from espalier.model.like import like
from espalier.model.linear import Dense

Numbers = Literal["int8", "float8"]
# Numbers of the forward pass, and of the gradients that the backward pass multiplies: of float8, those with a larger range.
_TYPES = {"int8": (jnp.int8, jnp.int8), "float8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


class MissingQwixError(ImportError):
    """The library qwix is not installed."""


@recordable
class QuantisedDense(Dense):
    """`Dense` with products of 8-bit numbers, by qwix.

    Attributes:
      numbers: 'int8', or 'float8', that is e4m3 and, for gradients, e5m2 (arXiv 2209.05433).
      backward: whether the products of the backward pass are of such numbers too; otherwise they are of `dtype`.

    Raises:
      MissingQwixError: qwix is not installed.
    """

    numbers: Numbers = "int8"
    backward: bool = False

    def product(self, x: jax.Array) -> jax.Array:
        if reference_forms() or self.has_variable("params", int8.SCALE):
            return super().product(x)  # rounding has no derivative; weights may be int8 already
        try:
            import qwix
        except ImportError:
            raise MissingQwixError(
                f"QuantisedDense.numbers = '{self.numbers}' needs qwix: pip install -e .[quantised]"
            ) from None
        forward, backward = _TYPES[self.numbers]
        rule = qwix.QtRule(
            module_path=".*",
            weight_qtype=forward,
            act_qtype=forward,
            bwd_qtype=backward if self.backward else None,
        )
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, shape, self.param_dtype)
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        y = qwix.QtProvider([rule]).dot_general(x, kernel.astype(self.dtype), dims)
        return y.astype(self.dtype)


@recordable
def quantised(
    *,
    dense: Callable[..., Any] = Dense,
    layer: Callable[..., Any] = QuantisedDense,
    numbers: Numbers = "int8",
    backward: bool = False,
) -> Callable[..., Any]:
    """Returns a `dense` factory of quantised layers with the settings of another factory's layers.

    Args:
      dense: the factory that this one replaces; its settings are used, such as its initialiser.
      layer: factory of the layers.
      numbers, backward: see `QuantisedDense`.

    Raises:
      ValueError: (raised by the returned factory) `dense` makes a class other than `Dense`.
    """
    return like(dense, layer, of=Dense, numbers=numbers, backward=backward)
