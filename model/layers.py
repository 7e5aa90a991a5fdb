"""A stack of layers, scanned or unrolled. Shapes: B batch, T length, D width, L layers.

Scanned layers are divided into groups (model/layer_groups.py), each of which is a scan over its blocks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.config import TransformerConfig
from espalier.model.layer_groups import Group


class Layers(nn.Module):
    """Blocks `block_i`: if scanned, the blocks of all groups, otherwise all L layers."""

    config: TransformerConfig
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        caches: Sequence[Any] | None,
        *,
        group: Group | None = None,
        after: int | jax.Array = 0,
        **context: Any,
    ) -> tuple[jax.Array, Any]:
        """Applies the blocks of a group, or all layers, in order; `after` is their distance from the blocks' first layers."""
        new_caches = []
        blocks = range(self.config.num_layers) if group is None else group.blocks
        for i, number in enumerate(blocks):
            kind = dataclasses.replace(self.config.layer_kind(number), depth=after + number)
            block = self.block(config=self.config, kind=kind, name=f"block_{number}")
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
    groups = config.layer_groups
    for group in groups:
        scan = _scanned(group, context, alone=len(groups) == 1)
        # For layers that read their depth; if no layer does, it is not in the compiled program.
        after_R = jnp.arange(group.repeats, dtype=jnp.int32) * group.period
        x_BTD, _ = scan(layers, x_BTD, after_R)
    return x_BTD, None


def _scanned(group: Group, context: dict[str, Any], *, alone: bool) -> Callable[..., Any]:
    """Returns a function (layers, x, distance of each of R repeats) -> (x, None) that scans a group's blocks."""
    scan = nn.scan(
        lambda layers, x_BTD, after: layers(x_BTD, None, group=group, after=after, **context),
        # Stack all collections of a block (parameters, sown values); every layer has its own RNGs.
        variable_axes={True: 0},
        split_rngs={True: True},
        length=group.repeats,
        metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )
    if alone:
        return scan
    names = {f"block_{block}" for block in group.blocks}

    def own(variables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            collection: {name: x for name, x in blocks.items() if name in names}
            for collection, blocks in variables.items()
        }

    # A scan takes slices of all variables of its module, and groups have other numbers of layers.
    return nn.map_variables(scan, True, trans_in_fn=own, mutable=True)


def flops_per_token(
    config: TransformerConfig, block: Callable[..., Any], shapes: Mapping[str, Any], **lengths: int
) -> float:
    """Returns the FLOPs of all layers of a stack for one token.

    Args:
      shapes: parameters of the layers or their shapes, 'block_0', ..., scanned or unrolled as `config` has them.
      **lengths: lengths for `Block.flops_per_token`.
    """
    blocks = {layer: 1 for layer in range(config.num_layers)}
    if config.scan_layers:
        blocks = {b: group.repeats for group in config.layer_groups for b in group.blocks}
    total = 0.0
    for number, repeats in blocks.items():
        own = shapes[f"block_{number}"]
        if config.scan_layers:  # the first axis is the scan's
            own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), own)
        module = block(config=config, kind=config.layer_kind(number), name=f"block_{number}")
        total += module.flops_per_token(own, **lengths) * repeats
    return total


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
