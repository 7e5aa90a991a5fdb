"""Routers whose logits are linear in a token's state, as the one kernel that they amount to.

Such a router may have any parameters, such as a projection of embeddings (its class says `linear`). Its logits for unit vectors
are the rows of the kernel [D, E] with which a linear router has its logits for every state. Families of Hugging Face have
linear routers alone: an export computes this kernel from the stored parameters of one layer at a time.

Shapes: D width, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from espalier.model import layer_groups
from espalier.model.hf.description import native_shapes
from espalier.model.linear import Dense
from espalier.model.protocol import MlpSettings
from espalier.model.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldedRouter:
    """The kernel of a linear router, computed from another router's parameters.

    Attributes:
      router: the other router.
      width: D.
      inputs: the paths of its parameters in the model, by their paths in the router.
    """

    router: nn.Module
    width: int
    inputs: Mapping[str, str]

    def kernel(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the float32 kernel [D, E] of one layer, from that layer's parameters by their paths in the router."""
        tree = flax.traverse_util.unflatten_dict(dict(params), sep="/")
        # Exact products of unit vectors, also where the default is of a narrower type.
        with jax.default_matmul_precision("highest"):
            unit_DD = jnp.eye(self.width, dtype=jnp.float32)
            return np.asarray(self.router.apply({"params": tree}, unit_DD))


def folded(model: Any) -> tuple[Any, dict[str, FoldedRouter]]:
    """Returns the model with each router that equals a linear one replaced by it, and {path of its kernel: that router}."""
    if not isinstance(model, Transformer):
        return model, {}
    foldable = [_foldable(layer.mlp) for layer in model.layer_settings()]
    if not any(foldable):
        return model, {}
    linear = model.clone(block=functools.partial(_block_with_linear_router, model.block))
    before, routers = native_shapes(model), {}
    for path in native_shapes(linear):
        at = layer_groups.BLOCK.fullmatch(path)
        if path in before or at is None:
            continue
        inside = path.removesuffix("kernel")
        routers[path] = FoldedRouter(
            router=foldable[int(at[2])],  # a block has the number of its first layer
            width=model.config.embed_dim,
            inputs={x.removeprefix(inside): x for x in before if x.startswith(inside)},
        )
    return linear, routers


def _foldable(mlp: MlpSettings) -> Any:
    """Returns the router of an MLP if its class says that it amounts to a linear one; None otherwise."""
    return mlp.router if getattr(mlp.router, "linear", False) else None


def _block_with_linear_router(factory: Callable[..., Any], *, name: str, **passed: Any) -> Any:
    # The name is free for the copy: the first module has another, and is not used.
    block = factory(**passed, name=None)
    return block.copy(name=name, mlp=functools.partial(_mlp_with_linear_router, block.mlp))


def _mlp_with_linear_router(factory: Callable[..., Any], *, name: str, **passed: Any) -> Any:
    mlp = factory(**passed, name=None)
    return mlp.copy(name=name, **({"router": Dense} if _foldable(mlp.settings) else {}))
