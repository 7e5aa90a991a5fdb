"""LoRA (arXiv 2106.09685), rank-stabilised LoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353).

y = x W0 + s x A B, with A [in, rank] and B [rank, out]. One of both is zero at the start, by default B, so that the model is
the base model; the other then has no gradient in the first step (arXiv 2406.08447 compares the two).

Shapes: X in, Y out, R rank, E experts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import Decay, Positive, Size, recordable
from espalier.model import axes
from espalier.model.adapters.adapter import Adapted, Adapter, AdapterError, rescaled
from espalier.model.kernels import matmul, taps
from espalier.model.moe.grouped_matmul import grouped_matmul
from espalier.model.transforms.patterns import PROJECTIONS, fullmatch


@recordable
def uniform_fan_in(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Returns a matrix that is uniform between -1/sqrt(rows) and 1/sqrt(rows), as peft draws A."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


@recordable
class Lora(Adapter):
    """LoRA (arXiv 2106.09685): y + s x A B for the projection's input x [..., X] and output y [..., Y].

    A is [X, rank], B [rank, Y]. At stacked experts, each expert has factors of its own.

    Attributes:
      layers: patterns of the projections.
      rank: number of columns of A.
      ranks: (pattern, rank) pairs; the first pattern that matches a path replaces `rank`.
      alpha: s is alpha / rank.
      rank_stabilised: s is alpha / sqrt(rank) (rsLoRA).
      dora: gives every column of W0 + s A B the norm of the column of W0 plus a learned change (DoRA). No gradient flows
        through the norm of the sum.
      dropout: rate of dropout on x, in training, before A.
      a_init: initialiser of A.
      b_init: initialiser of B; with `zeros` for neither, the first step's model is not the base model.

    Raises:
      AdapterError: a rank is larger than the smaller side of its matrix, DoRA at experts, or A and B are both zero.
    """

    MATRICES: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")

    layers: Sequence[str] = PROJECTIONS
    rank: Size = 16
    ranks: Sequence[tuple[str, Size]] = ()
    alpha: Positive = 16.0
    rank_stabilised: bool = False
    dora: bool = False
    dropout: Decay = 0.0
    a_init: Callable[..., jax.Array] = uniform_fan_in
    b_init: Callable[..., jax.Array] = nn.initializers.zeros

    @property
    def of_experts(self) -> bool:
        return not self.dora

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        y = site.base(x, *sizes)
        experts = (site.base.num_experts,) if sizes else ()
        a, b = self.factors(site, x.shape[-1], y.shape[-1], *experts)
        # In the compute dtype of the projection, with the scale where arrays are small.
        x = self._dropped(x).astype(y.dtype)
        inner = self._product(
            "lora_a", x, a.astype(y.dtype), *sizes, names=(site.axes[0], axes.RANK)
        )
        scaled = inner * self.scale(a.shape[-1])
        change = self._product(
            "lora_b", scaled, b.astype(y.dtype), *sizes, names=(axes.RANK, site.axes[1])
        )
        return self._renormed(site, y, change, a, b) if self.dora else y + change

    @nn.nowrap
    def scale(self, rank: int) -> float:
        """Returns s for a rank."""
        return float(self.alpha) / (rank**0.5 if self.rank_stabilised else rank)

    @nn.nowrap
    def rank_at(self, path: str, rows: int, columns: int) -> int:
        """Returns the rank at the matrix [rows, columns] of the projection at `path`.

        Raises:
          AdapterError: the rank is larger than the matrix's smaller side.
        """
        own = (rank for pattern, rank in self.ranks if fullmatch(pattern, path))
        rank = next(own, self.rank)
        if rank > min(rows, columns):
            raise AdapterError(
                f"LoRA of {path}: the rank {rank} is larger than the smaller side of its matrix [{rows}, {columns}]: lower "
                "`rank`, or set one for this path in `ranks`."
            )
        return rank

    @nn.nowrap
    def patterns(self) -> list[tuple[str, str]]:
        return super().patterns() + [("ranks", pattern) for pattern, _ in self.ranks]

    @nn.nowrap
    def fields_at(self, path: str) -> list[str]:
        return [field for field in super().fields_at(path) if field in self.PATTERNS]

    def factors(
        self, site: Adapted, rows: int, columns: int, *stacked: int
    ) -> tuple[jax.Array, jax.Array]:
        """Returns A and B, with leading axes of `stacked` experts."""
        if self.is_initializing():
            rank = self.rank_at(self.site_path, rows, columns)
            self._check_initialisers()
        else:  # the paths of unrolled layers differ from those that `ranks` names
            rank = self.get_variable("params", "lora_a").shape[-1]
        names = self._stack_axes(site)[: len(stacked)]
        dtype = self.param_dtype
        inits = (self.a_init, self.b_init)
        a_init, b_init = map(_of_each, inits) if stacked else inits
        a_names, b_names = (*names, site.axes[0], axes.RANK), (*names, axes.RANK, site.axes[1])
        a = axes.parameter(self, "lora_a", a_init, a_names, (*stacked, rows, rank), dtype)
        b = axes.parameter(self, "lora_b", b_init, b_names, (*stacked, rank, columns), dtype)
        return a, b

    @nn.nowrap
    def _check_initialisers(self) -> None:
        if _draws_zeros(self.b_init) and _draws_zeros(self.a_init):
            raise AdapterError(
                f"LoRA of {self.site_path}: a_init and b_init are both zeros, so that neither factor would ever have a gradient: "
                "set one of them to another initialiser, such as lora.uniform_fan_in."
            )

    @nn.nowrap
    def _stack_axes(self, site: Adapted) -> tuple[str, ...]:
        return tuple(site.base.axes[:1])

    def _dropped(self, x: jax.Array) -> jax.Array:
        if not (self.dropout and self.has_rng("dropout")):
            return x
        return nn.Dropout(self.dropout, deterministic=False)(x)

    def _product(
        self, name: str, x: jax.Array, factor: jax.Array, *sizes: jax.Array, names: tuple[str, str]
    ) -> jax.Array:
        y = grouped_matmul(x, factor, *sizes, names=names) if sizes else matmul.matmul(x, factor)
        return taps.projection(self, name, x, y, sizes=sizes[0] if sizes else None)

    def _renormed(
        self, site: Adapted, y: jax.Array, change: jax.Array, a_XR: jax.Array, b_RY: jax.Array
    ) -> jax.Array:
        """Returns DoRA's output from the projection's output `y` and LoRA's change of it."""
        zeros, names = nn.initializers.zeros, site.axes[1:]
        delta_Y = axes.parameter(
            self, "magnitude_change", zeros, names, (y.shape[-1],), self.param_dtype
        )
        w_XY = jax.lax.stop_gradient(site.base.matrix().astype(jnp.float32))
        factor_Y = magnitude_factor(w_XY, self.scale(a_XR.shape[-1]) * a_XR @ b_RY, delta_Y)
        row = (1,) * (y.ndim - 1) + (-1,)
        bias = site.bias()
        bias = jnp.zeros(row[:-1] + (1,), y.dtype) if bias is None else bias.reshape(row)
        bias = bias.astype(y.dtype)
        return rescaled(y - bias + change, factor_Y.reshape(row)) + bias


def magnitude_factor(w_XY: jax.Array, change_XY: jax.Array, delta_Y: jax.Array) -> jax.Array:
    """Returns DoRA's factor of each column of W0 + change: (|W0| + delta) / |W0 + change|, without gradient of the divisor."""
    changed_Y = jnp.linalg.norm(w_XY + change_XY.astype(w_XY.dtype), axis=0)
    norms_Y = jnp.linalg.norm(w_XY, axis=0)
    return (norms_Y + delta_Y) / jax.lax.stop_gradient(changed_Y)


@functools.cache
def _draws_zeros(init: Callable[..., jax.Array]) -> bool:
    with jax.ensure_compile_time_eval():
        return not init(jax.random.key(0), (2, 2), jnp.float32).any()


def _of_each(init: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns an initialiser that draws each matrix of a stack separately, as `init` draws one."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        *stacked, rows, columns = shape
        keys = jax.random.split(key, math.prod(stacked))
        drawn = jax.vmap(lambda key: init(key, (rows, columns), dtype))(keys)
        return drawn.reshape(shape)

    return draw
