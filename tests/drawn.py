"""Parameters of a module without its initialisation, whose compilation takes longer than many tests of what is done with them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def drawn(module: nn.Module, *arguments: Any, seed: int = 0) -> Any:
    """Returns parameters of a module that is called with these arguments, boxed as `init` has them.

    Kernels are normal with a variance of one by their number of inputs and tables with a deviation of 0.02; scales are 1, and
    biases and changes 0: as at the start of a training, except for adapters, which are larger.
    """

    def init(*arguments: Any) -> Any:
        return module.init(jax.random.key(0), *arguments)["params"]

    rng = np.random.default_rng(seed)

    def values(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        if name == "scale" or name.endswith(("bias", "change")):
            return jnp.full(shape.shape, float(name == "scale"), shape.dtype)
        std = 0.02 if name == "embedding" else shape.shape[-2] ** -0.5
        return jnp.asarray(rng.normal(0, std, shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(values, jax.eval_shape(init, *arguments))
