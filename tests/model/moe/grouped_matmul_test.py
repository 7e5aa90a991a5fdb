"""Grouped products against loops over experts in float64, and what the blocks of the CPU form cover."""

import contextlib
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from espalier.model.kernels import narrow
from espalier.model.kernels.platform import use_platform, use_reference_forms
from espalier.model.moe import grouped_matmul as form
from espalier.model.moe import row_blocks
from espalier.trainers import partitioning

X, Y = 5, 3

SIZES = [
    (7, 0, 0),
    (0, 0, 7),
    (3, 0, 4),
    (16, 33, 0, 1),
    (0, 300, 40, 15, 17),  # a whole block of 256 and the smaller ones
    (1,) * 20,
]


def operands(sizes, unused=0):
    rows = sum(sizes) + unused
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, X), (len(sizes), X, Y), (rows, Y))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_loops(rows, kernel, direction, sizes):
    """Products, and the gradients of their sum along a direction, in float64."""
    rows, kernel, direction = (np.asarray(a, np.float64) for a in (rows, kernel, direction))
    out, drows, dkernel = np.zeros_like(direction), np.zeros_like(rows), np.zeros_like(kernel)
    start = 0
    for expert, size in enumerate(sizes):
        own = slice(start, start + size)
        out[own] = rows[own] @ kernel[expert]
        drows[own] = direction[own] @ kernel[expert].T
        dkernel[expert] = rows[own].T @ direction[own]
        start += size
    return out, drows, dkernel


@pytest.mark.parametrize("context", [contextlib.nullcontext, use_reference_forms])
@pytest.mark.parametrize(("sizes", "unused"), [*((sizes, 0) for sizes in SIZES), (SIZES[3], 6)])
def test_values_and_gradients(context, sizes, unused):
    rows, kernel, direction = operands(sizes, unused)
    used = (np.arange(len(rows)) < sum(sizes)).reshape(-1, 1)
    want = by_loops(rows, kernel, direction, sizes)

    def along(rows, kernel):
        out = form.grouped_matmul(rows, kernel, jnp.asarray(sizes))
        out = jnp.where(used, out, 0)
        return jnp.sum(out * direction), out

    with use_platform("cpu"), context():
        grads, out = jax.jit(jax.grad(along, argnums=(0, 1), has_aux=True))(rows, kernel)
    for got, expected in zip((out, *grads), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_cover_every_row_once_and_few_more(sizes):
    rows = sum(sizes)

    def count(expert, block, own, state):
        seen, of_expert, multiplied = state
        seen = block.put(seen, block(seen) + 1, own)
        of_expert = block.put(of_expert, expert, own)
        return seen, of_expert, multiplied + block.length

    zeros = jnp.zeros((rows, 1), jnp.int32)
    seen, of_expert, multiplied = row_blocks.over_blocks(
        count, jnp.asarray(sizes), rows, (zeros, zeros, 0)
    )
    np.testing.assert_array_equal(seen, 1)
    np.testing.assert_array_equal(of_expert[:, 0], np.repeat(np.arange(len(sizes)), sizes))
    assert int(multiplied) <= sum(-(-size // 16) * 16 for size in sizes)


def test_reference_forms_differentiate_twice():
    sizes = (3, 0, 4)
    rows, kernel, _ = operands(sizes)

    def value(rows):
        return jnp.sum(form.grouped_matmul(rows, kernel, jnp.asarray(sizes)) ** 2)

    with use_platform("cpu"), use_reference_forms():
        _, along = jax.jvp(jax.grad(value), (rows,), (rows,))
    # The Hessian of |r K|^2 along r is 2 r K K^T.
    out, _, _ = by_loops(rows, kernel, np.zeros((7, Y)), sizes)
    want = by_loops(rows, kernel, 2 * out, sizes)[1]
    np.testing.assert_allclose(along, want, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bfloat16_kernels_are_converted_by_blocks(sizes, monkeypatch):
    monkeypatch.setattr(narrow, "_BLOCK", 2 * X)  # two blocks of outputs, which overlap
    rows, kernel, direction = (a.astype(jnp.bfloat16) for a in operands(sizes, unused=3))
    out = jax.jit(form.grouped_matmul)(rows, kernel, jnp.array(sizes))
    assert out.dtype == jnp.bfloat16
    used = sum(sizes)
    expected = by_loops(rows, kernel, direction, sizes)[0][:used]
    # A sum of five products is rounded to bfloat16 once: its values have eight bits.
    np.testing.assert_allclose(out[:used].astype(np.float64), expected, rtol=2**-8, atol=1e-6)


def test_no_call_without_a_gradient_copies_bfloat16_kernels(monkeypatch):
    monkeypatch.setattr(narrow, "_BLOCK", 2**12)
    sizes, kernel = (
        jax.ShapeDtypeStruct((8,), jnp.int32),
        jax.ShapeDtypeStruct((8, 128, 128), jnp.bfloat16),
    )
    rows = jax.ShapeDtypeStruct((2, 128), jnp.bfloat16)

    def temporary_bytes():
        lowered = jax.jit(lambda *args: form.grouped_matmul(*args)).lower(rows, kernel, sizes)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # The kernels have 262 kB, and 524 kB in float32; a block has 16 kB.
    assert temporary_bytes() < 60_000
    monkeypatch.setattr(narrow, "_BLOCK", 2**30)
    assert temporary_bytes() > 500_000


def test_half_precision_stays():
    rows, kernel, _ = (a.astype(jnp.bfloat16) for a in operands((3, 4)))
    out, pull = jax.vjp(lambda r, k: form.grouped_matmul(r, k, jnp.array([3, 4])), rows, kernel)
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in pull(out)] == [jnp.bfloat16] * 2


def halves(rows=256, experts=3, x=128, y=128):
    return jnp.ones((rows, x), jnp.bfloat16), jnp.ones((experts, x, y), jnp.bfloat16)


@pytest.fixture
def on(monkeypatch):
    """Sets the GPU of this process by its compute capability, and forgets earlier warnings."""
    form._warn.cache_clear()
    return lambda capability: monkeypatch.setattr(form, "capability", lambda: capability)


def test_choice_by_platform_and_capability(on):
    rows, kernel = halves()
    assert form.capability() is None  # there is no GPU here
    on("9.0")
    chosen = {}
    for platform in ("cpu", "tpu", "gpu"):
        with use_platform(platform), warnings.catch_warnings():
            warnings.simplefilter("error")
            chosen[platform] = form._choose(rows, kernel)
            with use_reference_forms():
                assert form._choose(rows, kernel) == "ragged_dot"
    assert chosen == {"cpu": "blocks", "tpu": "megablox", "gpu": "hopper"}


@pytest.mark.parametrize(
    ("capability", "operands", "reason"),
    [
        ("8.0", halves(), "capability 8.0"),
        ("10.0", halves(), "capability 10.0"),  # Blackwell lacks Hopper's instructions
        ("gfx942", halves(), "capability gfx942"),
        (None, halves(), "an absent GPU"),
        ("9.0", [a.astype(jnp.float32) for a in halves()], "rows of float32"),
        ("9.0", halves(rows=96), "96 rows"),
        ("9.0", halves(x=64), r"\[64, 128\]"),
        ("9.0", halves(y=192), r"\[128, 192\]"),
    ],
)
def test_ragged_dot_on_a_gpu_warns_of_its_cost_once(on, capability, operands, reason):
    on(capability)
    with use_platform("gpu"):
        with pytest.warns(UserWarning, match=f"3 times their FLOPs.*{reason}"):
            assert form._choose(*operands) == "ragged_dot"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert form._choose(*operands) == "ragged_dot"


def test_what_a_tpu_mesh_cannot_map_warns_of_the_cost_of_its_gradient_once(on):
    """Rows that the mesh does not divide: the products are outside of `shard_map`."""
    mesh = partitioning.make_mesh(shape={"fsdp": 2, "tensor": 4})
    with partitioning.use_mesh(mesh, partitioning.rules_named("fsdp_tp")), use_platform("tpu"):
        with pytest.warns(UserWarning, match="3 times its FLOPs.*does not divide"):
            assert form._choose(*halves()) == "ragged_dot"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert form._choose(*halves()) == "ragged_dot"


@pytest.mark.parametrize(
    ("sizes", "x", "y"),
    [((70, 0, 150), 128, 128), ((0, 128, 9), 128, 128), ((70, 9), 96, 520), ((9, 70), 520, 3)],
)
def test_the_gradient_of_the_tpu_form_in_the_interpreter(sizes, x, y):
    """Of widths that no tile divides too."""
    rows, kernel, direction = large(sizes, unused := 36, x, y)
    want = by_loops(rows, kernel, direction, sizes)
    out, pull = jax.vjp(
        lambda r, k: form.tpu_matmul(r, k, jnp.asarray(sizes), interpret=True), rows, kernel
    )
    got = (out, *pull(direction))
    for values, expected in zip(got, want, strict=True):
        assert values.dtype == jnp.bfloat16
        values = np.asarray(values, np.float64)
        if len(values) == len(rows):
            values, expected = values[:-unused], expected[:-unused]
        np.testing.assert_allclose(
            values, expected, rtol=2**-7, atol=2**-7 * np.abs(expected).max()
        )


def test_a_version_of_jax_without_the_kernels_has_ragged_dot(on, monkeypatch):
    on("9.0")
    assert form.hopper_problem(*halves()) == ""
    monkeypatch.setattr(
        form, "_HOPPER_MODULES", (*form._HOPPER_MODULES, "jax.experimental.no_such_module")
    )
    assert form.hopper_problem(*halves()) == "this version of JAX"


def small_gpu(monkeypatch):
    """A GPU with few processors, for the kernel that asks for their number."""
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(core_count=2)])


def test_the_hopper_kernels_lower_for_cuda_without_products_of_all_experts(on, monkeypatch):
    on("9.0")
    small_gpu(monkeypatch)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in halves()]

    def gradients(rows, kernel, sizes):
        def loss(rows, kernel):
            out = form.grouped_matmul(rows, kernel, sizes)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1))(rows, kernel)

    names = ("mosaic_gpu", "mosaic_gpu_v2")
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in names]
    exporting = export.export(jax.jit(gradients), platforms=["cuda"], disabled_checks=checks)
    with use_platform("gpu"):
        text = exporting(*shapes, jax.ShapeDtypeStruct((3,), jnp.int32)).mlir_module()
    calls = text.count("stablehlo.custom_call @mosaic_gpu")
    assert calls == 3  # products, and the gradients of rows and kernels
    assert "stablehlo.dot_general" not in text and "chlo.ragged_dot" not in text


def test_the_hopper_kernel_in_the_interpreter(on):
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    on("9.0")
    sizes, unused = (70, 0, 150), 36
    rows, kernel, direction = large(sizes, unused)
    want, *_ = by_loops(rows, kernel, direction, sizes)
    with use_platform("gpu"), interpreter.force_gpu_interpret_mode():
        got = np.asarray(form.grouped_matmul(rows, kernel, jnp.asarray(sizes)), np.float64)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-7 * np.abs(want).max())
    np.testing.assert_array_equal(got[-unused:], 0)


def large(sizes, unused, x=128, y=128):
    """Operands that the kernels support; unused rows are not a number, on which no result may depend."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((sum(sizes) + unused, x), (len(sizes), x, y), (sum(sizes) + unused, y))
    rows, kernel, direction = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    return rows.at[-unused:].set(jnp.nan), kernel, direction.at[-unused:].set(jnp.nan)


def test_the_gradient_of_the_hopper_form(on, monkeypatch):
    """JAX's interpreter lacks the transposed products of the backward kernels: here they have stand-ins."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    def products(lhs, rhs, *, group_sizes, transpose_rhs, **tiles):
        assert tiles == form._HOPPER_TILES
        rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    def transposed(lhs, rhs, *, group_sizes, **tiles):
        assert tiles == form._HOPPER_TILES
        # As the kernel does, rows of others are masked by a product with zero.
        own = np.repeat(np.eye(len(group_sizes)), np.asarray(group_sizes), axis=0)
        own = np.pad(own, ((0, len(lhs) - len(own)), (0, 0)))
        return jnp.einsum("re,rx,ry->exy", own, lhs, rhs).astype(lhs.dtype)

    monkeypatch.setattr(ragged_dot_mgpu, "ragged_dot", products)
    monkeypatch.setattr(transposed_ragged_dot_mgpu, "transposed_ragged_dot", transposed)
    on("9.0")
    sizes = (70, 0, 150)
    rows, kernel, direction = large(sizes, 36)
    want = by_loops(rows, kernel, direction, sizes)
    with use_platform("gpu"):
        call = functools.partial(form.grouped_matmul, sizes_E=jnp.asarray(sizes))
        out, pull = jax.vjp(call, rows, kernel)
        grads = pull(direction)
    for got, expected in zip((out, *grads), want, strict=True):
        assert got.dtype == jnp.bfloat16
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got, expected, rtol=2**-7, atol=2**-7 * np.abs(expected).max())
