"""Factorised convolutions (Kamalakara et al., arXiv 2209.13569): a matrix of the kernel as U V^T.

The scheme decides which matrix is factorised:

  'channel'  [h w I, O]: a convolution of the kernel's size with `rank` filters, then 1 x 1;
  'spatial'  [h I, w O]: a convolution h x 1 that strides over height, then 1 x w that strides over width.

The parameters are the factors of that matrix, `u` [rows, rank] and `v` [rank, columns], as in
model/low_rank/factors.py, so ranks, decay and spectra work as for any factorised matrix.

Shapes: B batch, H height, W width, I channels in, O out, h and w the kernel's sides, X rows, Y columns,
R rank.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from espalier.common.ranges import recordable
from espalier.model.axes import CHANNELS, CHANNELS_IN, RANK
from espalier.model.low_rank.lowrank import Factorisation, layer_factors
from espalier.model.vision.convolution import Conv, convolve

Scheme = Literal["channel", "spatial"]
SCHEMES = get_args(Scheme)


def matrix_of(kernel_hwIO: jax.Array, scheme: Scheme) -> jax.Array:
    """Returns the matrix [X, Y] of a kernel."""
    h, w, inputs, outputs = kernel_hwIO.shape
    if scheme == "channel":
        return kernel_hwIO.reshape(h * w * inputs, outputs)
    return kernel_hwIO.transpose(0, 2, 1, 3).reshape(h * inputs, w * outputs)


def kernel_of(matrix_XY: jax.Array, scheme: Scheme, h: int, w: int) -> jax.Array:
    """Returns the kernel [h, w, I, O] of a matrix; the inverse of `matrix_of`."""
    rows, columns = matrix_XY.shape
    if scheme == "channel":
        return matrix_XY.reshape(h, w, rows // (h * w), columns)
    return matrix_XY.reshape(h, rows // h, w, columns // w).transpose(0, 2, 1, 3)


def scheme_of(kernel: tuple[int, ...], rows: int, columns: int) -> Scheme | None:
    """Returns the scheme in which a kernel [h, w, I, O] is a matrix [rows, columns]; None if there is none."""
    if len(kernel) == 4:
        h, w, inputs, outputs = kernel
        if (rows, columns) == (h * w * inputs, outputs):
            return "channel"
        if (rows, columns) == (h * inputs, w * outputs):
            return "spatial"
    return None


def convolve_factors(
    x_BHWI: jax.Array, u_XR: jax.Array, v_RY: jax.Array, *, scheme: Scheme, side: int, stride: int
) -> jax.Array:
    """Returns the convolution with the kernel of U V^T, [B, H/s, W/s, O], without forming the kernel."""
    if scheme == "channel":
        y_BHWR = convolve(x_BHWI, kernel_of(u_XR, scheme, side, side), (stride, stride))
        return convolve(y_BHWR, kernel_of(v_RY, scheme, 1, 1), (1, 1))
    # Each dimension is padded separately, so the two convolutions see the same zeros as a single one.
    y_BHWR = convolve(x_BHWI, kernel_of(u_XR, scheme, side, 1), (stride, 1))
    return convolve(y_BHWR, kernel_of(v_RY, scheme, 1, side), (1, stride))


@recordable
class LowRankConv(Conv):
    """A factorised convolution in the layers that `factorisation` selects; `Conv` elsewhere.

    Attributes:
      factorisation: which layers, and how; ranks refer to the scheme's matrix.
      scheme: one of SCHEMES.

    Raises:
      ValueError: an unknown scheme.
    """

    factorisation: Factorisation = Factorisation()
    scheme: Scheme = "spatial"

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(
                f"LowRankConv.scheme = {self.scheme!r}: choose from {', '.join(map(repr, SCHEMES))}."
            )
        super().__post_init__()

    def product(self, x_BHWI: jax.Array) -> jax.Array:
        inputs, side = x_BHWI.shape[-1], self.side
        # Columns of the matrix per filter, and rows of the matrix.
        per_filter, rows = (
            (1, side * side * inputs) if self.scheme == "channel" else (side, side * inputs)
        )
        shape = (rows, per_filter * self.features)

        def init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
            # Initialise as a kernel, so that the initialiser sees the kernel's fan-in.
            filters = shape[1] // per_filter
            kernel = self.kernel_init(key, (side, side, inputs, filters), dtype)
            return matrix_of(kernel, self.scheme)

        factors = layer_factors(self, shape, init, (CHANNELS_IN, RANK), (RANK, CHANNELS))
        if factors is None:
            return super().product(x_BHWI)
        return convolve_factors(
            x_BHWI, *factors, scheme=self.scheme, side=self.side, stride=self.stride
        )
