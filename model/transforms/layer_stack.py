"""Converts parameters between the scanned and the unrolled layout of a transformer's layers, exactly.

Scanned: layers/block_p has a leading axis of L / P; layer g * P + p is at index g of block_p.
Unrolled: layers/block_i for i < L, without that axis. Decoding needs unrolled layers: slicing a stack
inside the token loop would copy the weights for every token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from model.config import TransformerConfig

Params = dict[str, Any]


def unrolled(model: Any) -> Any:
    """Returns the same model with unrolled layers, for the parameters that `unroll` returns."""
    return model.clone(config=dataclasses.replace(model.config, scan_layers=False, remat="none"))


def unroll(params: Params, config: TransformerConfig) -> Params:
    """Returns the parameters with unrolled layers; unrolled parameters are returned unchanged."""
    if not config.scan_layers:
        return params
    period = len(config.layer_pattern)
    layers = {
        f"block_{group * period + p}": jax.tree.map(
            lambda leaf, group=group: leaf[group], params["layers"][f"block_{p}"]
        )
        for group in range(config.num_layers // period)
        for p in range(period)
    }
    return {**params, "layers": layers}


def stack(params: Params, config: TransformerConfig) -> Params:
    """Returns unrolled parameters with scanned layers: the inverse of `unroll`."""
    period = len(config.layer_pattern)
    layers = {
        f"block_{p}": jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(params["layers"][f"block_{i}"] for i in range(p, config.num_layers, period)),
        )
        for p in range(period)
    }
    return {**params, "layers": layers}
