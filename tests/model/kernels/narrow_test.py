"""Products with 16-bit matrices by blocks, and rows of them: values, gradients, memory, and where they are used."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.embed import Embed
from espalier.model.kernels import narrow
from espalier.model.kernels.matmul import matmul
from espalier.model.kernels.platform import use_platform, use_reference_forms
from espalier.model.transformer import scaled_logits
from espalier.trainers import partitioning

INPUTS, OUTPUTS = 24, 50


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # Four blocks of 16 outputs, of which the last two overlap.
    monkeypatch.setattr(narrow, "_BLOCK", 16 * INPUTS)


def arrays(outputs, dtype, leading=(3, 2)):
    rng = np.random.default_rng(0)
    shape = (INPUTS, OUTPUTS) if outputs else (OUTPUTS, INPUTS)
    x, matrix = rng.normal(size=(*leading, INPUTS)), rng.normal(size=shape)
    return jnp.asarray(x, dtype), jnp.asarray(matrix, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("outputs", [0, 1])
@pytest.mark.parametrize("leading", [(), (3, 2)])
def test_products_against_float64(outputs, dtype, leading):
    x, matrix = arrays(outputs, dtype, leading)
    y = jax.jit(narrow.product, static_argnums=2)(x, matrix, outputs)
    assert y.dtype == jnp.float32
    matrix64 = np.asarray(matrix, np.float64)
    wanted = np.asarray(x, np.float64) @ (matrix64 if outputs else matrix64.T)
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("outputs", [0, 1])
def test_gradients_are_those_of_the_plain_product(outputs):
    x, matrix = arrays(outputs, "bfloat16")
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, OUTPUTS)), jnp.float32)

    def plain(x, matrix):
        dims = (((2,), (1 - outputs,)), ((), ()))
        return jax.lax.dot_general(x, matrix, dims, preferred_element_type=jnp.float32)

    found, wanted = (
        jax.grad(lambda x, m, form=form: jnp.sum(form(x, m) * weights), (0, 1))(x, matrix)
        for form in (lambda x, m: narrow.product(x, m, outputs), plain)
    )
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one, other)


def test_projections_and_tables_compute_the_same_with_and_without():
    x, matrix = arrays(1, "bfloat16")
    table = Embed(num_embeddings=INPUTS, features=OUTPUTS, dtype=jnp.bfloat16)
    params = {"params": {"embedding": matrix}}
    ids = jnp.asarray([[0, 5, 23], [-2, 40, 7]])
    assert narrow.applies(matrix)
    y, rows = jax.jit(matmul)(x, matrix), jax.jit(table.apply)(params, ids)
    gradient_of = jax.grad(lambda p: jnp.sum(jnp.sin(table.apply(p, ids).astype(jnp.float32))))
    gradient = gradient_of(params)
    with use_reference_forms():
        np.testing.assert_array_equal(y, jax.jit(matmul)(x, matrix))
        np.testing.assert_array_equal(rows, jax.jit(table.apply)(params, ids))
        jax.tree.map(np.testing.assert_array_equal, gradient, gradient_of(params))
    assert y.dtype == rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows[1], matrix[jnp.asarray([0, 23, 7])])


def test_a_loop_makes_no_copy_of_a_matrix(monkeypatch):
    monkeypatch.setattr(narrow, "_BLOCK", 2**14)
    matrix = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    table = Embed(num_embeddings=512, features=512, dtype=jnp.bfloat16)
    form = types.SimpleNamespace(logit_scale=1.0, logit_softcap=None)

    def decode(matrix, token):
        def step(_, token):
            x_BTD = table.apply({"params": {"embedding": matrix}}, token)
            logits_BTV = scaled_logits(form, matmul(x_BTD, matrix), matrix)
            return jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 5, step, token)

    def temporary_bytes(batch):
        token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        return jax.jit(decode).lower(matrix, token).compile().memory_analysis().temp_size_in_bytes

    # In bfloat16 the matrix has 524 kB; a block in float32 has 66 kB.
    assert temporary_bytes(1) < 200_000
    assert temporary_bytes(3) < 200_000
    with use_reference_forms():
        assert temporary_bytes(1) > 1_000_000


def test_where_they_are_used():
    _, matrix = arrays(1, "bfloat16")
    assert narrow.applies(matrix)
    assert not narrow.applies(matrix.astype(jnp.float32))
    assert not narrow.applies(matrix[:, :16])
    with use_platform("tpu"):
        assert not narrow.applies(matrix)
    with use_reference_forms():
        assert not narrow.applies(matrix)
    mesh = partitioning.make_mesh(shape={"fsdp": 2, "tensor": 4})
    with partitioning.use_mesh(mesh, partitioning.rules_named("fsdp_tp")):
        assert not narrow.applies(matrix)
