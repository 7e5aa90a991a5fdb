"""Transforms between kernels and their factors; at full rank each is the inverse of the other.

Shapes: X rows, Y columns, R rank, '...' stacked layers or experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from espalier.model.low_rank import factors, lowrank_conv
from espalier.model.transforms import base
from espalier.model.transforms.base import Power, Recipe, Shapes, Source, TransformError

# (path of a module, its kernel as a matrix [..., X, Y], rank) -> U [..., X, R] and V^T [..., R, Y].
Split = Callable[[str, Any, int], tuple[jax.Array, jax.Array]]


@functools.partial(jax.jit, static_argnums=1)
def _spectral(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    return factors.spectral_factors(kernel, rank)


def spectral(path: str, kernel: Any, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns balanced factors of the best approximation of a kernel."""
    del path
    return _spectral(kernel, rank)


@dataclasses.dataclass(frozen=True)
class Decompose:
    """Transforms a dense model (the only source) to the same model with factorised kernels.

    The ranks are read from the target's shapes. Parameters that both models have are copied.

    Attributes:
      split: function that returns the factors of a kernel.
    """

    split: Split = dataclasses.field(default=spectral, repr=False)  # its repr has an address

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """See TreeTransform."""
        (source,) = sources
        modules = factorised_modules(target)
        if not modules:
            raise TransformError(
                "INITIAL_TRANSFORM decomposes, but the model has no factorised layers: give "
                "methods/low_rank/low_rank.gin before methods/low_rank/decompose.gin."
            )
        if twice := next((path for path in modules if f"{path}/u" in source.shapes), None):
            raise TransformError(
                f"{twice} of the checkpoint is factorised already: set INITIAL_TRANSFORM = None to "
                "continue with its factors, or recompose it first (espalier upcycle factorise --recompose)."
            )
        paths = {f"{path}/{name}" for path in modules for name in ("u", "v")}
        rest = [base.copied(path, target[path], source) for path in target if path not in paths]
        return rest + [self._recipe(path, source, target) for path in modules]

    def _recipe(self, path: str, source: Source, target: Shapes) -> Recipe:
        outputs = {f"{path}/{name}": tuple(target[f"{path}/{name}"]) for name in ("u", "v")}
        u_shape, v_shape = outputs.values()
        rank = u_shape[-1]

        def compute(parts: Sequence[Any], _: int) -> Sequence[jax.Array]:
            matrix = _matrix(parts[0], u_shape, v_shape)
            check_finite(path, matrix)
            pair = [factor.astype(matrix.dtype) for factor in self.split(path, matrix, rank)]
            for factor in pair:  # a cast to a narrower dtype may overflow
                check_finite(path, factor)
            return pair

        def moments(parts: Sequence[Any], values: Sequence[Any], power: Power) -> Sequence[Any]:
            return _through(_matrix(parts[0], u_shape, v_shape), *values, power == "second")

        saved = tuple(source.shapes.get(f"{path}/kernel", ()))
        return Recipe(
            outputs=outputs,
            inputs=((source.name, f"{path}/kernel"),),
            origin=f"factor of the kernel, rank {rank}",
            compute=compute,
            abstract_inputs=lambda leaves: [_abstract_kernel(leaves[0], leaves[1], saved)],
            moments=moments,
        )


@dataclasses.dataclass(frozen=True)
class Recompose:
    """Transforms a factorised model (the only source) to the dense model with kernels U V^T.

    Factorised convolutions are not supported, because factors do not determine the kernel's size.
    """

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """See TreeTransform."""
        (source,) = sources
        modules = factorised_modules(source.shapes)
        if not modules:
            raise TransformError("the model has no factors (u and v): give a factorised model.")
        kernels = {f"{path}/kernel" for path in modules}
        rest = [base.copied(path, target[path], source) for path in target if path not in kernels]
        return rest + [self._recipe(path, source) for path in modules]

    def _recipe(self, path: str, source: Source) -> Recipe:
        u_shape, v_shape = (source.shape(f"{path}/{name}") for name in ("u", "v"))
        return Recipe(
            outputs={f"{path}/kernel": (*u_shape[:-1], v_shape[-1])},
            inputs=tuple((source.name, f"{path}/{name}") for name in ("u", "v")),
            origin=f"product of two factors of rank {u_shape[-1]}",
            compute=lambda parts, _: [factors.recomposed(*parts)],
        )


def factorised_modules(shapes: Shapes) -> list[str]:
    """Returns the paths of the modules that have two factors, in the order of the tree."""
    owners = [path.removesuffix("/u") for path in shapes if path.endswith("/u")]
    return [path for path in owners if f"{path}/v" in shapes]


@functools.partial(jax.jit, static_argnums=3)
def _through(
    moment: jax.Array, u: jax.Array, v: jax.Array, squared: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the moments of the factors by the chain rule: dL/dU = G V, dL/dV^T = U^T G.

    The first moment is linear in G, so its transform is exact while the factors are constant. The second moment uses
    the squares of the factors, which assumes that the entries of G are independent.
    """
    if squared:
        u, v = u**2, v**2
    of_u = moment @ jnp.swapaxes(v, -2, -1)
    of_v = jnp.swapaxes(u, -2, -1) @ moment
    return of_u.astype(moment.dtype), of_v.astype(moment.dtype)


def _matrix(kernel: Any, u_shape: tuple[int, ...], v_shape: tuple[int, ...]) -> Any:
    """Returns the matrix that the factors approximate, from the kernel of a projection or convolution."""
    scheme = lowrank_conv.scheme_of(kernel.shape, u_shape[-2], v_shape[-1])
    if scheme is None or len(u_shape) == kernel.ndim:
        return kernel
    return lowrank_conv.matrix_of(kernel, scheme)


def _abstract_kernel(u: Any, v: Any, saved: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns the kernel to read as an abstract array.

    Its rows are sharded like U's and its columns like V's; a convolution's kernel is replicated.
    """
    shape = (*u.shape[:-1], v.shape[-1])
    of_u, of_v = getattr(u, "sharding", None), getattr(v, "sharding", None)
    convolution = len(u.shape) == 2 and lowrank_conv.scheme_of(saved, *shape) is not None
    if not isinstance(of_u, NamedSharding) or not isinstance(of_v, NamedSharding):
        return jax.ShapeDtypeStruct(saved if convolution else shape, u.dtype)
    if convolution:
        whole = NamedSharding(of_u.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(saved, u.dtype, sharding=whole)
    rows = [*of_u.spec, *[None] * (len(u.shape) - len(of_u.spec))]
    columns = [*of_v.spec, *[None] * (len(v.shape) - len(of_v.spec))]
    spec = PartitionSpec(*rows[:-1], columns[-1])
    return jax.ShapeDtypeStruct(shape, u.dtype, sharding=NamedSharding(of_u.mesh, spec))


def check_finite(path: str, kernel: Any) -> None:
    """Raises TransformError, with the path, if a kernel has NaN or infinity."""
    finite = jax.device_get(jnp.isfinite(kernel).all((-2, -1)))
    if not finite.all():
        which = f" (of its stack number {int((~finite).argmax())})" if finite.ndim else ""
        raise TransformError(
            f"{path}/kernel{which} has NaN or infinity, so it cannot be decomposed: use an earlier "
            "step of the run."
        )
