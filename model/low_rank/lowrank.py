"""Factorised projections: y = (x U) V^T instead of x W (Kamalakara et al., arXiv 2209.13569).

The parameters are `u` [in, rank] and `v` [rank, out], as in model/low_rank/factors.py, so both products have the form
of the product in `Dense`.

Shapes: X in, Y out, R rank, E experts, '...' stacked layers or experts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from espalier.common.ranges import Finite, Positive, Size, recordable, refuse_set
from espalier.model.axes import RANK, parameter, unboxed
from espalier.model.kernels import matmul, taps
from espalier.model.like import like
from espalier.model.linear import Dense
from espalier.model.low_rank import factors
from espalier.model.moe.grouped_matmul import grouped_matmul
from espalier.model.moe.moe import ExpertDense
from espalier.model.transforms.patterns import fullmatch

Init = Literal["he", "spectral", "spectral_ones"]
INITS = get_args(Init)

# Projections of attention and MLPs, and convolutions in the blocks of residual networks (model/vision/resnet.py).
# Routers are small, tables are not projections, and a network's stem and classifier stay dense.
PROJECTIONS = (
    r"(.*/)?(\w*attention|mlp|mlp/shared)/(query|key|value|out|gate|up|down)"
    r"|stage_\d+/block_\d+/(conv_\d+|shortcut)",
)


def product(x: jax.Array, u_XR: jax.Array, v_RY: jax.Array) -> jax.Array:
    """Returns x U V^T, computed in the order with fewer multiplications.

    U V^T is formed first if that is cheaper: the rank is above X Y / (X + Y), so the factors are larger
    than the dense matrix, and x has enough rows to amortise the cost.
    """
    rows, (inputs, rank), outputs = x.size // x.shape[-1], u_XR.shape, v_RY.shape[-1]
    apart = rows * rank * (inputs + outputs)
    if apart <= inputs * rank * outputs + rows * inputs * outputs:
        return matmul.matmul(matmul.matmul(x, u_XR), v_RY)
    return matmul.matmul(x, matmul.matmul(u_XR, v_RY))


@recordable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Factorisation:
    """Which layers are factorised, and how.

    Attributes:
      rank, rank_rule, multiple: see `factors.rank_of`.
      layers: regular expressions that match the whole paths of modules, such as
        'layers/block_0/attention/query' (with scanned layers, block_0 is all repeats of the block).
      ranks: ((pattern, rank), ...); the first pattern that matches a path replaces `rank`.
      init: initialisation of the factors: 'he', 'spectral' or 'spectral_ones'.
      ones_scale: the singular values of 'spectral_ones'.

    Raises:
      ValueError: an unknown rule or initialisation, or `ones_scale` with another one.
    """

    rank: Positive = 0.5
    rank_rule: factors.RankRule = "min_dim"
    multiple: Size = 1
    layers: Sequence[str] = PROJECTIONS
    ranks: Sequence[tuple[str, Positive]] = ()
    init: Init = "spectral"
    ones_scale: Finite = 1.0

    def __post_init__(self):
        for name, known in (("rank_rule", factors.RANK_RULES), ("init", INITS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"Factorisation.{name} = {value!r}: choose from {', '.join(map(repr, known))}."
                )
        if self.init != "spectral_ones":
            refuse_set(self, ("ones_scale",), f"init = {self.init!r}")

    def rank_at(self, path: str, rows: int, columns: int) -> int | None:
        """Returns the rank of the matrix [rows, columns] of the module at `path`; None if it stays dense.

        Raises:
          ValueError: the rank is outside [1, min(rows, columns)].
        """
        if not any(fullmatch(pattern, path) for pattern in self.layers):
            return None
        own_ranks = (rank for pattern, rank in self.ranks if fullmatch(pattern, path))
        try:
            rank = next(own_ranks, self.rank)
            return factors.rank_of(rank, self.rank_rule, rows, columns, multiple=self.multiple)
        except ValueError as error:
            raise ValueError(f"Factorisation of {path}: {error}") from None

    def draw(
        self,
        key: jax.Array,
        kernel_init: Callable[..., jax.Array],
        shape: tuple[int, int],
        rank: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the initial U and V^T, float32, for a matrix whose initialiser is `kernel_init`."""
        if self.init == "he":
            return factors.he_factors(key, kernel_init, shape, rank)
        ones = self.ones_scale if self.init == "spectral_ones" else None
        return factors.spectral_factors(kernel_init(key, shape, jnp.float32), rank, ones=ones)


def report(params: Any, *, factorisation: Factorisation) -> list[str]:
    """Returns lines of a table of a model's factorised matrices, and a warning if factors are larger.

    Raises:
      ValueError: a pattern of the factorisation matches no factorised layer.
    """
    matrices = factors.find_factors(params)
    patterns = [("layers", pattern) for pattern in factorisation.layers]
    patterns += [("ranks", pattern) for pattern, _ in factorisation.ranks]
    for name, pattern in patterns:
        if not any(fullmatch(pattern, matrix.path) for matrix in matrices):
            known = ", ".join(matrix.path for matrix in matrices[:3])
            known += "..." if matrices[3:] else ""
            raise ValueError(
                f"Factorisation.{name}: {pattern!r} matches no layer that can be factorised; there "
                f"are {known or 'none, as its `dense` is another class'}."
            )
    lines = factors.table(matrices)
    if larger := [matrix.path for matrix in matrices if matrix.factors > matrix.dense]:
        lines.append(
            f"WARNING: the factors of {len(larger)} matrices are larger than the dense matrices, "
            f"{larger[0]} first: use a rank below rows * columns / (rows + columns), as "
            "RANK_RULE = 'param_ratio' does."
        )
    return lines


@recordable
class LowRankDense(Dense):
    """A projection y = x U V^T (+ bias) [..., features] in the layers that `factorisation` selects; `Dense` elsewhere.

    Attributes:
      factorisation: which layers have factors, of which rank, and how they begin; see `Factorisation`.
    """

    MATRICES: ClassVar[tuple[str, ...]] = ("u", "v")

    factorisation: Factorisation = Factorisation()

    def product(self, x: jax.Array) -> jax.Array:
        factors = layer_factors(
            self,
            (x.shape[-1], self.features),
            self.kernel_init,
            *((self.axes[0], RANK), (RANK, self.axes[1])),
        )
        if factors is None:
            return super().product(x)
        if taps.is_active():
            u_XR, v_RY = factors
            inner = taps.projection(self, "u", x, matmul.matmul(x, u_XR))
            return taps.projection(self, "v", inner, matmul.matmul(inner, v_RY))
        return product(x, *factors)

    def tapped(self, x: jax.Array, y: jax.Array) -> jax.Array:
        # The factors were tapped in `product`.
        return y if self.has_variable("params", "u") else super().tapped(x, y)

    def matrix(self) -> jax.Array:
        if not self.has_variable("params", "u"):
            return super().matrix()
        u_XR, v_RY = (unboxed(self.get_variable("params", name)) for name in ("u", "v"))
        return u_XR @ v_RY


@recordable
class LowRankExpertDense(ExpertDense):
    """`LowRankDense` for stacked experts: `u` [E, in, rank], `v` [E, rank, out]."""

    factorisation: Factorisation = Factorisation()

    def product(self, rows_RX: jax.Array, sizes_E: jax.Array) -> jax.Array:
        expert, *names = self.axes
        factors = layer_factors(
            self,
            (rows_RX.shape[-1], self.features),
            _of_one(self.kernel_init),
            *((expert, names[0], RANK), (expert, RANK, names[1])),
            experts=self.num_experts,
        )
        if factors is None:
            return super().product(rows_RX, sizes_E)
        inner = grouped_matmul(rows_RX, factors[0], sizes_E, names=(names[0], RANK))
        inner = taps.projection(self, "u", rows_RX, inner, sizes=sizes_E)
        y_RY = grouped_matmul(inner, factors[1], sizes_E, names=(RANK, names[1]))
        return taps.projection(self, "v", inner, y_RY, sizes=sizes_E)


@recordable
def factorised(
    *,
    factorisation: Factorisation,
    dense: Callable[..., Any] = Dense,
    layer: Callable[..., Any] = LowRankDense,
) -> Callable[..., Any]:
    """Returns a `dense` factory of factorised layers with the settings of another factory's layers.

    Args:
      dense: the factory that this one replaces; its settings are used, such as its initialiser.
      layer: factory of the layers, of a subclass.

    Raises:
      ValueError: (raised by the returned factory) `dense` makes a class other than `Dense` and `ExpertDense`.
    """
    return like(dense, layer, of=(Dense, ExpertDense), factorisation=factorisation)


def _of_one(kernel_init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an initialiser of one expert's kernel from an initialiser of stacked kernels."""
    return lambda key, shape, dtype: kernel_init(key, (1, *shape), dtype)[0]


def layer_factors(
    layer: Any,
    shape: tuple[int, int],
    kernel_init: Callable[..., jax.Array],
    u_axes: tuple[str, ...],
    v_axes: tuple[str, ...],
    *,
    experts: int | None = None,
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the parameters `u` and `v` of a layer in its compute dtype; None if the layer stays dense.

    Args:
      layer: the layer, with the attribute `factorisation`.
      shape: [rows, columns] of the matrix.
      kernel_init: initialiser of the matrix.
      u_axes, v_axes: logical names of the factors' dimensions.
      experts: number of stacked matrices; None for a single one.
    """
    if layer.is_initializing():
        rank = layer.factorisation.rank_at("/".join(layer.path), *shape)
    elif layer.has_variable("params", "u"):
        # Unrolling layers changes their paths, so the rank is read from the parameters.
        rank = layer.get_variable("params", "u").shape[-1]
    else:
        rank = None
    if rank is None:
        return None

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return layer.factorisation.draw(key, kernel_init, shape, rank)

        return one(key) if experts is None else jax.vmap(one)(jax.random.split(key, experts))

    if layer.is_initializing():  # both from one draw
        drawn = draw(layer.make_rng("params"))
        inits = [lambda key, shape, dtype, x=x: x.astype(dtype) for x in drawn]
    else:  # flax checks the shapes of the parameters against these
        shapes = jax.eval_shape(draw, jax.random.key(0))
        inits = [lambda key, shape, dtype, x=x: jnp.zeros(x.shape, dtype) for x in shapes]
    u, v = (
        parameter(layer, name, init, names, (), layer.param_dtype)
        for name, init, names in zip(("u", "v"), inits, (u_axes, v_axes), strict=True)
    )
    return u.astype(layer.dtype), v.astype(layer.dtype)
