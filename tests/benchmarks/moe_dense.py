"""Forward and backward pass of a mixture of MLPs against one dense MLP of equal active FLOPs, float32.

The dense MLP is as wide as all experts of one token together. The mixtures have the sizes of `moe_step`.
"""

import operator
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from tests.benchmarks import compare, moe_case

_TOKENS = 4096


def run(*, repeats: int = 12) -> dict[str, Any]:
    """Alternates mixture and dense MLP `repeats` times in one process."""
    return {
        f"{experts}_experts": _compare(experts, hidden, repeats)
        for experts, hidden in moe_case.HIDDEN.items()
    }


def _compare(experts: int, hidden: int, repeats: int) -> dict[str, Any]:
    top_k = moe_case.SIZES["top_k"]
    mixture = MoeMlp(_config(hidden), num_experts=experts, top_k=top_k)
    steps = {"mixture": _step(mixture), "dense": _step(GatedMlp(_config(top_k * hidden)))}
    times = compare.alternate(steps, repeats, warm_up=1)
    seconds, cpu = (compare.each(times, operator.itemgetter(i)) for i in (0, 1))
    return {
        "tokens": _TOKENS,
        "mixture_over_dense": compare.ratio(seconds["mixture"], seconds["dense"]),
        "cpu_seconds_mixture_over_dense": compare.ratio(cpu["mixture"], cpu["dense"]),
        "seconds": {name: sorted(values)[repeats // 2] for name, values in seconds.items()},
    }


def _config(hidden: int) -> TransformerConfig:
    sizes = {name: moe_case.SIZES[name] for name in ("vocab_size", "embed_dim", "num_heads")}
    return TransformerConfig(**sizes, num_layers=1, mlp_dim=hidden)


def _step(mlp: nn.Module) -> Callable[[], tuple[float, float]]:
    """Returns a function that computes the gradients of parameters and input, and returns wall and CPU seconds."""
    shape = (1, _TOKENS, moe_case.SIZES["embed_dim"])
    x_BTD, weight_BTD = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    params = nn.meta.unbox(mlp.init(jax.random.key(2), x_BTD)["params"])

    # `weight_BTD` is an argument, because XLA could fold computations with a constant at compile time.
    def loss(params: Any, x_BTD: jax.Array, weight_BTD: jax.Array) -> jax.Array:
        return jnp.sum(mlp.apply({"params": params}, x_BTD) * weight_BTD)

    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x_BTD, weight_BTD).compile()

    def timed() -> tuple[float, float]:
        begin, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(step(params, x_BTD, weight_BTD))
        return time.perf_counter() - begin, time.process_time() - used

    return timed
