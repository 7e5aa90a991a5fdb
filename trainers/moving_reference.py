"""A reference that follows the policy while it trains: TR-DPO (arXiv 2404.09656)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from espalier.common.ranges import Fraction, Size
from espalier.trainers.extensions import StepExtension, Update

MOVES = "reference_moves"  # key in TrainState.variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingReference(StepExtension):
    """After every `every` updates, reference <- mix * policy + (1 - mix) * reference.

    The paper's soft update has a mix below 1, its hard update a mix of 1; the defaults are TRL's.

    The state holds how far the reference is from the checkpoint that it began with, which is 0 in a new run. So a run that
    is resumed has the same reference, and the checkpoint stays the objective's `extras`.

    Attributes:
      every: updates between two moves; an update that is dropped as bad makes no move, due or not.
      mix: share of the policy in a move.
    """

    name = MOVES
    like_params = True
    of_data = True

    every: Size = 512
    mix: Fraction = 0.6

    def __post_init__(self):
        if self.every < 1 or not 0 < self.mix <= 1:
            raise ValueError(
                f"MovingReference.every = {self.every} must be at least 1, and mix = {self.mix} in (0, 1]."
            )

    def init(self, params: Any, mask: Any = None) -> Any:
        """Returns the moves of a new run for a policy's parameters."""
        del mask
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params
        )

    def objective_extras(self, extras: Any, part: Any) -> Any:
        """Returns the present reference from the checkpoint's parameters and the moves."""
        trees: list[Any] = [jax.tree.structure(tree) for tree in (extras, part)]
        if trees[0] != trees[1]:
            raise ValueError(
                "A moving reference becomes the policy, so it must be in every step and of the policy's model: give "
                "methods/preference/tr_dpo.gin, and leave REFERENCE_MODEL as it is. A policy with new adapters cannot have one, "
                "since its reference has none."
            )
        return jax.tree.map(
            jnp.add, extras, part
        )  # in the dtype of the moves, in which the policy is trained

    def update(self, part: Any, update: Update) -> Any:
        """Returns the moves after an update of the policy."""
        due = update.step % self.every == 0

        def one(start: jax.Array, move: jax.Array, param: jax.Array) -> jax.Array:
            target = param.astype(move.dtype) - start
            return jnp.where(due, move + self.mix * (target - move), move)

        return jax.tree.map(one, update.extras, part, update.params)
