"""The product's written-out backward against autodiff of the plain form and float64 numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.kernels.matmul import matmul
from espalier.model.kernels.platform import use_platform, use_reference_forms


def arrays(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4)])
def test_values_and_gradients_against_float64(leading):
    x, w, dy = arrays((*leading, 7), (7, 6), (*leading, 6))
    y, vjp = jax.vjp(matmul, x, w)
    dx, dw = vjp(dy)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    np.testing.assert_allclose(y, x64 @ w64, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dy64 @ w64.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x64.reshape(-1, 7).T @ dy64.reshape(-1, 6), rtol=1e-5, atol=1e-5)


def test_the_written_backward_is_taken_on_cpu_only():
    x, w = arrays((3, 4), (4, 2))
    assert "custom_vjp" in str(jax.make_jaxpr(matmul)(x, w))
    with use_platform("tpu"):
        assert "custom_vjp" not in str(jax.make_jaxpr(matmul)(x, w))
    with use_reference_forms():
        assert "custom_vjp" not in str(jax.make_jaxpr(matmul)(x, w))


def test_dtypes():
    x, w = arrays((3, 4), (4, 2), dtype="bfloat16")
    y, vjp = jax.vjp(matmul, x, w)
    assert y.dtype == jnp.bfloat16
    assert [d.dtype for d in vjp(y)] == [jnp.bfloat16, jnp.bfloat16]
    assert matmul(x, w.astype(jnp.float32)).dtype == jnp.float32


def test_over_an_axis_of_experts():
    x_ECI, w_EIO = arrays((4, 5, 6), (4, 6, 3))

    def loss(product, x, w):
        return jnp.sum(jnp.sin(jax.vmap(product)(x, w)))

    got = jax.grad(functools.partial(loss, matmul), (0, 1))(x_ECI, w_EIO)
    want = jax.grad(functools.partial(loss, jnp.matmul), (0, 1))(x_ECI, w_EIO)
    for g, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-6)


def test_forward_mode_and_second_derivatives_in_the_reference_form():
    x, w = arrays((3, 4), (4, 4))

    def f(w):
        return jnp.sum(jnp.tanh(matmul(matmul(x, w), w)))

    with use_reference_forms():
        _, tangent = jax.jvp(f, (w,), (w,))
        np.testing.assert_allclose(tangent, jnp.vdot(jax.grad(f)(w), w), rtol=1e-5)
        hessian = jax.hessian(f)(w).reshape(16, 16)
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-5)


@pytest.mark.parametrize("policy", [None, "dots_with_no_batch_dims_saveable"])
def test_inside_scan_and_remat(policy):
    """The policy sees the products inside the custom rule: 'dots' saves them, 'full' does not."""
    (x, w) = arrays((4, 3, 8), (5, 8, 8))
    save = None if policy is None else getattr(jax.checkpoint_policies, policy)

    def loss(product, body, w):
        def step(x, w):
            return jnp.sin(product(x, w)), None

        return jnp.sum(jax.lax.scan(body(step), x, w)[0])

    remat = functools.partial(jax.checkpoint, policy=save)
    got = jax.jit(jax.grad(functools.partial(loss, matmul, remat)))(w)
    want = jax.grad(functools.partial(loss, jnp.matmul, lambda f: f))(w)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    # Forward product, recomputed product unless saved, and two gradients.
    text = jax.jit(jax.grad(functools.partial(loss, matmul, remat))).lower(w).as_text()
    assert text.count("dot_general") == (4 if policy is None else 3)


def test_inside_linen_scan_and_remat():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return matmul(x, self.param("kernel", nn.initializers.ones, (4, 4))), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return scanned(name="layers")(x, None)[0]

    (x,) = arrays((2, 4))
    params = Stack().init(jax.random.key(0), x)
    grads = jax.grad(lambda p: Stack().apply(p, x).sum())(params)
    # d/dW of sum(x W W W) at W = 1: every layer's gradient is the outer product of two 4^k sums.
    got = grads["params"]["layers"]["kernel"]
    row = np.asarray(x).sum(0)
    np.testing.assert_allclose(got[0], 16 * row[:, None] * np.ones((1, 4)), rtol=1e-5)
    np.testing.assert_allclose(got[2], 4 * row.sum() * np.ones((4, 4)), rtol=1e-4)
