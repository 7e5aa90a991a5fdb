"""The extensions of the train step: what a method keeps in the state besides parameters and optimiser, and does in each step.

Moving averages of parameters, the policy for bad steps and a reference that moves are extensions. `Recipe.step_extensions` lists
those of a run; the step, the state's first value and its shardings, and checkpoints know them by this interface alone.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from espalier.trainers import trainable
from espalier.trainers.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """An update of the parameters, before the extensions have seen it.

    Attributes:
      step: the number of updates so far, this one included.
      trained, frozen: the parameters after the update, as `trainable.split` has them.
      opt_state: the optimiser's state after the update.
      extras: the objective's extras as they are stored, see objectives/base.py.
      loss: the batch's mean loss.
      grad_norm: norm of its gradient, before clipping.
      counts: what layers counted over the whole batch, by path as parameters are; None if they count nothing.
    """

    step: jax.Array
    trained: Any
    frozen: Any
    opt_state: Any
    extras: Any
    loss: jax.Array
    grad_norm: jax.Array
    counts: Any = None

    @property
    def params(self) -> Any:
        """All parameters after the update."""
        return trainable.join(self.trained, self.frozen)


class StepExtension:
    """A part of the state, and what is done with it in each step. A subclass overrides what it needs.

    Attributes:
      name: of the part, see `TrainState.part`.
      like_params: whether the part has an array for each parameter, which is split over devices as the parameter is.
      of_data: whether the part is set to zeros where a new phase begins, such as statistics of the data.
      reads_counts: whether it reads `Update.counts`; layers that count need such an extension.
    """

    name: ClassVar[str]
    like_params: ClassVar[bool] = False
    of_data: ClassVar[bool] = False
    reads_counts: ClassVar[bool] = False

    def init(self, params: Any, mask: Any) -> Any:
        """Returns the part of a new run; `mask` is True where parameters are trained, None for all.

        None stands for an extension without a part, which is not asked for its `update`.
        """
        raise NotImplementedError

    def objective_extras(self, extras: Any, part: Any) -> Any:
        """Returns the extras that the objective reads in this step, instead of the stored ones; in evaluation too."""
        del part
        return extras

    def constants(self, update: Update) -> Any:
        """Returns `update.frozen` with new values of data among the parameters (axes.constant).

        All extensions do this before any part is updated, so that averages see the values.
        """
        return update.frozen

    def update(self, part: Any, update: Update) -> Any:
        """Returns the part after an update."""
        del update
        return part

    def gate(self, part: Any, update: Update) -> tuple[jax.Array, Any] | None:
        """Returns whether the update is to be applied, and the part after it either way; None for no opinion.

        An update that is not applied leaves parameters, optimiser, collections and the other parts as they were.
        """
        del part, update
        return None


def named(**slots: StepExtension | None) -> tuple[StepExtension, ...]:
    """Returns the extensions in the order of their slots' names, without slots that are None.

    Each method binds its own slot, so that one run can use several: `extensions.named.mine = @mine.Mine()`.
    """
    return tuple(extension for _, extension in sorted(slots.items()) if extension is not None)


def with_constants(extensions: Sequence[StepExtension], update: Update) -> Update:
    """Returns the update with the values that extensions give to data among the parameters.

    Raises:
      ValueError: layers count something for the step, and no extension reads it.
    """
    if update.counts and not any(each.reads_counts for each in extensions):
        names = ", ".join(
            sorted(
                {
                    trainable.path_name(path)
                    for path, _ in jax.tree_util.tree_leaves_with_path(update.counts)
                }
            )
        )
        raise ValueError(
            f"Layers count {names} for an extension of the step, and this run has none that reads it, so that what the counts "
            "should move would stay as it is: add the extension (of choice_bias: methods/moe/balance_bias.gin, where "
            "BIAS_RATE = 0 keeps the biases), or turn counting off."
        )
    for each in extensions:
        update = dataclasses.replace(update, frozen=each.constants(update))
    return update


def of_model(extensions: Iterable[StepExtension], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the collections of a state that belong to the model and not to an extension."""
    names = {extension.name for extension in extensions}
    return {name: tree for name, tree in variables.items() if name not in names}


def present_extras(
    extensions: Iterable[StepExtension], extras: Any, variables: Mapping[str, Any]
) -> Any:
    """Returns the extras that the objective reads with these collections of a state."""
    for extension in extensions:
        extras = extension.objective_extras(extras, variables.get(extension.name))
    return extras


def gated(
    extensions: Iterable[StepExtension], update: Update, before: TrainState, after: TrainState
) -> tuple[TrainState, jax.Array | None]:
    """Returns the state after a step, and whether its update was applied; None if no extension judges updates."""
    verdicts = {
        extension.name: verdict
        for extension in extensions
        if (verdict := extension.gate(before.part(extension.name), update)) is not None
    }
    if not verdicts:
        return after, None
    good = functools.reduce(jnp.logical_and, (good for good, _ in verdicts.values()))
    chosen = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
    judged = {name: part for name, (_, part) in verdicts.items()}
    return chosen.replace(step=after.step).with_parts(judged), good
