"""Converts parameters between the scanned and the unrolled layout of a transformer's layers, exactly.

Scanned: every block of a group of layers (model/layer_groups.py) has a leading axis of its layers; with one period of P layers,
layer g * P + p is at index g of layers/block_p.
Unrolled: layers/block_i for i < L, without that axis. An encoder-decoder has two such stacks.
Decoding needs unrolled layers: slicing a stack
inside the token loop would copy the weights for every token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from espalier.model import layer_groups
from espalier.model.config import TransformerConfig

Params = dict[str, Any]


def unrolled(model: Any) -> Any:
    """Returns the same model with unrolled layers, for the parameters that `unroll` returns."""
    return model.clone(config=dataclasses.replace(model.config, scan_layers=False, remat="none"))


def unroll(params: Params, config: TransformerConfig) -> Params:
    """Returns the parameters with unrolled layers; unrolled parameters are returned unchanged."""
    if not config.scan_layers:
        return params

    def unrolled_layers(layers: Params, owner: str) -> Params:
        del owner  # the shapes show the groups
        numbers = {int(name.removeprefix("block_")): name for name in layers}
        groups = layer_groups.inferred(
            {number: len(jax.tree.leaves(layers[name])[0]) for number, name in numbers.items()}
        )
        return {
            f"block_{layer}": jax.tree.map(lambda leaf, index=index: leaf[index], layers[name])
            for number, name in numbers.items()
            for index, layer in enumerate(layer_groups.layers_of(groups, number))
        }

    return _in_stacks(unrolled_layers, params)


def stack(params: Params, config: TransformerConfig) -> Params:
    """Returns unrolled parameters with scanned layers: the inverse of `unroll`."""

    def stacked_layers(layers: Params, owner: str) -> Params:
        own = config.bidirectional(len(layers)) if owner == "encoder" else config
        return {
            f"block_{block}": jax.tree.map(
                lambda *leaves: jnp.stack(leaves),
                *(layers[f"block_{layer}"] for layer in group.layers(block)),
            )
            for group in own.layer_groups
            for block in group.blocks
        }

    return _in_stacks(stacked_layers, params)


def _in_stacks(change: Callable[[Params, str], Params], params: Params, owner: str = "") -> Params:
    """Returns the parameters with the layers of every stack changed: a decoder's, or also an encoder's.

    Args:
      change: called with the layers and the name of what they are in, such as 'encoder'; '' of a decoder-only model.
    """
    return {
        name: change(child, owner)
        if name == "layers"
        else _in_stacks(change, child, name)
        if isinstance(child, dict)
        else child
        for name, child in params.items()
    }
