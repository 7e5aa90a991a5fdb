"""Model FLOPs: two for each multiply-add of a product, as in PaLM (arXiv 2204.02311, appendix B).

Recomputation (remat) is not counted. Attention counts only the keys that a query sees, not masked keys.
Every layer counts its own FLOPs. The default, `Counted`, multiplies a token with each weight of a matrix once;
layers that differ override it. Layers read the shapes of their parameters, because only these show the rank of a
factorised matrix.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jax.extend.core import jaxprs_in_params

from espalier.model import axes

_matrices = {"kernel"}  # names of parameters; classes that have others declare them


class Counted(nn.Module):
    """A module that multiplies each token with every weight of every matrix once.

    Its matrices are its parameters `kernel`, and those that the class attribute MATRICES names.
    """

    MATRICES: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        _matrices.update(cls.MATRICES)

    @nn.nowrap
    def flops_per_token(self, shapes: Mapping[str, Any], *, length: int) -> float:
        """Returns the FLOPs of a forward pass for one token.

        Args:
          shapes: the module's own parameters or their shapes, of one layer, unboxed.
          length: tokens per row, counted as one document; packed documents see fewer keys and need less.
        """
        return 2.0 * weights(shapes)


def weights(shapes: Mapping[str, Any]) -> int:
    """Returns the number of weights in all matrices of a tree of shapes."""
    total = 0
    for name, child in shapes.items():
        if isinstance(child, Mapping):
            total += weights(child)
        elif name in _matrices:
            total += math.prod(child.shape)
    return total


def trained_shapes(params: Any, mask: Any) -> Any:
    """Returns the shapes of `params` in which a parameter that is not trained (False in `mask`) has no weights."""

    def shape(leaf: Any, trained: bool) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape if trained else (0,) * len(leaf.shape), leaf.dtype)

    return jax.tree.map(shape, params, mask)


def logits_flops(config: Any, table: Mapping[str, Any] | None) -> float:
    """Returns the FLOPs of one token's logits; 0 if the shapes of the head's table say that it has no weights."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(table or {})]
    return 2.0 * config.vocab_size * config.embed_dim if any(sizes) or not sizes else 0.0


def mean_keys(length: int, window: int | None = None) -> float:
    """Returns the mean number of keys that a query sees under the causal mask, itself included."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def variable_shapes(model: Any, *arguments: Any) -> Any:
    """Returns the shapes and dtypes of the variables that `model.init` makes for these argument shapes."""

    def init(*arguments: Any) -> Any:
        boxed = model.init(jax.random.key(0), *arguments)
        return jax.tree.map(axes.unboxed, boxed, is_leaf=axes.is_boxed)

    return jax.eval_shape(init, *arguments)


def traced_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the FLOPs of the products and convolutions in a function's trace.

    The arguments are trees of arrays, or of shapes and dtypes. A row of a grouped product
    (jax.lax.ragged_dot) counts once, because it belongs to one group.
    """
    return _flops_of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops_of(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        operands, name = [variable.aval for variable in equation.invars], equation.primitive.name
        each = 0.0  # multiply-adds for each element of the result
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            each = math.prod(operands[0].shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            filters = equation.params["dimension_numbers"].rhs_spec[0]
            each = operands[1].size / operands[1].shape[filters]
        elif name == "ragged_dot_general":
            dims = equation.params["ragged_dot_dimension_numbers"]
            (contracted, _), _ = dims.dot_dimension_numbers
            each = math.prod(operands[0].shape[axis] for axis in contracted)
            # A group contracts only its own rows.
            if set(dims.lhs_ragged_dimensions) & set(contracted):
                each /= operands[2].size
        total += 2.0 * each * equation.outvars[0].aval.size if each else 0.0
        times = equation.params["length"] if name == "scan" else 1
        total += times * sum(map(_flops_of, jaxprs_in_params(equation.params)))
    return total
