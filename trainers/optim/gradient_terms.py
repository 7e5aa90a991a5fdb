"""The interface of gradient terms, which methods add to the gradient of the loss, and the axes by which optimisers see parameters.

Each method binds its own slot, so that one run can use several:
`gradient_terms.named.factor_decay = @factor_decay.factor_decay()`.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from espalier.model import axes
from espalier.trainers import trainable
from espalier.trainers.optim.schedules import Schedule

_STACKING = (axes.LAYERS, axes.EXPERT)


@dataclasses.dataclass(frozen=True)
class ParamAxes:
    """Logical axis names of a model's parameters, by path: they tell matrices, vectors and stacks of them apart.

    Attributes:
      names: 'layers/block_0/mlp/up/kernel' -> ('layers', 'embed', 'mlp').
      not_decayed: path patterns of parameters that a gradient term decays instead of the optimiser.
    """

    names: Mapping[str, tuple[str | None, ...]]
    not_decayed: Sequence[str] = ()

    @classmethod
    def of(cls, boxed: Any, not_decayed: Sequence[str] = ()) -> "ParamAxes":
        """Returns the axes of parameters in flax's boxes."""
        leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=axes.is_boxed)
        return cls({trainable.path_name(path): box.names for path, box in leaves}, not_decayed)

    def stack_rank(self, path: str) -> int:
        """Returns the number of leading axes that stack parameters of several layers or experts."""
        return sum(name in _STACKING for name in self.names[path])

    def decayed(self, path: str) -> bool:
        """Returns whether weight decay applies: to matrices, not to gains, biases and other vectors.

        Shrinking a vector changes a layer's scale, not its complexity.
        """
        names = self.names[path]  # gains of a per-head norm have two dimensions but are no matrix
        is_matrix = len(names) - self.stack_rank(path) >= 2 and axes.NORM not in names
        return is_matrix and not any(re.fullmatch(p, path) for p in self.not_decayed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientTerm:
    """A term of the gradient that depends only on the parameters, such as a decay.

    Attributes:
      added_to: (optimiser, learning rate) -> the optimiser with the term.
      no_decay: path patterns of parameters that the optimiser's own weight decay must then skip.
    """

    added_to: Callable[[optax.GradientTransformation, Schedule], optax.GradientTransformation]
    no_decay: Sequence[str] = ()


def named(**slots: GradientTerm | None) -> tuple[GradientTerm, ...]:
    """Returns the terms in the order of their slots' names, without slots that are None."""
    return tuple(term for _, term in sorted(slots.items()) if term is not None)


def make_optimizer(
    factory: Callable[..., optax.GradientTransformation],
    *,
    learning_rate: Schedule,
    boxed_params: Any,
    terms: Sequence[GradientTerm] = (),
) -> optax.GradientTransformation:
    """Returns the optimiser of a run, made by `factory`, with `terms` in this order.

    Args:
      factory: called with (learning_rate=) and, if it has that parameter, (param_axes=).
      boxed_params: abstract parameters in flax's boxes.

    Raises:
      ValueError: a term replaces weight decay, but `factory` has no parameter `param_axes` to exclude parameters from it.
    """
    no_decay = [pattern for term in terms for pattern in term.no_decay]
    try:
        takes_axes = "param_axes" in inspect.signature(factory).parameters
    except ValueError:  # of a builtin
        takes_axes = False
    if takes_axes:
        param_axes = ParamAxes.of(boxed_params, no_decay)
        optimizer = factory(learning_rate=learning_rate, param_axes=param_axes)
    elif no_decay:
        raise ValueError(
            f"OPTIMIZER = {getattr(factory, '__qualname__', factory)} has no parameter `param_axes`, so it would decay "
            f"parameters ({', '.join(no_decay)}) that a gradient term decays too. Use one of "
            "trainers/optim/optimizers.py, or set the term's slot in gradient_terms.named to None."
        )
    else:
        optimizer = factory(learning_rate=learning_rate)
    for term in terms:
        optimizer = term.added_to(optimizer, learning_rate)
    return optimizer
