"""Parameters whose projections have int8 kernels, for inference (model/kernels/int8.py).

The kernels of attention, MLPs and stacked experts become int8. Tables (embeddings, and heads, which are tables), norms, biases, routers,
adapters and factorised projections stay as they are.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from espalier.model.kernels import int8
from espalier.model.transforms.patterns import PROJECTIONS

_SCALE = f"/{int8.SCALE}"
_KERNEL = re.compile(rf"(?P<module>{PROJECTIONS[0]})/kernel")


def declared(boxed: Any) -> Any:
    """Returns boxed abstract parameters with int8 kernels and their scales instead of float kernels.

    Raises:
      Int8WeightsError: there is no kernel that becomes int8.
    """
    flat = {}
    for path, box in traverse_util.flatten_dict(boxed, sep="/").items():
        flat[path] = box
        if match := _KERNEL.fullmatch(path):
            (*leading, _, outputs), names = box.value.shape, box.names
            whole = jax.ShapeDtypeStruct(box.value.shape, jnp.int8)
            scale = jax.ShapeDtypeStruct((*leading, outputs), jnp.float32)
            flat[path] = box.replace(value=whole)
            flat[match["module"] + _SCALE] = nn.LogicallyPartitioned(
                scale, (*names[:-2], names[-1])
            )
    if len(flat) == len(traverse_util.flatten_dict(boxed)):
        raise int8.Int8WeightsError(
            "WEIGHTS_DTYPE = 'int8' changes kernels of attention, MLPs and experts, and this model has none (factorised "
            "projections stay as they are): remove it."
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def reading(abstract: Any, dtype: Any) -> tuple[Any, Callable[[str, Any], dict[str, Any]]]:
    """Returns what to read for abstract parameters as `declared`, with kernels of `dtype`, and the function that quantises these."""
    flat = traverse_util.flatten_dict(abstract, sep="/")
    shardings = {path: leaf.sharding for path, leaf in flat.items()}
    floats = {
        path: leaf.update(dtype=dtype) if leaf.dtype == jnp.int8 else leaf
        for path, leaf in flat.items()
        if not path.endswith(_SCALE)
    }
    finish = functools.partial(quantised, shardings=shardings)
    return traverse_util.unflatten_dict(floats, sep="/"), finish


def quantised(path: str, value: Any, shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the parameters by path that replace the one at `path`: a kernel and its scales, or itself.

    Args:
      value: a NumPy array, whose matrices are quantised one by one, or an array of JAX.
      shardings: of the results by path; None for the results' own.
    """
    match = _KERNEL.fullmatch(path)
    if match is None:
        return {path: value}
    names = (path, match["module"] + _SCALE)
    if not isinstance(value, np.ndarray):
        placed = None if shardings is None else tuple(shardings[name] for name in names)
        results = jax.jit(int8.quantise, out_shardings=placed)(value)
        return dict(zip(names, results, strict=True))
    kernel = np.empty(value.shape, np.int8)
    scale = np.empty((*value.shape[:-2], value.shape[-1]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for index in np.ndindex(value.shape[:-2]):
            kernel[index], scale[index] = int8.quantise(value[index])
    return dict(zip(names, (kernel, scale), strict=True))
