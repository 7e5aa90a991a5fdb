"""One side of a benchmark of training steps within this project: a recipe on random rows, compiled."""

import time
from collections.abc import Sequence
from typing import Any

import jax

from espalier.launch.config import gin_config
from espalier.trainers import partitioning
from espalier.trainers.batches import global_batch
from espalier.trainers.recipe import Recipe
from tests.benchmarks.case import RandomRows

_UNUSED = ("MODEL_DIR='unused'", "MIXTURE_OR_TASK_NAME='unused'", "TASKS=()")


def recipe_of(files: Sequence[str], bindings: Sequence[str]) -> Recipe:
    """Returns the recipe of gin files and bindings; the run needs neither data nor a directory."""
    config = gin_config.load(files, [*_UNUSED, *bindings], entry="espalier.launch.train:train")
    return config.arguments()["recipe"]


class StepSide:
    """A model with its state and compiled training step.

    Args:
      recipe: the recipe.
      rows: the stream of its batches; None for random tokens.
      devices: devices to use; None for all.

    Attributes:
      jaxpr: what the step computes.
      params: shapes of all parameters.
      parameters, trained: their number, and the number of those that are trained.
      megabytes: of the whole state.
      flops: of a step, as the compiler counts them.
    """

    def __init__(
        self,
        recipe: Recipe,
        rows: Any = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        program = recipe.program(devices=devices)
        self._mesh = program.mesh, program.rules
        if rows is None:
            rows = RandomRows(recipe.batch_size, recipe.length, recipe.model.config.vocab_size)
        with partitioning.use_mesh(*self._mesh):
            self._batch = global_batch(rows, 0, program.batch_sharding)
            self._state = program.init()
            step = program.steps(1).train
            traced = step.trace(self._state, self._batch)
            self._step = traced.lower().compile()
        self.jaxpr = traced.jaxpr.jaxpr
        self.params = program.abstract_state.params
        self.parameters = program.num_params()
        self.trained = program.num_params(trained_only=True)
        self.megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state)) / 1e6
        self.flops = self._step.cost_analysis()["flops"]

    def step(self) -> float:
        """Runs one update and returns its time in seconds."""
        begin = time.perf_counter()
        with partitioning.use_mesh(*self._mesh):
            self._state, metrics = self._step(self._state, self._batch)
            jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - begin
