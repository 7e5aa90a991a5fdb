"""The cost of a save every ten updates of a model of 2.6M parameters: the same loop with and without saves."""

import itertools
import tempfile
import time
from typing import Any

import jax
import numpy as np

from espalier.launch.config import gin_config
from espalier.trainers import partitioning
from espalier.trainers.batches import global_batch
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from tests.benchmarks import compare
from tests.benchmarks.case import RandomRows

CONFIG = "t5x_configs/experiments/code_mix/quickstart_text.gin"
# Larger than the quickstart's model, so that there is something to save.
SIZES = (
    "config.TransformerConfig.num_layers=4",
    "config.TransformerConfig.embed_dim=192",
    "OPTIMIZER=@optimizers.adamw",
    "TASK_FEATURE_LENGTHS={'targets': 256}",
)
EVERY = 10


def run(*, repeats: int = 12, steps: int = 20) -> dict[str, Any]:
    """Alternates `repeats` blocks of `steps` updates with saves and without."""
    bindings = ["MODEL_DIR='unused'", *SIZES]
    config = gin_config.load([CONFIG], bindings, entry="espalier.launch.train:train")
    recipe = config.arguments()["recipe"]
    program = recipe.program()
    step_fn = program.steps(1).train
    stream = RandomRows(recipe.batch_size, recipe.length, recipe.model.config.vocab_size)
    with (
        partitioning.use_mesh(program.mesh, program.rules),
        tempfile.TemporaryDirectory() as directory,
        Checkpointer(directory, keep_last=2) as checkpointer,
    ):
        batch = global_batch(stream, 0, program.batch_sharding)
        state = program.init()
        blocking: list[float] = []
        numbers = itertools.count(1)

        def block(save: bool) -> float:
            """Makes `steps` updates and returns their seconds, until saves are complete."""
            nonlocal state
            begin = time.perf_counter()
            metrics = None
            for step in itertools.islice(numbers, steps):
                state, metrics = step_fn(state, batch)
                if save and step % EVERY == 0:
                    jax.block_until_ready(state)
                    since = time.perf_counter()
                    checkpointer.save(step, state, meta={"data_step": step})
                    blocking.append(time.perf_counter() - since)
            jax.block_until_ready((state, metrics))
            if save:  # The last save's thread must not run into a block without saves.
                checkpointer.wait()
            return time.perf_counter() - begin

        block(save=True)  # compiles, and warms the disk
        times = compare.alternate({True: lambda: block(True), False: lambda: block(False)}, repeats)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {
        "state_megabytes": size / 1e6,
        "updates_per_save": EVERY,
        "step_seconds": float(np.median(times[False]) / steps),
        "blocking_ms_per_save": float(np.median(blocking) * 1e3),
        "time_with_over_without": compare.ratio(times[True], times[False]),
    }
