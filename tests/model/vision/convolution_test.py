"""Convolutions and their factors against a sum written out, and against one another (invariants 2 and 9)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.low_rank import factors
from espalier.model.low_rank.decompose import Decompose
from espalier.model.low_rank.lowrank import Factorisation
from espalier.model.low_rank.lowrank_conv import (
    SCHEMES,
    LowRankConv,
    convolve_factors,
    kernel_of,
    matrix_of,
)
from espalier.model.transforms import base
from espalier.model.transforms.base import Source
from espalier.model.vision.convolution import Conv, convolve

X = jax.random.normal(jax.random.key(0), (2, 7, 6, 5))


def kernel_like(h, w, seed=1):
    return jax.random.normal(jax.random.key(seed), (h, w, 5, 4)) / (h * w * 5) ** 0.5


def test_a_convolution_is_the_sum_over_its_window():
    kernel, stride = kernel_like(3, 3), 2
    found = convolve(X, kernel, (stride, stride))
    assert found.shape == (2, 4, 3, 4)
    # Height 7 with stride 2 lacks two rows, one on each side; width 6 lacks one column, on the right.
    padded = np.pad(np.asarray(X, np.float64), ((0, 0), (1, 1), (0, 1), (0, 0)))
    for i, j in ((0, 0), (1, 2), (3, 1)):
        window = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
        want = np.einsum("bhwi,hwio->bo", window, np.asarray(kernel, np.float64))
        np.testing.assert_allclose(found[:, i, j], want, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("h", "w"), [(3, 3), (1, 1), (5, 3)])
def test_a_matrix_and_its_kernel_are_the_same_numbers(scheme, h, w):
    kernel = kernel_like(h, w)
    matrix = matrix_of(kernel, scheme)
    assert matrix.shape == ((h * w * 5, 4) if scheme == "channel" else (h * 5, w * 4))
    assert (kernel_of(matrix, scheme, h, w) == kernel).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 6), (8, 8)])
def test_at_full_rank_both_schemes_are_the_dense_convolution(scheme, side, stride, size):
    kernel = kernel_like(side, side)
    x = jax.random.normal(jax.random.key(3), (2, *size, 5))
    matrix = matrix_of(kernel, scheme)
    u, v = factors.spectral_factors(matrix, min(matrix.shape))
    found = convolve_factors(x, u, v, scheme=scheme, side=side, stride=stride)
    np.testing.assert_allclose(found, convolve(x, kernel, (stride, stride)), atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_truncation_loses_is_the_singular_values_that_are_dropped(scheme):
    matrix = matrix_of(kernel_like(3, 3), scheme)
    u, v = factors.spectral_factors(matrix, 2)
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    lost = float(jnp.sum((kernel_of(u @ v - matrix, scheme, 3, 3)) ** 2))
    assert lost == pytest.approx((values[2:] ** 2).sum(), rel=1e-4)


def parameters_of(module, x=X):
    return nn.meta.unbox(jax.jit(lambda: module.init(jax.random.key(2), x))())["params"]


@pytest.mark.parametrize(
    ("scheme", "shapes"), [("channel", ((45, 3), (3, 6))), ("spatial", ((15, 8), (8, 18)))]
)
def test_ranks_and_parameters_are_those_of_the_schemes_matrix(scheme, shapes):
    made = Factorisation(rank=0.5, layers=(".*",))
    module = LowRankConv(features=6, use_bias=True, factorisation=made, scheme=scheme)
    params = parameters_of(module)
    found = {name: leaf.shape for name, leaf in params.items()}
    assert found == {"u": shapes[0], "v": shapes[1], "bias": (6,)}
    (one,) = factors.find_factors(params)
    assert one.dense == 3 * 3 * 5 * 6 and one.factors == one.rank * sum(one.shape)
    biased = {**params, "bias": jnp.ones(6)}
    difference = module.apply({"params": biased}, X) - module.apply({"params": params}, X)
    np.testing.assert_allclose(difference, 1.0, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("init", ["he", "spectral", "spectral_ones"])
def test_first_values_are_those_of_the_kernels_matrix(scheme, init):
    given = {"features": 64, "scheme": scheme}
    made = Factorisation(rank=32, rank_rule="absolute", layers=(".*",), init=init)
    x = jnp.ones((1, 4, 4, 64))
    params = parameters_of(LowRankConv(factorisation=made, **given), x)
    product = params["u"] @ params["v"]
    values = np.linalg.svd(product, compute_uv=False)[:32]
    if init == "spectral_ones":
        np.testing.assert_allclose(values, 1.0, atol=1e-4)
    elif init == "he":
        # The product's entries have the variance 2 / (h w I) of the kernel's, whatever the scheme.
        assert float(product.var()) == pytest.approx(2 / (9 * 64), rel=0.1)
    else:
        dense = parameters_of(Conv(features=64), x)["kernel"]
        whole = np.linalg.svd(matrix_of(dense, scheme), compute_uv=False)[:32]
        assert values.sum() == pytest.approx(whole.sum(), rel=0.05)  # another draw


def test_factors_compute_in_the_compute_dtype():
    module = LowRankConv(
        features=4, dtype=jnp.bfloat16, factorisation=Factorisation(layers=(".*",))
    )
    params = parameters_of(module)
    assert params["u"].dtype == jnp.float32
    assert module.apply({"params": params}, X).dtype == jnp.bfloat16


def test_no_kernel_is_formed():
    module = LowRankConv(features=64, factorisation=Factorisation(rank=0.1, layers=(".*",)))
    x = jnp.ones((1, 4, 4, 64))
    params = parameters_of(module, x)
    lowered = jax.make_jaxpr(lambda p: module.apply({"params": p}, x))(params)
    sizes = [out.aval.size for equation in lowered.eqns for out in equation.outvars]
    assert max(sizes) < 9 * 64 * 64


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="LowRankConv.scheme = 'wide': choose from 'channel'"):
        LowRankConv(features=4, scheme="wide")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_trained_convolution_decomposes_to_the_factors_that_the_model_has(scheme):
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 6))
    rows, columns = matrix_of(kernel, scheme).shape
    rank = min(rows, columns)
    target = {"conv/u": (rows, rank), "conv/v": (rank, columns)}
    (recipe,) = base.plan(Decompose(), [Source("dense", {"conv/kernel": kernel.shape})], target)
    leaves = [jnp.zeros(shape) for shape in target.values()]
    assert recipe.abstract_inputs(leaves)[0].shape == kernel.shape
    u, v = base.apply([recipe], lambda name, path: kernel).values()
    x = jax.random.normal(jax.random.key(1), (2, 7, 7, 4))
    found = convolve_factors(x, u, v, scheme=scheme, side=3, stride=2)
    np.testing.assert_allclose(found, convolve(x, kernel, (2, 2)), atol=1e-4)
    moments = recipe.moments([kernel], [u, v], "first")
    want = jax.grad(lambda u: (kernel_of(u @ v, scheme, 3, 3) * kernel).sum())(u)
    np.testing.assert_allclose(moments[0], want, rtol=1e-4, atol=1e-4)
