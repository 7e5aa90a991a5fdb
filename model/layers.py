"""A stack of layers, scanned or unrolled. Shapes: B batch, T length, D width, L layers, P length of the layer pattern."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.config import TransformerConfig


class Layers(nn.Module):
    """Blocks `block_0`, `block_1`, ...: one period of the layer pattern if scanned, otherwise all L layers."""

    config: TransformerConfig
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        caches: Sequence[Any] | None,
        *,
        first: int | jax.Array = 0,
        **context: Any,
    ) -> tuple[jax.Array, Any]:
        """Applies the blocks in order; `first` is the depth of the first block."""
        new_caches = []
        for i in range(_traced(self.config)):
            kind = dataclasses.replace(self.config.layer_kind(i), depth=first + i)
            block = self.block(config=self.config, kind=kind, name=f"block_{i}")
            cache = None if caches is None else caches[i]
            apply = _rematerialised(self.config, cache, context)
            x_BTD, cache = apply(block, x_BTD)
            new_caches.append(cache)
        return x_BTD, None if caches is None else new_caches


def apply(
    layers: Layers, x_BTD: jax.Array, caches: Sequence[Any] | None, context: dict[str, Any]
) -> tuple[jax.Array, Any]:
    """Applies all layers of a stack, scanned or unrolled as its config has them; returns outputs and caches."""
    config = layers.config
    if not config.scan_layers:
        return layers(x_BTD, caches, **context)
    if caches is not None:
        raise ValueError(
            "Caches need unrolled layers: use layer_stack.unrolled(model) and "
            "layer_stack.unroll(params, config), both of model/transforms/layer_stack.py."
        )
    period = len(config.layer_pattern)
    repeats = config.num_layers // period
    scan = nn.scan(
        lambda layers, x_BTD, first: layers(x_BTD, None, first=first, **context),
        # Stack all collections of a block (parameters, sown values); every layer has its own RNGs.
        variable_axes={True: 0},
        split_rngs={True: True},
        length=repeats,
        metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )
    # For layers that read their depth; if no layer does, it is not in the compiled program.
    first_depths = jnp.arange(repeats, dtype=jnp.int32) * period
    x_BTD, _ = scan(layers, x_BTD, first_depths)
    return x_BTD, None


def flops_per_token(
    config: TransformerConfig, block: Callable[..., Any], shapes: Mapping[str, Any], **lengths: int
) -> float:
    """Returns the FLOPs of all layers of a stack for one token.

    Args:
      shapes: parameters of the layers or their shapes, 'block_0', ..., scanned or unrolled as `config` has them.
      **lengths: lengths for `Block.flops_per_token`.
    """
    total, count = 0.0, _traced(config)
    for layer in range(count):
        own = shapes[f"block_{layer}"]
        if config.scan_layers:  # the first axis is the scan's
            own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), own)
        module = block(config=config, kind=config.layer_kind(layer), name=f"block_{layer}")
        total += module.flops_per_token(own, **lengths)
    return total * (config.num_layers // count)


def _traced(config: TransformerConfig) -> int:
    """Returns the number of blocks that are traced."""
    return len(config.layer_pattern) if config.scan_layers else config.num_layers


def _rematerialised(config: TransformerConfig, cache: Any, context: dict[str, Any]) -> Callable:
    """Returns a function (block, x) -> (x, cache) with the rematerialisation of `config.remat`."""

    def apply(block: nn.Module, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        return block(x_BTD, cache=cache, **context)

    if config.remat == "none" or cache is not None:
        return apply
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = None if config.remat == "full" else dots
    # Inside a scan, the loop already prevents XLA from merging the two forward passes.
    return nn.remat(apply, policy=policy, prevent_cse=not config.scan_layers)
