"""This project's side of the training benchmarks: the recipe of `launch.train`.

  python -m launch.benchmarks.jax.llama_jax FOLDER STEPS

Reads FOLDER, written by case.py or moe_case.py, and prints one line of JSON.
"""

import json
import os
import resource
import sys
import time
from typing import Any

from launch import environment

FILES = ("t5x_configs/models/bench_llama.gin", "t5x_configs/runs/pretrain.gin")
MIXTURE_FILES = ("t5x_configs/models/mixtral_8x7b.gin", "t5x_configs/runs/pretrain.gin")


def main(folder: str, steps: int) -> None:
    environment.restart_with_huge_pages()
    environment.prepare()
    import jax
    import numpy as np

    from trainers import partitioning

    with open(os.path.join(folder, "case.json"), encoding="utf-8") as file:
        recipe = recipe_of(json.load(file))
    program = recipe.program()
    params = peer_params(folder)
    tokens = np.load(os.path.join(folder, "tokens.npy"))
    started = float(os.environ["BENCH_PROCESS_START"])
    losses, seconds, cpu_seconds = [], [], []
    first_step = None
    with partitioning.use_mesh(program.mesh, program.rules):
        train = program.steps(1).train
        batch = recipe.abstract_batch(program.batch_sharding)
        with program.compiling(train, batch):
            state = initial_state(program, params)
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


def recipe_of(case: dict[str, Any]) -> Any:
    """Returns the recipe of a case, with the peer's optimiser."""
    from launch.benchmarks import case as case_lib
    from launch.benchmarks import moe_case
    from launch.config import gin_config

    files, bindings = FILES, case_lib.bindings(case)
    if "num_experts" in case:
        files, bindings = MIXTURE_FILES, [*bindings, *moe_case.bindings(case)]
    config = gin_config.load(files, bindings, entry="launch.train:train", unused={"TASKS": "()"})
    return config.arguments()["recipe"]


def peer_params(folder: str) -> Any:
    """Returns the peer's weights as this project's parameters."""
    import numpy as np

    from launch.benchmarks import case as case_lib
    from model.hf.load import load
    from model.transforms import layer_stack

    if os.path.exists(checkpoint := os.path.join(folder, "checkpoint")):
        model, params = load(checkpoint)
        return layer_stack.unroll(params, model.config)
    with np.load(os.path.join(folder, "weights.npz")) as weights:
        return case_lib.params_of({name: weights[name] for name in weights.files})


def initial_state(program: Any, params: Any) -> Any:
    """Returns the state of step 0 with the parameters `params`."""
    import jax

    abstract = program.abstract_state.params
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    state = program.init()
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
    return state.replace(params=placed)


def batch_of(rows: Any) -> dict[str, Any]:
    """Returns a batch with one document per row; as for the peer, the last token of a row predicts nothing."""
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
