"""What the backward pass computes at each site from inputs a and gradients g of its outputs.

A consumer's results take the place of a gradient, so that no activation outlives its layer: with scanned layers and
remat, memory is one layer's. Consumers are static arguments of compiled programs, hence frozen dataclasses.

Shapes: B batch, T length, Q queries, X inputs (with the bias row), Y outputs, E experts, R rows of experts, r rank;
n blocks of size s (trainers/influence/kronecker.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from espalier.model.kernels.platform import target_platform
from espalier.model.moe.grouped_matmul import grouped_matmul
from espalier.trainers.influence import kronecker
from espalier.trainers.influence.kronecker import Precision
from espalier.trainers.influence.sites import Site

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows sorted by expert: their tokens and experts, and the batch that they come from.

    Attributes:
      sizes_E: rows of each expert.
      tokens_R: index of each row's token, below B * T.
      batch, length: B and T.
    """

    sizes_E: jax.Array
    tokens_R: jax.Array
    batch: int
    length: int

    @property
    def valid_R(self) -> jax.Array:
        """Whether a row has an expert."""
        return jnp.arange(len(self.tokens_R)) < self.sizes_E.sum()

    @property
    def documents_R(self) -> jax.Array:
        return self.tokens_R // self.length

    @property
    def sizes_of_documents(self) -> jax.Array:
        """Rows of each expert and document, [E * B], in the order of the rows: tokens of an expert are in order."""
        ends_E = jnp.cumsum(self.sizes_E)
        expert_R = jnp.searchsorted(ends_E, jnp.arange(len(self.tokens_R)), side="right")
        count = len(self.sizes_E) * self.batch
        group_R = jnp.where(self.valid_R, expert_R * self.batch + self.documents_R, count)
        return jnp.bincount(group_R, length=count + 1)[:-1].astype(jnp.int32)

    def by_document(self, values_RQ: jax.Array) -> jax.Array:
        """Returns the sums of values over the rows of each document, [B, Q]."""
        values_RQ = jnp.where(self.valid_R[:, None], values_RQ, 0)
        return jax.ops.segment_sum(values_RQ, self.documents_R, self.batch)


def outer_by_group(a_RX: jax.Array, g_RY: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """Returns the sum of a g^T over the rows of each group, [G, X, Y]: the gradient of a grouped product's kernels."""
    zeros = jnp.zeros((len(sizes_G), a_RX.shape[-1], g_RY.shape[-1]), a_RX.dtype)
    _, pull = jax.vjp(lambda kernel: grouped_matmul(a_RX, kernel, sizes_G), zeros)
    return pull(g_RY)[0]


def sum_of_squares(d_BXY: jax.Array) -> jax.Array:
    """Returns the sum over documents of the squared entries, [X, Y]."""
    squares_BXY = jnp.square(d_BXY)
    if target_platform() != "cpu":
        return squares_BXY.sum(0)
    # XLA's sum over the first axis takes longer on CPUs than the products that made the matrices; this product, little.
    ones_B = jnp.ones(len(d_BXY), d_BXY.dtype)
    flat_Z = ones_B @ squares_BXY.reshape(len(d_BXY), -1)
    return flat_Z.reshape(d_BXY.shape[1:])


class Consumer(Protocol):
    """Computes the results of one site; the results of all layers of a scanned site are stacked.

    Attributes:
      squares: whether results are not sums over the uses of a matrix.
      matrices: whether results end with the rows and columns of matrices, by which a mesh splits them.
    """

    squares: ClassVar[bool]
    matrices: ClassVar[bool]

    @property
    def dtype(self) -> str: ...

    def zeros(self, site: Site, batch: int, length: int) -> Any:
        """Returns zeros of the results' shapes, with L first where layers are scanned."""

    def dense(self, a_BTX: jax.Array, g_BTY: jax.Array, mask_BT: jax.Array, inputs: Any) -> Any:
        """Returns the results of one matrix; a is zero where the mask is."""

    def experts(self, a_RX: jax.Array, g_RY: jax.Array, rows: Rows, inputs: Any) -> Any:
        """Returns the results of stacked experts; rows without an expert are zero."""

    def finish(self, site: Site, gradient: jax.Array, inputs: Any) -> Any:
        """Returns the results from the gradients [B, X, Y] of a matrix that is used twice."""


@dataclasses.dataclass(frozen=True)
class Covariances:
    """Sums over tokens of a a^T and g g^T, and the number of tokens.

    Attributes:
      blocks: n.
      dtype: dtype of the sums.
      gradient_blocks: n of g g^T, which `at` sets.
    """

    squares: ClassVar[bool] = False
    matrices: ClassVar[bool] = True

    blocks: int = 1
    dtype: str = "float32"
    gradient_blocks: int | None = None

    def at(self, site: Site) -> "Covariances":
        """Returns the consumer of one site, whose blocks are those of the site."""
        return dataclasses.replace(self, gradient_blocks=site.blocks(self.blocks)[1])

    def zeros(self, site: Site, batch: int, length: int) -> Any:
        def square(width: int, blocks: int) -> jax.Array:
            size = kronecker.block_size(width, blocks)
            return jnp.zeros((*site.lead, blocks, size, size), self.dtype)

        widths = (site.inputs, site.outputs)
        a, s = (square(d, n) for d, n in zip(widths, site.blocks(self.blocks), strict=True))
        return {"a": a, "s": s, "count": jnp.zeros(site.lead, self.dtype)}

    def dense(self, a_BTX, g_BTY, mask_BT, inputs):
        def square(x, blocks):
            parts = kronecker.split(x.reshape(-1, x.shape[-1]), blocks)
            # One plain product for each block: XLA copies the operands of one with a batch axis.
            return jnp.stack([parts[:, n].T @ parts[:, n] for n in range(blocks)])

        a, s = square(a_BTX, self.blocks), square(g_BTY, self.gradient_blocks or self.blocks)
        return {"a": a, "s": s, "count": mask_BT.sum()}

    def experts(self, a_RX, g_RY, rows, inputs):
        def square(x):
            parts = kronecker.split(x, self.blocks)
            each = [
                outer_by_group(parts[:, n], parts[:, n], rows.sizes_E) for n in range(self.blocks)
            ]
            return jnp.stack(each, axis=1)

        return {"a": square(a_RX), "s": square(g_RY), "count": rows.sizes_E.astype(self.dtype)}

    def finish(self, site, gradient, inputs):
        raise NotImplementedError  # never called: of a tied table, the covariances are of its use as the head


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradient of each document, [B, X, Y], or [B, E, X, Y] of experts."""

    squares: ClassVar[bool] = False
    matrices: ClassVar[bool] = True

    dtype: str = "float32"

    def zeros(self, site: Site, batch: int, length: int) -> Any:
        return jnp.zeros((*site.scan, batch, *site.stack, site.inputs, site.outputs), self.dtype)

    def dense(self, a_BTX, g_BTY, mask_BT, inputs):
        return jnp.einsum("btx,bty->bxy", a_BTX, g_BTY)

    def experts(self, a_RX, g_RY, rows, inputs):
        sums = outer_by_group(a_RX, g_RY, rows.sizes_of_documents)
        return sums.reshape(-1, rows.batch, *sums.shape[1:]).swapaxes(0, 1)

    def finish(self, site, gradient, inputs):
        return gradient


@dataclasses.dataclass(frozen=True)
class Squares:
    """Sum over documents of the squared gradient in the eigenbasis: a and g are rotated first.

    Attributes:
      blocks: n.
      dtype: dtype of the sums.
      precision: of the rotations.
    """

    squares: ClassVar[bool] = True
    matrices: ClassVar[bool] = True

    blocks: int = 1
    dtype: str = "float32"
    precision: Precision = "highest"

    def zeros(self, site: Site, batch: int, length: int) -> Any:
        sizes = zip((site.inputs, site.outputs), site.blocks(self.blocks), strict=True)
        widths = [kronecker.padded_width(d, blocks) for d, blocks in sizes]
        return jnp.zeros((*site.lead, *widths), self.dtype)

    def dense(self, a_BTX, g_BTY, mask_BT, inputs):
        with jax.default_matmul_precision(self.precision):
            a, g = kronecker.rotate(a_BTX, inputs["qa"]), kronecker.rotate(g_BTY, inputs["qs"])
        return sum_of_squares(jnp.einsum("btx,bty->bxy", a, g)).astype(self.dtype)

    def experts(self, a_RX, g_RY, rows, inputs):
        def rotated(x, q_ENSK):
            parts = kronecker.split(x, q_ENSK.shape[1])
            each = [
                grouped_matmul(parts[:, n], q_ENSK[:, n].astype(x.dtype), rows.sizes_E)
                for n in range(q_ENSK.shape[1])
            ]
            return jnp.where(rows.valid_R[:, None], jnp.concatenate(each, axis=-1), 0)

        with jax.default_matmul_precision(self.precision):
            a, g = rotated(a_RX, inputs["qa"]), rotated(g_RY, inputs["qs"])
        squares = jnp.square(outer_by_group(a, g, rows.sizes_of_documents))
        return squares.reshape(-1, rows.batch, *squares.shape[1:]).sum(1).astype(self.dtype)

    def finish(self, site, gradient, inputs):
        rotate = jax.vmap(lambda v: kronecker.rotate_matrix(v, inputs["qa"], inputs["qs"]))
        with jax.default_matmul_precision(self.precision):
            rotated = rotate(gradient)
        return sum_of_squares(rotated)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of documents by queries, and squared norms of the documents' gradients.

    The inputs are preconditioned gradients of the queries: `p` [Q, X, Y], or factors `u` [Q, X, r] and `v` [Q, Y, r]; of
    experts [Q, E, ...]. Quantised ones come with scales of their columns (`column_scaled`).

    Attributes:
      queries: Q.
      dtype: dtype of the sums.
    """

    squares: ClassVar[bool] = True
    matrices: ClassVar[bool] = False

    queries: int
    dtype: str = "float32"

    def zeros(self, site: Site, batch: int, length: int) -> Any:
        return {
            "scores": jnp.zeros((*site.scan, batch, self.queries), self.dtype),
            "squares": jnp.zeros((*site.scan, batch), self.dtype),
        }

    def dense(self, a_BTX, g_BTY, mask_BT, inputs):
        (_, length, X), Y = a_BTX.shape, g_BTY.shape[-1]
        whole = "p" in inputs
        # The norm of sum_t a_t g_t^T: of the matrix itself, or from products of pairs of tokens if these are cheaper.
        if whole or length * (X + Y) > X * Y:
            d_BXY = jnp.einsum("btx,bty->bxy", a_BTX, g_BTY)
            squares = jnp.square(d_BXY).sum((1, 2))
        else:
            pairs = [jnp.einsum("btx,bsx->bts", x, x) for x in (a_BTX, g_BTY)]
            squares = (pairs[0] * pairs[1]).sum((1, 2))
        if whole:
            scores = jnp.einsum("bxy,qxy->bq", d_BXY, column_scaled(inputs, "p", self.dtype))
        else:
            au = jnp.einsum("btx,qxr->btqr", a_BTX, column_scaled(inputs, "u", self.dtype))
            gv = jnp.einsum("bty,qyr->btqr", g_BTY, column_scaled(inputs, "v", self.dtype))
            scores = jnp.einsum("btqr,btqr->bq", au, gv)
        return {"scores": scores.astype(self.dtype), "squares": squares.astype(self.dtype)}

    def experts(self, a_RX, g_RY, rows, inputs):
        d_BEXY = Gradients(self.dtype).experts(a_RX, g_RY, rows, inputs)
        squares = jnp.square(d_BEXY).sum((1, 2, 3))
        if "p" in inputs:
            scores = jnp.einsum("bexy,qexy->bq", d_BEXY, column_scaled(inputs, "p", self.dtype))
            return {"scores": scores.astype(self.dtype), "squares": squares.astype(self.dtype)}

        def product(x_RX, name):
            kernel = column_scaled(inputs, name, self.dtype).transpose(1, 2, 0, 3)
            flat = grouped_matmul(x_RX, kernel.reshape(*kernel.shape[:2], -1), rows.sizes_E)
            return flat.reshape(len(x_RX), self.queries, -1)

        scores = rows.by_document((product(a_RX, "u") * product(g_RY, "v")).sum(-1))
        return {"scores": scores.astype(self.dtype), "squares": squares.astype(self.dtype)}

    def finish(self, site, gradient, inputs):
        scores = jnp.einsum("bxy,qxy->bq", gradient, whole(inputs, self.dtype))
        return {"scores": scores, "squares": jnp.square(gradient).sum((1, 2))}


def column_scaled(inputs: Any, name: str, dtype: str) -> jax.Array:
    """Returns matrices or factors [..., X, r] in `dtype` or wider: int8 ones times the scales [..., r] of their columns."""
    x = inputs[name]
    wide = x.astype(jnp.promote_types(x.dtype, dtype))
    scales = inputs.get(f"{name}_scale")
    return wide if scales is None else wide * scales[..., None, :].astype(wide.dtype)


def whole(inputs: Any, dtype: str) -> jax.Array:
    """Returns the matrices [..., X, Y] of factors, or whole ones, in `dtype` or wider."""
    if "p" in inputs:
        return column_scaled(inputs, "p", dtype)
    u, v = (column_scaled(inputs, name, dtype) for name in ("u", "v"))
    return u @ jnp.swapaxes(v, -1, -2)
