"""This project's side of the benchmark `accelerator`: recipes, decoders and kernels on the first device.

Shapes: B batch, T length, N query heads, K key/value heads, H head dim; R rows, E experts, X in, Y out.
"""

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.benchmarks import accelerator_case


def side(what: str, argument: str) -> dict[str, Any]:
    """Answers `describe WORKLOADS` or `measure WORKLOAD`, both JSON."""
    # The peer is in another process, and no two sides run at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    return {"describe": describe, "measure": measure}[what](json.loads(argument))


def describe(workloads: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns facts about the first device, and the layers of each training workload that fit its memory."""
    import jax

    from espalier.trainers.telemetry import flops

    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")

    def parameters(work: Mapping[str, Any], layers: int) -> int:
        recipe = recipe_of(accelerator_case.with_layers(work, layers))
        return recipe.program(devices=[device]).num_params()

    return {
        "platform": device.platform,
        "device": device.device_kind,
        "memory_bytes": memory,
        "peak_flops": flops.peak_flops(device),
        "layers": {
            name: accelerator_case.fitting_layers(
                work, (parameters(work, 1), parameters(work, 2)), memory
            )
            for name, work in workloads.items()
            if work["kind"] in ("train", "dpo")
        },
    }


def measure(work: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of one workload, seconds and FLOPs."""
    kinds = {
        "train": _train,
        "dpo": _train,
        "decode": _decode,
        "attention": _attention,
        "experts": _experts,
    }
    return kinds[work["kind"]](work)


def model_of(sizes: Mapping[str, Any], *, remat: Any = "none", param_dtype: str = "float32") -> Any:
    """Returns the model of a workload, which computes in bfloat16."""
    from espalier.model import config, transformer
    from espalier.model.moe import moe

    own = {k: v for k, v in sizes.items() if k not in ("tied", "num_experts", "top_k")}
    block: Callable[..., Any] = transformer.Block
    if "num_experts" in sizes:
        experts = {name: sizes[name] for name in ("num_experts", "top_k")}
        block = functools.partial(block, mlp=functools.partial(moe.MoeMlp, **experts))
    return transformer.Transformer(
        config=config.TransformerConfig(
            **own, dtype="bfloat16", param_dtype=param_dtype, remat=remat
        ),
        block=block,
        tie_embeddings=sizes["tied"],
    )


def recipe_of(work: Mapping[str, Any]) -> Any:
    """Returns the recipe of a training workload: AdamW on float32 parameters, all layers recomputed."""
    from espalier.trainers import inputs
    from espalier.trainers.optim import optimizers
    from espalier.trainers.preference.losses import direct
    from espalier.trainers.preference.objectives import preference
    from espalier.trainers.recipe import Recipe

    settings: dict[str, Any] = {"feature_lengths": {"targets": work["length"]}}
    if work["kind"] == "dpo":
        objective = functools.partial(preference.preference, losses=[direct.dpo])
        pairs = inputs.PackedPairs({"targets": work["length"]})
        settings = {"inputs": pairs, "objective": objective}
    return Recipe(
        model=model_of(work["model"], remat="full"),
        batch_size=work["batch_size"],
        optimizer=optimizers.adamw,
        learning_rate=1e-5,
        **settings,
    )


class PairRows:
    """A stream of rows that each hold a pair of completions of half a row, with the reference's log-probabilities."""

    source_names = ("random",)

    def __init__(self, batch_size: int, length: int, vocab_size: int):
        self.batch_size, self.length, self._vocab_size = batch_size, length, vocab_size

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`."""
        from espalier.trainers import inputs

        rows, half = hi - lo, self.length // 2
        rng = np.random.default_rng((step, lo))
        prompt = half // 4
        ids = rng.integers(4, self._vocab_size, (rows, 2, half + 1)).tolist()
        pairs = [[(text[:prompt], text[prompt:]) for text in row] for row in ids]
        return {
            **inputs.pack(pairs, np.zeros(rows), length=self.length),
            "pair_weights": np.ones((rows, 1), np.float32),
            "chosen_tokens_per_pair": np.full(rows, half + 1 - prompt, np.float32),
            "reference_log_probs": np.full((rows, 2), -float(half), np.float32),
        }


def _train(work: Mapping[str, Any]) -> dict[str, Any]:
    import jax

    from espalier.trainers.inputs import PackedTokens
    from tests.benchmarks.step_side import StepSide

    recipe, device = recipe_of(work), jax.devices()[0]
    sizes = (recipe.batch_size, recipe.length, recipe.model.config.vocab_size)
    document = recipe.length
    rows = None
    if work["kind"] == "dpo":
        rows, document = PairRows(*sizes), recipe.length // 2
    side = StepSide(recipe, rows, devices=[device])
    seconds = [side.step() for _ in range(accelerator_case.WARM_UP + work["steps"])]
    per_token = 3.0 * recipe.model.forward_flops(PackedTokens(document).arrays(1))
    return {
        "seconds": statistics.median(seconds[accelerator_case.WARM_UP :]),
        "tokens": recipe.units_per_batch,
        "flops": per_token * recipe.units_per_batch,
        "parameters": side.parameters,
        "peak_memory_mb": _peak_megabytes(device),
    }


def _peak_megabytes(device: Any) -> float | None:
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 1e6


def _decode(work: Mapping[str, Any]) -> dict[str, Any]:
    """Greedy decoding with both caches; "seconds" are those of a token."""
    import flax.linen as nn
    import jax

    from espalier.model.kv_cache.policies import policy_named
    from espalier.trainers import initialise
    from espalier.trainers.decoding.decoder import Decoder, Stats
    from espalier.trainers.decoding.settings import Settings
    from tests.benchmarks import case

    model = model_of(work["model"], param_dtype="bfloat16")
    params = jax.jit(
        lambda: nn.meta.unbox(initialise.variables(model, jax.random.key(0))["params"])
    )()
    prompts = case.prompts(work["model"], work["batch_size"], work["length"])
    policies = {
        "full": policy_named("full"),
        "snapkv": policy_named("snapkv", **work["snapkv"]),
    }
    report: dict[str, Any] = {"new": work["new"]}
    for name, policy in policies.items():
        decoder = Decoder(
            model,
            params,
            Settings(max_new_tokens=work["new"]),
            policy=policy,
            batch_size=len(prompts),
        )
        times = []
        for _ in range(1 + work["steps"]):
            decoder.stats = Stats()
            decoder(prompts)
            times.append((decoder.stats.decode_seconds, decoder.stats.prefill_seconds))
        decoding, prefill = (statistics.median(part) for part in zip(*times[1:], strict=True))
        report[name] = {
            "seconds": decoding / (work["new"] - 1),
            "prefill_seconds": prefill,
            "cache_bytes": decoder.stats.cache_bytes,
        }
    return report


def kernels(work: Mapping[str, Any]) -> dict[str, tuple[Any, list[Any], float]]:
    """Returns the kernels of a workload of kind 'attention' or 'experts' by name.

    Each is a function of arrays that returns gradients of all but its last argument, the shapes of the arrays, and
    its FLOPs, of which the forward pass is a part.
    """
    return (_attention_kernels if work["kind"] == "attention" else _expert_kernels)(work)


def _attention_kernels(work: Mapping[str, Any]) -> dict[str, tuple[Any, list[Any], float]]:
    import jax
    import jax.numpy as jnp

    from espalier.model.flops import mean_keys
    from espalier.model.kernels.attention_ops import dot_product_attention

    B, T, N, H = (work[name] for name in ("batch_size", "length", "num_heads", "head_dim"))
    document = T // work["documents"]

    def gradients(options: Mapping[str, Any], q, k, v, segments_BT):
        segments = {"q_segments_BT": segments_BT} if options.get("packed") else {}

        def loss(q, k, v):
            out = dot_product_attention(q, k, v, window=options.get("window"), **segments)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    heads = (N, work["num_kv_heads"], work["num_kv_heads"])
    arrays: list[Any] = [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in heads]
    arrays.append(jax.ShapeDtypeStruct((B, T), jnp.int32))

    def flops(keys: float) -> float:
        # Two products forward, and five backward, of which one computes the weights again.
        return 7 * 2.0 * B * T * keys * N * H

    options: dict[str, tuple[dict[str, Any], float]] = {
        "causal": ({}, mean_keys(T)),
        "window": ({"window": work["window"]}, mean_keys(T, work["window"])),
        "packed": ({"packed": True}, mean_keys(document)),
    }
    return {
        name: (functools.partial(gradients, chosen), arrays, flops(keys))
        for name, (chosen, keys) in options.items()
    }


def _expert_kernels(work: Mapping[str, Any]) -> dict[str, tuple[Any, list[Any], float]]:
    import jax
    import jax.numpy as jnp

    from espalier.model.moe.grouped_matmul import grouped_matmul

    R, X, Y = work["rows"], work["embed_dim"], work["mlp_dim"]

    def gradients(rows_RX, kernel_EXY, sizes_E):
        def loss(rows_RX, kernel_EXY):
            out = grouped_matmul(rows_RX, kernel_EXY, sizes_E)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1))(rows_RX, kernel_EXY)

    E = work["num_experts"]
    arrays = [
        jax.ShapeDtypeStruct((R, X), jnp.bfloat16),
        jax.ShapeDtypeStruct((E, X, Y), jnp.bfloat16),
        jax.ShapeDtypeStruct((E,), jnp.int32),
    ]
    return dict.fromkeys(
        accelerator_case.expert_sizes(work), (gradients, arrays, 3 * 2.0 * R * X * Y)
    )


def _attention(work: Mapping[str, Any]) -> dict[str, Any]:
    T = work["length"]
    documents_T = 1 + np.arange(T, dtype=np.int32) // (T // work["documents"])
    segments_BT = np.tile(documents_T, (work["batch_size"], 1))
    return _timed(work, dict.fromkeys(kernels(work), segments_BT))


def _experts(work: Mapping[str, Any]) -> dict[str, Any]:
    sizes = accelerator_case.expert_sizes(work)
    return _timed(work, {name: np.array(of_one, np.int32) for name, of_one in sizes.items()})


def _timed(work: Mapping[str, Any], last: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns seconds and FLOPs of every kernel on random arrays; `last` are the last arguments by name."""
    import jax

    report = {}
    for name, (function, shapes, flops) in kernels(work).items():
        arrays = [
            jax.random.normal(jax.random.key(i), shape.shape, shape.dtype)
            for i, shape in enumerate(shapes[:-1])
        ]
        arguments = (*arrays, jax.device_put(last[name]))
        compiled = jax.jit(function)
        jax.block_until_ready([compiled(*arguments) for _ in range(accelerator_case.WARM_UP)])
        began = time.perf_counter()
        for _ in range(work["steps"]):
            out = compiled(*arguments)
        jax.block_until_ready(out)  # a device runs programs in order
        report[name] = {
            "seconds": (time.perf_counter() - began) / work["steps"],
            "flops": flops,
        }
    return report
