"""This project's side of the training benchmarks: the recipe of `launch.train`."""

import json
import os
import pathlib
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

_MODELS = "t5x_configs/models"


def side(folder: str, steps: str) -> dict[str, Any]:
    """Trains on the files of case.write_training or moe_case.write; returns losses, times and memory."""
    import numpy as np

    recipe = recipe_of(json.loads(pathlib.Path(folder, "case.json").read_bytes()))
    tokens = np.load(os.path.join(folder, "tokens.npy"))
    return train(recipe, peer_params(folder), [batch_of(rows) for rows in tokens], int(steps))


def train(
    recipe: Any, params: Any, batches: Sequence[Mapping[str, Any]], steps: int
) -> dict[str, Any]:
    """Trains from `params` on the batches in turn; returns losses, times and memory."""
    import jax

    from espalier.trainers import partitioning

    program = recipe.program()
    started = float(os.environ["BENCH_PROCESS_START"])
    losses, seconds, cpu_seconds = [], [], []
    first_step = None
    with partitioning.use_mesh(program.mesh, program.rules):
        step = program.steps(1).train
        batch = recipe.abstract_batch(program.batch_sharding)
        with program.compiling(step, batch):
            state = initial_state(program, params)
        for i in range(steps):
            begin, cpu = time.perf_counter(), time.process_time()
            batch = jax.device_put(batches[i % len(batches)], program.batch_sharding)
            state, metrics = step(state, batch)
            total, weight = jax.device_get(metrics["loss"])
            jax.block_until_ready(state)
            losses.append(float(total / weight))
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu)
            first_step = first_step or time.time() - started
    return {
        "losses": losses,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "first_loss_s": first_step,  # loss and update are one program
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "first_step_s": first_step,
        "tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def recipe_of(case: Mapping[str, Any]) -> Any:
    """Returns the recipe of a case; LoRA at all projections if it has a `lora_rank`."""
    bindings: dict[str, Any] = {"TASK_FEATURE_LENGTHS": {"targets": case["length"]}}
    model, methods = f"{_MODELS}/bench_llama.gin", []
    if "lora_rank" in case:
        methods = ["t5x_configs/methods/adapters/lora.gin"]
        bindings["LORA_RANK"] = case["lora_rank"]
    if "num_experts" in case:
        model = f"{_MODELS}/mixtral_8x7b.gin"
        sizes = {x: case[x] for x in ("num_layers", "embed_dim", "num_heads", "vocab_size")}
        sizes |= {"num_kv_heads": case["num_heads"], "mlp_dim": case["mlp_dim"]}
        sizes |= {"scan_layers": False, "remat": "none"}
        bindings |= {f"config.TransformerConfig.{name}": size for name, size in sizes.items()}
        bindings |= {"DTYPE": "float32", "moe.MoeMlp.num_experts": case["num_experts"]}
        bindings["moe.MoeMlp.top_k"] = case["top_k"]
    if "head_dim" in case:
        model = f"{_MODELS}/qwen3_30b_a3b.gin"
        bindings["moe.MoeMlp.expert_dim"] = case["mlp_dim"]
        for name in ("num_kv_heads", "head_dim"):
            bindings[f"config.TransformerConfig.{name}"] = case[name]
    return recipe_with(case, model, methods, bindings)


def recipe_with(
    case: Mapping[str, Any], model: str, methods: Sequence[str], bindings: Mapping[str, Any]
) -> Any:
    """Returns a recipe with the peer's optimiser: no gradient clipping, constant learning rate."""
    from espalier.launch.config import gin_config

    values = {
        "MODEL_DIR": "unused",
        "MIXTURE_OR_TASK_NAME": "unused",
        "BATCH_SIZE": case["batch_size"],
        "schedules.constant.peak": case["learning_rate"],
        "optimizers.adamw.b1": case["b1"],
        "optimizers.adamw.b2": case["b2"],
        "optimizers.adamw.eps": case["adam_eps"],
        "optimizers.adamw.weight_decay": case["weight_decay"],
        "optimizers.adamw.max_grad_norm": None,
        **bindings,
    }
    lines = [f"{name}={value!r}" for name, value in values.items()]
    config = gin_config.load(
        (model, "t5x_configs/runs/pretrain.gin", *methods),
        [*lines, "recipe.Recipe.learning_rate=@schedules.constant()"],
        entry="espalier.launch.train:train",
        unused={"TASKS": "()"},
    )
    return config.arguments()["recipe"]


def peer_params(folder: str) -> Any:
    """Returns the peer's weights as this project's parameters."""
    from espalier.model.hf.load import load
    from espalier.model.transforms import layer_stack

    model, params = load(os.path.join(folder, "model"))
    return layer_stack.unroll(params, model.config)


def initial_state(program: Any, params: Any) -> Any:
    """Returns the state of step 0 with the parameters `params`; adapters have their initial values."""
    import jax
    from flax import traverse_util

    from espalier.model.adapters import adapter

    state = program.init()
    whole, loaded = (traverse_util.flatten_dict(x, sep="/") for x in (state.params, params))
    assert set(whole) - set(loaded) == {path for path in whole if adapter.is_adapter(path)}
    placed = {path: jax.device_put(x, whole[path].sharding) for path, x in loaded.items()}
    return state.replace(params=traverse_util.unflatten_dict({**whole, **placed}, sep="/"))


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
