"""Converts parameters between the scanned and the unrolled layout of a transformer's layers, exactly.

Scanned: layers/block_p has a leading axis of L / P; layer g * P + p is at index g of block_p.
Unrolled: layers/block_i for i < L, without that axis. An encoder-decoder has two such stacks, of one period.
Decoding needs unrolled layers: slicing a stack
inside the token loop would copy the weights for every token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from espalier.model.config import TransformerConfig

Params = dict[str, Any]


def unrolled(model: Any) -> Any:
    """Returns the same model with unrolled layers, for the parameters that `unroll` returns."""
    return model.clone(config=dataclasses.replace(model.config, scan_layers=False, remat="none"))


def unroll(params: Params, config: TransformerConfig) -> Params:
    """Returns the parameters with unrolled layers; unrolled parameters are returned unchanged."""
    if not config.scan_layers:
        return params

    def unrolled_layers(layers: Params) -> Params:
        period, groups = len(layers), jax.tree.leaves(layers)[0].shape[0]
        return {
            f"block_{group * period + p}": jax.tree.map(
                lambda leaf, group=group: leaf[group], layers[f"block_{p}"]
            )
            for group in range(groups)
            for p in range(period)
        }

    return _in_stacks(unrolled_layers, params)


def stack(params: Params, config: TransformerConfig) -> Params:
    """Returns unrolled parameters with scanned layers: the inverse of `unroll`."""
    period = len(config.layer_pattern)

    def stacked_layers(layers: Params) -> Params:
        return {
            f"block_{p}": jax.tree.map(
                lambda *leaves: jnp.stack(leaves),
                *(layers[f"block_{i}"] for i in range(p, len(layers), period)),
            )
            for p in range(period)
        }

    return _in_stacks(stacked_layers, params)


def _in_stacks(change: Callable[[Params], Params], params: Params) -> Params:
    """Returns the parameters with the layers of every stack changed: a decoder's, or also an encoder's."""
    return {
        name: change(child)
        if name == "layers"
        else _in_stacks(change, child)
        if isinstance(child, dict)
        else child
        for name, child in params.items()
    }
