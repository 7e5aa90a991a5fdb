"""Model FLOPs, of a decoder-only transformer in closed form, and what devices could do at most.

Counts products only: two FLOPs per multiply-add, attention by the keys a token really sees,
recomputation (remat) not at all, as in PaLM (arXiv 2204.02311, appendix B). A model that is at hand is counted by
trainers/telemetry/model_flops.py.
"""

import math
import re
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one device as jax counts devices, by `device_kind`, from data sheets.
# The longest name that `device_kind` begins with, in whole words, holds.
PEAK_FLOPS = {
    "TPU v3": 61.5e12,  # a core, half a chip
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # Ironwood, a core, half a chip
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100": 125e12,  # float16
}


class Sizes(Protocol):
    """What the count needs of a model's configuration (model.config.TransformerConfig has it)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def per_head_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    def layer_kind(self, layer: int): ...


def mean_keys(length: int, window: int | None = None) -> float:
    """Keys a query sees under the causal mask, itself included, on average over a row."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops_per_token(
    config: Sizes,
    length: int,
    *,
    gated: bool = True,
    experts: int = 0,
    top_k: int = 1,
    heads: tuple[int, int] | None = None,
    attention_experts: int = 0,
) -> float:
    """FLOPs of a forward pass for one token of a row of `length`, logits included.

    Args:
      config: the model's sizes.
      length: tokens per row; packed documents shorter than that see fewer keys and do less.
      gated: whether the MLP has three matrices (gate, up, down) or two.
      experts: among how many such MLPs a router chooses; 0 where there is one and no router.
      top_k: how many of them a token uses.
      heads: of queries and of keys and values in a layer; those of the config if None.
      attention_experts: among how many of them another router chooses; 0 for none.
    """
    d, h = config.embed_dim, config.per_head_dim
    queries, keys_values = heads or (config.num_heads, config.kv_heads)
    projections = d * h * 2 * (queries + keys_values) + d * attention_experts
    mlp = top_k * (3 if gated else 2) * d * config.mlp_dim + d * experts
    total = 2.0 * config.vocab_size * d
    for layer in range(config.num_layers):
        keys = mean_keys(length, config.layer_kind(layer).window)
        total += 2.0 * (projections + mlp) + 4.0 * keys * queries * h
    return total


def train_flops_per_token(config: Sizes, length: int, **layers: Any) -> float:
    """Forward and backward: three times `forward_flops_per_token`, whose arguments it takes."""
    return 3.0 * forward_flops_per_token(config, length, **layers)


def traced_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of the products and convolutions of any function, counted in its trace.

    Of grouped products, those of rows that belong to one group each (jax.lax.ragged_dot).

    Args:
      function: of arrays.
      arguments: trees of arrays, or of their shapes and dtypes.
    """
    return _flops_of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops_of(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        operands, name = [variable.aval for variable in equation.invars], equation.primitive.name
        each = 0.0  # multiply-adds for each number that comes out
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            each = math.prod(operands[0].shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            filters = equation.params["dimension_numbers"].rhs_spec[0]
            each = operands[1].size / operands[1].shape[filters]
        elif name == "ragged_dot_general":
            dims = equation.params["ragged_dot_dimension_numbers"]
            (contracted, _), _ = dims.dot_dimension_numbers
            each = math.prod(operands[0].shape[axis] for axis in contracted)
            if set(dims.lhs_ragged_dimensions) & set(contracted):  # each group has its rows only
                each /= operands[2].size
        total += 2.0 * each * equation.outvars[0].aval.size if each else 0.0
        times = equation.params["length"] if name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * _flops_of(inner)
    return total


def peak_flops(device: jax.Device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s; None where it is not known (CPUs)."""
    kind = device.device_kind
    matching = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}(?!\w)", kind)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def utilisation(
    units_per_second: float, flops_per_unit: float, devices: list[jax.Device]
) -> float | None:
    """Model FLOP utilisation: model FLOPs done over the devices' peak; None if that is unknown.

    Units are tokens, or images.
    """
    peaks = [peak_flops(device) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks):
        return None
    return units_per_second * flops_per_unit / sum(known)


def estimate_seconds(model_flops: float, devices: list[jax.Device]) -> float:
    """A guess at how long so many model FLOPs take, for the line printed at the start of a run.

    Where the peak is known, 40 % of it (what well-tuned dense models reach); otherwise 60 % of what
    one product of matrices of a layer's size is measured to do here, on all local devices together.
    """
    peaks = [peak_flops(device) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if known and len(known) == len(peaks):
        return model_flops / (0.4 * sum(known))
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    start = time.perf_counter()
    product(x, x).block_until_ready()
    # Simulated CPU devices share the machine, so their number does not multiply its speed.
    return model_flops / (0.6 * 2 * size**3 / (time.perf_counter() - start))
