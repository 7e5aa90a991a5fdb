"""The loop that computes all of the experts' MLPs, against float64, and where it is used."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.adapters import adapter
from espalier.model.adapters.lora import Lora
from espalier.model.config import TransformerConfig
from espalier.model.kernels import narrow, taps
from espalier.model.kernels.platform import use_platform, use_reference_forms
from espalier.model.low_rank.lowrank import Factorisation, LowRankExpertDense
from espalier.model.moe import row_blocks
from espalier.model.moe.moe import ExpertDense, MoeMlp
from espalier.trainers import partitioning
from tests.model.moe.grouped_matmul_test import SIZES

D, F = 5, 7
FACTORISED = Factorisation(layers=(".*",))


def operands(sizes, unused=3):
    """(rows, kernels, direction)."""
    rows, count = sum(sizes) + unused, len(sizes)
    shapes = ((rows, D), (count, D, F), (count, D, F), (count, F, D), (rows, D))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, *kernels, dy = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return x, tuple(kernels), dy


def by_loops(x, kernels, dy, sizes):
    """Results with SiLU, and the gradients of their sum along a direction, in float64."""
    x, *kernels, dy = (np.asarray(a, np.float64) for a in (x, *kernels, dy))
    y, dx, dkernels = np.zeros_like(x), np.zeros_like(x), [np.zeros_like(k) for k in kernels]
    start = 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        gate, up, down = (kernel[e] for kernel in kernels)
        g, u = x[own] @ gate, x[own] @ up
        sigmoid = 1 / (1 + np.exp(-g))
        hidden = g * sigmoid * u
        y[own] = hidden @ down
        dhidden = dy[own] @ down.T
        dg = dhidden * u * sigmoid * (1 + g * (1 - sigmoid))
        du = dhidden * g * sigmoid
        dx[own] = dg @ gate.T + du @ up.T
        for total, own_gradient in zip(
            dkernels, (x[own].T @ dg, x[own].T @ du, hidden.T @ dy[own]), strict=True
        ):
            total[e] = own_gradient
        start += size
    return y, dx, dkernels


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(sizes):
    x, kernels, dy = operands(sizes)
    used = (np.arange(len(x)) < sum(sizes)).reshape(-1, 1)
    y, dx, dkernels = by_loops(x, kernels, jnp.where(used, dy, 0), sizes)

    def along(x, kernels):
        out = row_blocks.expert_mlp(jax.nn.silu, x, kernels, jnp.asarray(sizes))
        out = jnp.where(used, out, 0)
        return jnp.sum(out * dy), out

    (_, found), grads = jax.jit(jax.value_and_grad(along, argnums=(0, 1), has_aux=True))(x, kernels)
    alone = jax.jit(along)(x, kernels)[1]  # without residuals
    for got, expected in zip(
        (found, alone, grads[0], *grads[1]), (y, y, dx, *dkernels), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_bfloat16_kernels_are_not_copied_without_a_gradient(monkeypatch):
    monkeypatch.setattr(narrow, "_BLOCK", 2**12)
    shapes = ((2, 128), (8, 128, 128), (8, 128, 128), (8, 128, 128))
    x, *kernels = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)

    def temporary_bytes():
        jitted = jax.jit(lambda *args: row_blocks.expert_mlp(jax.nn.silu, *args))
        return jitted.lower(x, tuple(kernels), sizes).compile().memory_analysis().temp_size_in_bytes

    # The kernels have 786 kB, and twice that in float32; a block has 16 kB.
    assert temporary_bytes() < 60_000
    monkeypatch.setattr(narrow, "_BLOCK", 2**30)
    assert temporary_bytes() > 1_500_000


def mixture(**settings):
    config = TransformerConfig(vocab_size=8, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24)
    return MoeMlp(config, num_experts=4, top_k=2, **settings)


@pytest.fixture
def calls(monkeypatch):
    made = []

    def counted(*args):
        made.append(1)
        return real(*args)

    real = row_blocks.expert_mlp
    monkeypatch.setattr(row_blocks, "expert_mlp", counted)
    return made


class Other(ExpertDense):
    """A user's own class of experts."""


class Silent:
    def projection(self, module, name, x, y, *, bias, sizes, rows):
        return y

    def lookup(self, module, name, ids, y):
        return y


def test_plain_experts_on_a_cpu_use_it(calls):
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    moe = mixture(activation="gelu")
    variables = nn.meta.unbox(moe.init(jax.random.key(1), x))
    calls.clear()
    y = jax.jit(moe.apply)(variables, x)
    assert len(calls) == 1
    for context in (use_reference_forms(), taps.installed(Silent())):
        with context:
            # A function of its own: a program that is compiled already knows nothing of the context.
            np.testing.assert_allclose(jax.jit(lambda *a: moe.apply(*a))(variables, x), y, atol=2e-5)  # fmt: skip
    z, seen = jax.jit(
        lambda *a: moe.apply(*a, capture_intermediates=True, mutable=["intermediates"])
    )(variables, x)
    np.testing.assert_allclose(z, y, atol=2e-5)
    assert seen["intermediates"]["gate"]["__call__"][0].shape == (2 * 9 * 2, 24)
    with use_platform("tpu"):
        jax.eval_shape(moe.apply, variables, x)
    mesh = partitioning.make_mesh(shape={"fsdp": 8})
    with partitioning.use_mesh(mesh, partitioning.rules_named("fsdp_tp")):
        jax.eval_shape(moe.apply, variables, x)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"expert_dense": functools.partial(LowRankExpertDense, factorisation=FACTORISED)},
        {
            "expert_dense": lambda **sizes: (Other if sizes["name"] == "down" else ExpertDense)(
                **sizes
            )
        },
        {"adapters": adapter.named(lora=functools.partial(Lora, layers=(".*",), rank=2))},
    ],
    ids=["factorised", "one of another class", "adapted"],
)
def test_experts_of_other_products_do_not(settings, calls):
    x, moe = jnp.ones((2, 9, 16)), mixture(**settings)
    variables = nn.meta.unbox(jax.eval_shape(moe.init, jax.random.key(1), x))
    jax.eval_shape(moe.apply, variables, x)
    assert not calls
