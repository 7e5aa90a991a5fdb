"""A training step with low-rank factors (rank 1/8 of the width) against the dense step: time, state and FLOPs.

The model has blocks of width 1,024 and a small vocabulary, so that nearly all parameters are factorised.
"""

import time
from typing import Any

import jax

from launch.benchmarks import compare
from launch.benchmarks.case import RandomRows
from launch.config import gin_config
from model.low_rank import factors
from trainers import partitioning
from trainers.batches import global_batch
from trainers.recipe import Recipe

FILES = ("t5x_configs/models/bench_blocks.gin", "t5x_configs/runs/pretrain.gin")
LOW_RANK = "t5x_configs/methods/low_rank/low_rank.gin"
BINDINGS = (
    "MODEL_DIR='unused'",
    "MIXTURE_OR_TASK_NAME='unused'",
    "TASKS=()",
    "BATCH_SIZE=4",
    "TASK_FEATURE_LENGTHS={'targets': 256}",
)
RANK = 0.125


def run(*, repeats: int = 12) -> dict[str, Any]:
    """Alternates `repeats` steps of both models, each with AdamW and the weight decay of its gin file."""
    sides = {"dense": _Side(()), "low_rank": _Side((LOW_RANK,))}
    steps = {name: side.step for name, side in sides.items()}
    times = compare.alternate(steps, repeats, warm_up=1)
    factorised = factors.find_factors(sides["low_rank"].params)
    return {
        "rank_fraction": RANK,
        "tokens": 4 * 256,
        "step_seconds": {name: sorted(times[name])[repeats // 2] for name in sides},
        "low_rank_over_dense": compare.ratio(times["low_rank"], times["dense"]),
        "parameters": {name: side.parameters for name, side in sides.items()},
        "state_megabytes": {name: side.megabytes for name, side in sides.items()},
        "factors_over_matrices": sum(x.factors for x in factorised)
        / sum(x.dense for x in factorised),
        "compiled_flops": {name: side.flops for name, side in sides.items()},
    }


class _Side:
    """One model with its state and compiled training step."""

    def __init__(self, files: tuple[str, ...]):
        bindings = [*BINDINGS, *([f"RANK={RANK}"] if files else [])]
        config = gin_config.load([*FILES, *files], bindings, entry="launch.train:train")
        recipe: Recipe = config.arguments()["recipe"]
        program = recipe.program()
        self._mesh = program.mesh, program.rules
        rows = RandomRows(recipe.batch_size, recipe.length, recipe.model.config.vocab_size)
        with partitioning.use_mesh(*self._mesh):
            self._batch = global_batch(rows, 0, program.batch_sharding)
            self._state = program.init()
            step = program.steps(1).train
            self._step = step.lower(self._state, self._batch).compile()
        self.params = program.abstract_state.params
        self.parameters = program.num_params()
        self.megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state)) / 1e6
        self.flops = self._step.cost_analysis()["flops"]

    def step(self) -> float:
        """Runs one update and returns its time in seconds."""
        begin = time.perf_counter()
        with partitioning.use_mesh(*self._mesh):
            self._state, metrics = self._step(self._state, self._batch)
            jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - begin
