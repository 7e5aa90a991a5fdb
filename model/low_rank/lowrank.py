"""Factorised projections: y = (x U) V^T in place of x W (Kamalakara et al., arXiv 2209.13569).

The parameters are `u` [in, rank] and `v` [rank, out], as model/low_rank/factors.py says, so that both products are of
the form that `Dense` has.

Shapes: X in, Y out, R rank, E experts, '...' stacked layers or experts.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.axes import RANK, parameter
from model.kernels import matmul
from model.linear import Dense
from model.low_rank import factors
from model.moe.grouped_matmul import grouped_matmul
from model.moe.moe import ExpertDense

Init = Literal["he", "spectral", "spectral_ones"]
INITS = get_args(Init)

# What attention and MLPs project with, and blocks of residual networks convolve with (model/vision/resnet.py). A router is
# small, tables are no projections, and stem and classifier of a network stay dense.
PROJECTIONS = (
    r"(.*/)?(attention|mlp|mlp/shared)/(query|key|value|out|gate|up|down)"
    r"|stage_\d+/block_\d+/(conv_\d+|shortcut)",
)


def product(x: jax.Array, u_XR: jax.Array, v_RY: jax.Array) -> jax.Array:
    """x U V^T, in the order of fewer multiplications.

    U V^T is formed where that is cheaper: when the rank is above X Y / (X + Y), so that the factors are
    larger than what they stand for, and there are rows enough to pay for it.
    """
    rows, (inputs, rank), outputs = x.size // x.shape[-1], u_XR.shape, v_RY.shape[-1]
    apart = rows * rank * (inputs + outputs)
    if apart <= inputs * rank * outputs + rows * inputs * outputs:
        return matmul.matmul(matmul.matmul(x, u_XR), v_RY)
    return matmul.matmul(x, matmul.matmul(u_XR, v_RY))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factorisation:
    """Which layers are factorised, and how.

    Attributes:
      rank: see `factors.rank_of`.
      rank_rule: what `rank` is a fraction of, or 'absolute'.
      multiple: what ranks by a fraction are rounded to a multiple of, such as 128 for matrix units.
      layers: regular expressions for whole paths of modules, such as
        'layers/block_0/attention/query' (with scanned layers block_0 stands for all of them).
      ranks: ((pattern, rank), ...); the first that matches a path replaces `rank`.
      init: the factors' start: 'he', 'spectral' or 'spectral_ones'.
      ones_scale: the singular values of 'spectral_ones'.

    Raises:
      ValueError: an unknown rule or initialisation.
    """

    rank: float = 0.5
    rank_rule: factors.RankRule = "min_dim"
    multiple: int = 1
    layers: Sequence[str] = PROJECTIONS
    ranks: Sequence[tuple[str, float]] = ()
    init: Init = "spectral"
    ones_scale: float = 1.0

    def __post_init__(self):
        for name, known in (("rank_rule", factors.RANK_RULES), ("init", INITS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"Factorisation.{name} = {value!r} is none of {', '.join(map(repr, known))}."
                )

    def rank_at(self, path: str, rows: int, columns: int) -> int | None:
        """The rank of the matrix [rows, columns] of the module at `path`; None where it stays dense.

        Raises:
          ValueError: a rank that the matrix cannot have.
        """
        if not any(re.fullmatch(pattern, path) for pattern in self.layers):
            return None
        given = (rank for pattern, rank in self.ranks if re.fullmatch(pattern, path))
        try:
            rank = next(given, self.rank)
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
        """U and V^T to begin with, for a matrix that `kernel_init` would have drawn; float32."""
        if self.init == "he":
            return factors.he_factors(key, kernel_init, shape, rank)
        ones = self.ones_scale if self.init == "spectral_ones" else None
        return factors.spectral_factors(kernel_init(key, shape, jnp.float32), rank, ones=ones)


def report(params: Any, *, factorisation: Factorisation) -> list[str]:
    """The table of a model's factorised matrices, and a warning of those that grew by it.

    Args:
      params: arrays or their shapes.
      factorisation: what the model was built with.

    Raises:
      ValueError: a pattern of the factorisation matches no factorised layer.
    """
    found = factors.find_factors(params)
    for name, patterns in (
        ("layers", factorisation.layers),
        ("ranks", [pattern for pattern, _ in factorisation.ranks]),
    ):
        for pattern in patterns:
            if not any(re.fullmatch(pattern, one.path) for one in found):
                known = ", ".join(one.path for one in found[:3]) + ("..." if found[3:] else "")
                raise ValueError(
                    f"Factorisation.{name}: {pattern!r} matches no layer that can be factorised; there "
                    + (f"are {known}." if found else "are none, as its `dense` is another class.")
                )
    lines = factors.table(found)
    if larger := [one.path for one in found if one.factors > one.dense]:
        lines.append(
            f"WARNING: the factors of {len(larger)} matrices are larger than what they stand for, "
            f"{larger[0]} first: use a rank below rows * columns / (rows + columns), as "
            "RANK_RULE = 'param_ratio' does."
        )
    return lines


class LowRankDense(Dense):
    """y = x U V^T (+ bias) in the layers that `factorisation` says; elsewhere `Dense`.

    Attributes:
      factorisation: which layers, and how.
    """

    factorisation: Factorisation = Factorisation()

    def product(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        if (rank := rank_of_layer(self, *shape)) is None:
            return super().product(x)

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.factorisation.draw(key, self.kernel_init, shape, rank)

        u_XR, v_RY = factor_parameters(self, draw, (self.axes[0], RANK), (RANK, self.axes[1]))
        return product(x, u_XR.astype(self.dtype), v_RY.astype(self.dtype))


class LowRankExpertDense(ExpertDense):
    """As LowRankDense for stacked experts: `u` [E, in, rank], `v` [E, rank, out]."""

    factorisation: Factorisation = Factorisation()

    def product(self, rows_RX: jax.Array, sizes_E: jax.Array) -> jax.Array:
        shape = (rows_RX.shape[-1], self.features)
        if (rank := rank_of_layer(self, *shape)) is None:
            return super().product(rows_RX, sizes_E)

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys = jax.random.split(key, self.num_experts)
            return jax.vmap(
                lambda key: self.factorisation.draw(key, _of_one(self.kernel_init), shape, rank)
            )(keys)

        expert, *names = self.axes
        u, v = factor_parameters(self, draw, (expert, names[0], RANK), (expert, RANK, names[1]))
        inner = grouped_matmul(rows_RX, u.astype(self.dtype), sizes_E)
        return grouped_matmul(inner, v.astype(self.dtype), sizes_E)


def factorised(
    *,
    factorisation: Factorisation,
    dense: Callable[..., Any] = Dense,
    layer: Callable[..., Any] = LowRankDense,
) -> Callable[..., Any]:
    """The `dense` factory of a model in factors that are drawn as its own layers would be.

    Args:
      factorisation: which layers, and how.
      dense: the factory that this one stands for, whose initialiser holds.
      layer: the class of what is made.
    """

    def make(**settings: Any) -> Any:
        kernel_init = dense(**{**settings, "name": None, "parent": None}).kernel_init
        settings |= {"kernel_init": kernel_init, "factorisation": factorisation}
        return layer(**settings)

    return make


def rank_of_layer(layer: Any, rows: int, columns: int) -> int | None:
    """The rank of a layer's factors, None where it is dense: of its parameters, once it has some.

    What a layer was made as holds for it wherever it goes: unrolled for decoding, it has another path.
    """
    if layer.is_initializing():
        return layer.factorisation.rank_at("/".join(layer.path), rows, columns)
    return (
        layer.get_variable("params", "u").shape[-1] if layer.has_variable("params", "u") else None
    )


def _of_one(kernel_init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The initialiser of stacked kernels, for the kernel of one expert."""
    return lambda key, shape, dtype: kernel_init(key, (1, *shape), dtype)[0]


def factor_parameters(
    module: nn.Module,
    draw: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    u_axes: tuple[str, ...],
    v_axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """The parameters `u` and `v`, which one draw makes: two initialisers could not share it."""
    if module.is_initializing():
        drawn = draw(module.make_rng("params"))
        made = [lambda key, shape, dtype, x=x: x.astype(dtype) for x in drawn]
    else:  # the shapes of what is given are checked against these
        shapes = jax.eval_shape(draw, jax.random.key(0))
        made = [lambda key, shape, dtype, x=x: jnp.zeros(x.shape, dtype) for x in shapes]
    u, v = (
        parameter(module, name, init, names, (), module.param_dtype)
        for name, init, names in zip(("u", "v"), made, (u_axes, v_axes), strict=True)
    )
    return u, v
