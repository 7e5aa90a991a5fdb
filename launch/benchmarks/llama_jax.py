"""This project's side of the training benchmarks: the recipe that `launch.train` would run.

  python -m launch.benchmarks.llama_jax FOLDER STEPS

Reads weights.npz and tokens.npy of FOLDER (see case.py) and prints one line of JSON.
"""

import json
import os
import resource
import sys
import time
from typing import Any

from launch import environment

FILES = ("t5x_configs/models/bench_llama.gin", "t5x_configs/runs/pretrain.gin")


def main(folder: str, steps: int) -> None:
    environment.restart_with_huge_pages()
    environment.prepare()
    import jax
    import numpy as np

    from launch import gin_config
    from launch.benchmarks import case as case_lib
    from trainers import partitioning
    from trainers.compile_ahead import compiling

    case = case_lib.CASE
    config = gin_config.load(
        FILES, case_lib.bindings(case), entry="launch.train:train", unused={"TASKS": "()"}
    )
    recipe = config.arguments()["recipe"]
    program = recipe.program()
    tokens = np.load(os.path.join(folder, "tokens.npy"))
    started = float(os.environ["BENCH_PROCESS_START"])
    losses, seconds, cpu_seconds = [], [], []
    first_step = None
    with partitioning.use_mesh(program.mesh, program.rules):
        train = program.steps(1).train
        batch = recipe.abstract_batch(program.batch_sharding)
        with (
            np.load(os.path.join(folder, "weights.npz")) as weights,
            compiling(program, train, batch),
        ):
            state = initial_state(program, {name: weights[name] for name in weights.files})
        for step in range(steps):
            begin, cpu = time.perf_counter(), time.process_time()
            batch = jax.device_put(batch_of(tokens[step % len(tokens)]), program.batch_sharding)
            state, metrics = train(state, batch)
            total, weight = jax.device_get(metrics["loss"])
            jax.block_until_ready(state)
            losses.append(float(total / weight))
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu)
            first_step = first_step or time.time() - started
    report = {
        "losses": losses,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "first_loss_s": first_step,  # loss and update are one program
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "first_step_s": first_step,
        "tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    print(json.dumps(report))


def initial_state(program: Any, weights: dict[str, Any]) -> Any:
    """The state of step 0 with the peer's weights."""
    import jax

    from launch.benchmarks import case as case_lib

    params = case_lib.params_of(weights)
    abstract = program.abstract_state.params
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    state = program.init()
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
    return state.replace(params=placed)


def batch_of(rows: Any) -> dict[str, Any]:
    """Rows as one document each; like the peer, the last token of a row predicts nothing."""
    import numpy as np

    weights = np.ones(rows.shape, np.float32)
    weights[:, -1] = 0
    return {
        "decoder_input_tokens": rows,
        "decoder_target_tokens": np.roll(rows, -1, axis=1),
        "decoder_loss_weights": weights,
        "decoder_segment_ids": np.ones_like(rows),
        "decoder_positions": np.tile(np.arange(rows.shape[1], dtype=np.int32), (len(rows), 1)),
        "source_ids": np.zeros(len(rows), np.int32),
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
