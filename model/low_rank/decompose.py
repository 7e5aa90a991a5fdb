"""Kernels as factors and factors as kernels: decomposition of what was trained dense, and its inverse.

Shapes: X rows, Y columns, R rank, '...' stacked layers or experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from model.low_rank import factors, lowrank_conv
from model.transforms.base import Power

Params = Mapping[str, Any]
# (path of a module, its kernel) -> (U, V^T) of that kernel, or None to leave it dense.
Split = Callable[[str, jax.Array], tuple[jax.Array, jax.Array] | None]


class FactoriseError(ValueError):
    """Parameters that cannot be decomposed or recomposed as asked."""


def decompose(params: Params, split: Split) -> dict[str, Any]:
    """The parameters with the kernels that `split` takes as factors `u` and `v`.

    Raises:
      FactoriseError: `split` took none.
    """
    paths = [path for path, node in _modules(params) if "kernel" in node]
    made: dict[str, Any] = {}
    for path in tqdm(paths, desc="decompose", unit="matrix", leave=False, delay=5):
        if (pair := split(path, _node(params, path)["kernel"])) is not None:
            for factor in pair:  # one that overflows is no factor either
                check_finite(path, factor)
            made[path] = pair
    if not made:
        raise FactoriseError("no layer was chosen to be decomposed, so that nothing would change.")

    def replaced(path: str, node: Params) -> dict[str, Any]:
        rest = {name: leaf for name, leaf in node.items() if name != "kernel"}
        return {**rest, "u": made[path][0], "v": made[path][1]} if path in made else dict(node)

    return _mapped(params, replaced)


def recompose(params: Params) -> dict[str, Any]:
    """The parameters with U V^T in place of all factors, which are of projections: those of a convolution do
    not say what its sides were.

    Raises:
      FactoriseError: there are none.
    """
    if not factors.find_factors(params):
        raise FactoriseError("the parameters hold no factors (u and v) to multiply.")

    def replaced(_: str, node: Params) -> dict[str, Any]:
        if not factors.is_factorised(node):
            return dict(node)
        rest = {name: leaf for name, leaf in node.items() if name not in ("u", "v")}
        return {**rest, "kernel": factors.recomposed(node["u"], node["v"])}

    return _mapped(params, replaced)


@dataclasses.dataclass(frozen=True)
class Decompose:
    """The transform of a dense model's parameters to those of the same model in factors.

    Ranks are those of the model that is made; its factors are the best approximations, balanced.
    Parameters that both models have are taken as they are.
    """

    def source(self, params: Params, saved: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """See TreeTransform."""
        found = factors.find_factors(params)
        if not found:
            raise FactoriseError(
                "INITIAL_TRANSFORM decomposes, but the model has no factorised layers: give "
                "methods/low_rank/low_rank.gin before methods/low_rank/decompose.gin."
            )
        if twice := next((one.path for one in found if f"{one.path}/u" in saved), None):
            raise FactoriseError(
                f"{twice} of the checkpoint is factorised already: set INITIAL_TRANSFORM = None to go "
                "on with its factors, or recompose it first (python -m launch.upcycle factorise --recompose)."
            )

        def dense(path: str, node: Params) -> dict[str, Any]:
            if not factors.is_factorised(node):
                return dict(node)
            rest = {name: leaf for name, leaf in node.items() if name not in ("u", "v")}
            kernel = _abstract_kernel(node["u"], node["v"], saved.get(f"{path}/kernel", ()))
            return {**rest, "kernel": kernel}

        return _mapped(params, dense)

    def __call__(self, source: Params, fresh: Params) -> dict[str, Any]:
        """See TreeTransform."""

        def split(path: str, kernel: jax.Array) -> tuple[jax.Array, jax.Array] | None:
            like = _node(fresh, path)
            if not factors.is_factorised(like):
                return None
            matrix = _matrix(kernel, like["u"], like["v"])
            check_finite(path, matrix)
            u, v = _spectral(matrix, like["u"].shape[-1])
            return _as(u, like["u"]), _as(v, like["v"])

        return decompose(source, split)

    def moments(self, moments: Params, params: Params, *, power: Power) -> dict[str, Any]:
        """Moments of the factors by the chain rule: dL/dU = G V, dL/dV^T = U^T G.

        A first moment is linear in G, so that its image is exact for factors that stand still. Second
        moments are carried as if the entries of G were independent, with the factors' squares.
        """

        def carried(path: str, node: Params) -> dict[str, Any]:
            like = _node(params, path)
            if not factors.is_factorised(like):
                return dict(node)
            rest = {name: leaf for name, leaf in node.items() if name != "kernel"}
            moment = _matrix(node["kernel"], like["u"], like["v"])
            u, v = _through(moment, like["u"], like["v"], power == "second")
            return {**rest, "u": u, "v": v}

        return _mapped(moments, carried)


@functools.partial(jax.jit, static_argnums=1)
def _spectral(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    return factors.spectral_factors(kernel, rank)


@functools.partial(jax.jit, static_argnums=3)
def _through(
    moment: jax.Array, u: jax.Array, v: jax.Array, squared: bool
) -> tuple[jax.Array, jax.Array]:
    if squared:
        u, v = u**2, v**2
    of_u = moment @ jnp.swapaxes(v, -2, -1)
    of_v = jnp.swapaxes(u, -2, -1) @ moment
    return of_u.astype(moment.dtype), of_v.astype(moment.dtype)


def _as(value: jax.Array, like: Any) -> jax.Array:
    """In the dtype and on the sharding of what it stands for."""
    value = value.astype(like.dtype)
    given = getattr(like, "sharding", None)
    return value if given is None else jax.device_put(value, given)


def _matrix(kernel: Any, u: Any, v: Any) -> Any:
    """The matrix that the factors stand for, of a projection's or of a convolution's kernel."""
    scheme = lowrank_conv.scheme_of(kernel.shape, u.shape[-2], v.shape[-1])
    if scheme is None or u.ndim == kernel.ndim:
        return kernel
    return lowrank_conv.matrix_of(kernel, scheme)


def _abstract_kernel(u: Any, v: Any, saved: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Of U V^T, its rows on the devices of U's and its columns on those of V's; whole of a convolution."""
    shape = (*u.shape[:-1], v.shape[-1])
    ours, theirs = getattr(u, "sharding", None), getattr(v, "sharding", None)
    convolution = u.ndim == 2 and lowrank_conv.scheme_of(saved, *shape) is not None
    if not isinstance(ours, NamedSharding) or not isinstance(theirs, NamedSharding):
        return jax.ShapeDtypeStruct(saved if convolution else shape, u.dtype)
    if convolution:
        whole = NamedSharding(ours.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(saved, u.dtype, sharding=whole)
    rows = [*ours.spec, *[None] * (u.ndim - len(ours.spec))]
    columns = [*theirs.spec, *[None] * (v.ndim - len(theirs.spec))]
    spec = PartitionSpec(*rows[:-1], columns[-1])
    return jax.ShapeDtypeStruct(shape, u.dtype, sharding=NamedSharding(ours.mesh, spec))


def check_finite(path: str, kernel: jax.Array) -> None:
    """Raises FactoriseError, by name, for a kernel that has no singular values."""
    finite = jax.device_get(jnp.isfinite(kernel).all((-2, -1)))
    if not finite.all():
        which = f" (of its stack number {int((~finite).argmax())})" if finite.ndim else ""
        raise FactoriseError(
            f"{path}/kernel{which} holds NaN or infinity, of which there is no singular value "
            "decomposition: start from an earlier step of the run."
        )


def _modules(tree: Params, path: str = "") -> list[tuple[str, Params]]:
    """All nodes below, the tree itself left out, with their paths."""
    found = []
    for name, child in tree.items():
        if isinstance(child, Mapping):
            below = f"{path}/{name}" if path else name
            found += [(below, child), *_modules(child, below)]
    return found


def _node(tree: Params, path: str) -> Params:
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def _mapped(
    tree: Params, change: Callable[[str, Params], dict[str, Any]], path: str = ""
) -> dict[str, Any]:
    """The tree with each node of it changed, children first."""
    node = {
        name: _mapped(child, change, f"{path}/{name}" if path else name)
        if isinstance(child, Mapping)
        else child
        for name, child in tree.items()
    }
    return change(path, node) if path else node
