"""Several slices of absent TPUs: which mesh axes join them, and what they exchange; and budgets of other programs.

What compiles for TPUs needs libtpu (the extra `tpu`) and is skipped without it.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

from espalier.launch.precompile import precompile, programs, tpu_topology
from espalier.launch.precompile.hlo import collectives
from espalier.launch.precompile.settings import Options
from espalier.model.kernels import platform
from espalier.model.kv_cache.full import FullCache
from espalier.model.kv_cache.snapkv import SnapKV
from espalier.model.moe.grouped_matmul import grouped_matmul
from espalier.trainers import partitioning
from tests.benchmarks import accelerator_case
from tests.benchmarks.jax import accelerator_jax
from tests.launch import precompile_test as runs

needs_libtpu = runs.needs_libtpu


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "shape", "joined"),
    [
        ("2xv5e:2x2", {"data": 2, "fsdp": 4}, {"data": 2}),
        ("2xv5e:2x2", {"fsdp": 4, "tensor": 2}, {"fsdp": 2}),
        ("4xv5e:2x2", {"data": 2, "fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2}),
        ("3xv5e:2x2", {"data": 3, "tensor": 4}, {"data": 3}),
    ],
)
def test_the_outermost_axes_join_slices(name, shape, joined, tpu_environment):
    devices = tpu_topology.devices(tpu_topology.parse(name))
    mesh = partitioning.make_mesh(shape=shape, devices=devices)
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == shape
    for axis, size in shape.items():
        index = mesh.axis_names.index(axis)
        along = mesh.devices.swapaxes(0, index).reshape(size, -1)
        for line in along.T:
            assert len({device.slice_index for device in line}) == joined.get(axis, 1)


@pytest.mark.tpu
@needs_libtpu
def test_slices_that_are_copies_exchange_gradients_alone(tpu_environment):
    topology = tpu_topology.parse("2xv5e:2x2")
    run = runs.recipe(
        runs.tpu_model("llama"), mesh={"data": 2, "fsdp": 4}, rules="fsdp", rows=8, length=512
    )
    program = precompile.resolved(run, tpu_topology.devices(topology))
    report, _ = _compiled(programs.train(program), program)
    within, between = collectives.sent(report.collectives)
    # A ring of two sends what it has once: a chip's quarter of the gradients, bfloat16 or float32, and some of them whole.
    assert 2 <= between / (program.num_params() / 4) <= 6
    assert within > 0 and report.fits
    assert {kind for kind in report.collectives if kind.startswith("between")} == {
        "between-slices all-reduce"
    }


# Of one token: most bytes of arguments and at the peak, most bytes sent. Measured plus 5 %.
DECODE_BUDGETS = {
    "full": (None, 12.6e6, 46e6, 16.2e3),
    "snapkv": (256, 4.2e6, 7.9e6, 55e3),
}


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("name", DECODE_BUDGETS)
def test_budgets_of_decoding(name, tpu_environment):
    capacity, most_arguments, most_peak, most_sent = DECODE_BUDGETS[name]
    topology = tpu_topology.parse("v5e:2x2")
    run = runs.recipe(runs.tpu_model("llama"), mesh={"tensor": 4}, rules="tp", rows=2, length=4096)
    program = precompile.resolved(run, tpu_topology.devices(topology))
    policy = FullCache() if capacity is None else SnapKV(capacity=capacity)
    work = programs.work("decode", program, policy, Options(max_new_tokens=128))
    report, text = _compiled(work, program)
    assert report.memory.arguments <= most_arguments
    assert report.memory.peak <= most_peak
    assert sum(total.bytes for total in report.collectives.values()) <= most_sent
    # The caches are updated in place.
    assert report.memory.temporaries < report.memory.arguments


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("name", accelerator_case.WORKLOADS)
def test_the_accelerator_tier_compiles(name, tpu_environment):
    topology = tpu_topology.parse("v5e:1x1")
    work = {**accelerator_case.workloads(tiny=True)[name], "length": 512}
    if work["kind"] in ("train", "dpo"):
        program = precompile.resolved(
            accelerator_jax.recipe_of(work), tpu_topology.devices(topology)
        )
        report, _ = _compiled(programs.train(program), program)
        assert report.fits and report.flops.products > 0
        return
    (device,) = tpu_topology.devices(topology)
    if work["kind"] == "decode":
        recipe = accelerator_jax.recipe_of({**work, "kind": "train"})
        recipe = dataclasses.replace(recipe, model=accelerator_jax.model_of(work["model"]))
        program = precompile.resolved(recipe, tpu_topology.devices(topology))
        for policy in (FullCache(), SnapKV(**work["snapkv"])):
            for kind in ("prefill", "decode"):
                options = Options(max_new_tokens=work["new"])
                report, _ = _compiled(programs.work(kind, program, policy, options), program)
                assert report.fits
        return
    sharding = jax.sharding.SingleDeviceSharding(device)
    for function, shapes, _ in accelerator_jax.kernels(work).values():
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
        with platform.use_platform("tpu"), jax.default_matmul_precision("default"):
            compiled = jax.jit(function).trace(*shapes).lower().compile()
        assert compiled.cost_analysis()["flops"] > 0


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("chips", "mesh", "width"),
    [
        ("v5e:1x1", {"data": 1}, 256),
        ("v5e:2x2", {"fsdp": 4}, 256),
        ("v5e:2x2", {"fsdp": 2, "tensor": 2}, 384),
    ],
)
def test_flops_of_a_mixture_of_real_widths(chips, mesh, width, tpu_environment):
    """Heads of 128: no form falls back, and FLOPs of experts do not grow with their number.

    Half of a width of 384 is no multiple of the 128 columns of a tile.
    """
    topology = tpu_topology.parse(chips)
    sizes = {"embed_dim": 512, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": width}
    batch_size = topology.num_chips
    model = {**accelerator_case.MIXTRAL, **sizes, "num_layers": 2, "vocab_size": 256}
    own = {"model": model, "batch_size": batch_size, "length": 512}
    work = {**accelerator_case.WORKLOADS["moe"], **own}
    run = dataclasses.replace(accelerator_jax.recipe_of(work), mesh=mesh, rules="fsdp_tp")
    program = precompile.resolved(run, tpu_topology.devices(topology))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report, _ = _compiled(programs.train(program), program)
    assert report.fits and not report.unknown_kernels
    # A layer has three products with experts: forward twice, since layers are recomputed, and both gradients.
    product = 2 * (2 * 512) * sizes["embed_dim"] * sizes["mlp_dim"]
    attention = 2 * 512 * (513 / 2) * 512
    assert report.flops.kernels == pytest.approx(2 * (12 * product + 11 * attention), rel=0.01)
    # The ideal is the model's FLOPs and a second forward pass.
    assert report.flops.compiled < 1.1 * (4 / 3) * report.flops.analytic


@pytest.mark.tpu
@needs_libtpu
def test_flops_of_the_products_of_experts(tpu_environment):
    """The figures of docs/evidence/benchmarks.md in small: a compiled program is the same for all sizes of experts."""
    from jax.experimental.pallas.ops.tpu.megablox import ops as megablox

    R, X, E = 1024, 256, 8
    (device,) = tpu_topology.devices(tpu_topology.parse("v5e:1x1"))
    arrays = [((R, X), jnp.bfloat16), ((E, X, X), jnp.bfloat16), ((E,), jnp.int32)]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]
    forms = {
        "ragged_dot": jax.lax.ragged_dot,
        "megablox": functools.partial(megablox.gmm, preferred_element_type=jnp.bfloat16),
    }

    def flops(function):
        with jax.default_matmul_precision("default"):
            compiled = jax.jit(function).trace(*shapes).lower().compile()
        return compiled.cost_analysis()["flops"] / (2 * R * X * X)

    def gradients(form, rows, kernel, sizes):
        loss = lambda r, k: jnp.sum(form(r, k, sizes).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.grad(loss, (0, 1))(rows, kernel)

    for name, form in forms.items():
        assert flops(form) == pytest.approx(1, rel=0.05), name
    # XLA multiplies all rows for the gradient of every expert's kernel, most of them zeros.
    of_gradients = {name: flops(functools.partial(gradients, form)) for name, form in forms.items()}
    assert of_gradients["ragged_dot"] == pytest.approx(2 + E, rel=0.05)
    assert of_gradients["megablox"] == pytest.approx(3, rel=0.05)
    with platform.use_platform("tpu"):
        ours = flops(functools.partial(gradients, grouped_matmul))
    assert ours == pytest.approx(3, rel=0.05)


def _compiled(work, program):
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        return precompile.compile_work(work, program, hbm_bytes=16e9)


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "shapes"), [("v6e:3x5", "1x1, 2x2, 2x4, 4x4"), ("2xv5p:3x3x3", "1x1x1, 2x2x1")]
)
def test_a_shape_that_no_slice_has_is_one_line_with_those_that_exist(name, shapes, tpu_environment):
    with pytest.raises(tpu_topology.TopologyError) as caught:
        tpu_topology.devices(tpu_topology.parse(name))
    message = str(caught.value)
    assert message.startswith(f"--topology={name}: no v") and "INVALID" not in message
    assert f"there are {shapes}" in message and "\n" not in message
