"""The interface of gradient terms, which methods add to the gradient of the loss.

Each method binds its own slot, so that one run can use several:
`gradient_terms.named.factor_decay = @factor_decay.factor_decay()`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import optax

from espalier.trainers.optim.param_axes import ParamAxes
from espalier.trainers.optim.schedules import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientTerm:
    """A term of the gradient that depends on the parameters alone, such as a decay.

    Attributes:
      added_to: (optimiser, learning rate) -> the optimiser with the term.
      no_decay: path patterns of parameters that the optimiser's own weight decay must then skip.
    """

    added_to: Callable[[optax.GradientTransformation, Schedule], optax.GradientTransformation]
    no_decay: Sequence[str] = ()


def named(**slots: GradientTerm | None) -> tuple[GradientTerm, ...]:
    """Returns the terms in the order of their slots' names, without those that are None."""
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
